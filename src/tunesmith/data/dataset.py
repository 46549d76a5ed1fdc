"""The rows of one data role, readable in any order.

    files -> open_dataset (parse-only pass) -> Dataset; Dataset.prepare(i) -> Prepared (documents of row i)

The parse-only pass reads every row once, so the number of rows (and of steps) is known, and rows that cannot be used
are known before anything starts: they are left out here and kept in `rejects`; whether a run goes on without them is
decided elsewhere. It keeps a few numbers a row, never the rows: row i is read and rendered again when asked for. A row
whose documents all fall away keeps its slot, with no documents. Order and steps: `schedule.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example, Row
from tunesmith.data.constraints import Never, Tally, Violation
from tunesmith.data.formats.prompt_templates import Asking, asking_of
from tunesmith.data.formats.row_formats import SIDES, detect, note_on, parse, parse_pair
from tunesmith.data.hashing import digests, shape
from tunesmith.data.readers.columns import check_columns, renamed
from tunesmith.data.readers.invalid_row import BadRow, Reason, Rejects
from tunesmith.data.readers.row_index import LONGEST_ROW
from tunesmith.data.readers.sources import Source, open_source
from tunesmith.data.readers.text_folder import Folder
from tunesmith.data.truncation import Overlong, Prepared, fit, weighted
from tunesmith.recipe.fields import DataSource

if TYPE_CHECKING:
    from tunesmith.data.chat_template.renderer import Draft, Renderer

FIRST_ROWS = 20  # enough to see a format
SHOWN_ERRORS = 5
MOST_SHAPES = 2**16 - 1
ONE_SIDE = "one side of the pair is longer than max_length"
NO_WORSE = "the base model's answer breaks no constraint"
NOT_RENDERED: Reason = "cannot be rendered"
NOTHING = Never()


@dataclass(frozen=True, eq=False)
class Part:
    """One file of a role, and how its rows are read."""

    source: Source | Folder
    format: str
    reason: str  # of the format
    columns: Mapping[str, str]  # our name -> the file's
    weight: float
    pairs: bool  # both sides of its preference rows are read
    never: Never  # what its answers may not say
    task: str = ""  # that its rows are of
    asking: Asking | None = None  # how its rows are asked, where they hold columns and no prompt

    def plain(self, index: int) -> Row:
        """A row as it stands in the file, its columns under our names."""
        row = self.source.row(index)
        return renamed(row, self.columns) if self.columns else row

    def row(self, index: int) -> Row:
        row = self.plain(index)
        return self.asking.asked(row) if self.asking else row

    def digests(self, index: int, example: Example) -> tuple[int, int]:
        """Of one row, whatever form it is asked in."""
        return self.asking.digests(self.plain(index)) if self.asking else digests(example)

    def example(self, index: int, has_template: bool) -> Example:
        both = self.pairs and (self.format in SIDES or not self.never.pairing)
        read = parse_pair if both else parse
        return self.never.judged(read(self.row(index), self.format, has_template))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of one role. N rows; the digests compare contents with white space evened out."""

    parts: tuple[Part, ...]
    renderer: Renderer
    part_N: np.ndarray  # int32, into parts
    row_N: np.ndarray  # int64, into the rows of that part
    contents_N: np.ndarray  # uint64, digest of the whole row
    prompts_N: np.ndarray  # uint64, digest of what stands before the last answer
    shapes_N: np.ndarray  # uint16, rows of one shape look alike to a template
    rejects: Rejects  # rows of the files that are not among the N
    violations: Rejects  # those that are not since they break a constraint, which is no error
    tally: Tally  # of the constraints
    max_length: int | None = None  # tokens of a document
    overlong: Overlong = "drop"
    skip_bad: bool = False  # a row that cannot be rendered is an empty slot, and no error
    made: Mapping[int, Example] | None = None  # row -> it and the worse side made for it, once that is done

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def pairs(self) -> bool:
        return any(part.pairs for part in self.parts)

    @property
    def trained(self) -> bool:
        return not any(part.never.held_out for part in self.parts)

    @property
    def tasks(self) -> dict[str, int]:
        """How many rows each named task has, in the order of the files."""
        counts = np.bincount(self.part_N, minlength=len(self.parts)).tolist()
        return {part.task: count for part, count in zip(self.parts, counts, strict=True) if part.task and count}

    @property
    def idle_bans(self) -> list[str]:
        """Constraints that rows should be trained away from, and no row breaks."""
        rules = [part.never for part in self.parts if part.never.bans and not part.never.held_out][:1]
        bans = [one.name for never in rules for one in never.constraints if one.mode == "ban"]
        return [name for name in bans if name not in self.tally.banned]

    @property
    def path(self) -> str:
        return ", ".join(str(part.source.path) for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """sha256 over the bytes of the file; of several files, over their sha256."""
        prints = [part.source.fingerprint for part in self.parts]
        return prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()

    def part(self, index: int) -> Part:
        return self.parts[self.part_N[index]]

    def id(self, index: int) -> str:
        return self.part(index).source.id(self.row_N[index])

    def row(self, index: int) -> Row:
        return self.part(index).row(self.row_N[index])

    def row_bytes(self, index: int) -> int:
        """How long a row is in its file."""
        return self.part(index).source.raw(self.row_N[index], 0)[1]

    def example(self, index: int) -> Example:
        example = self.part(index).example(self.row_N[index], self.renderer.has_template)
        return example if self.made is None else self.made.get(index, example)

    def drafts(self, indices: Sequence[int]) -> list[Draft]:
        """Many rows for `understand`; their text is encoded here, on all cores."""
        return self.renderer.drafts([self.example(index) for index in indices])

    def understand(self, index: int, draft: Draft | None = None) -> tuple[Example, Prepared]:
        """Render one row and apply the over-long policy, which may raise InputError. A row that cannot be rendered
        has no documents, and `problem` says why."""
        draft = draft or self.renderer.draft(self.example(index))
        example = draft.example
        if self.made is not None and example.rejected is None:
            return example, Prepared(example.id, (), dropped=NO_WORSE)
        try:
            rendered = self.renderer.finish(draft)
        except InputError as error:
            problem = BadRow(NOT_RENDERED, error.what, where=example.id, fix=error.fix)
            return example, Prepared(example.id, (), dropped=f"{NOT_RENDERED}: {error.what}", problem=problem)
        documents = weighted(rendered.documents, self.part(index).weight)
        if task := self.part(index).task:
            documents = [dataclasses.replace(document, task=task) for document in documents]
        longest = None if self.made and index in self.made else self.max_length
        prepared = fit(example.id, documents, longest, self.overlong)
        if 0 < len(prepared.documents) < len(documents) and example.rejected is not None:
            prepared = dataclasses.replace(prepared, documents=(), dropped=ONE_SIDE)
        return example, dataclasses.replace(prepared, notes=tuple(rendered.notes))

    def prepare(self, index: int) -> Prepared:
        return self.understand(index)[1]

    def documents(self, index: int) -> tuple[Document, ...]:
        """The documents of a row. Raises BadRow if it cannot be rendered, unless `skip_bad`."""
        prepared = self.prepare(index)
        if prepared.problem and not self.skip_bad:
            raise prepared.problem
        return prepared.documents

    def take(self, rows_K: np.ndarray) -> Dataset:
        """The data set of these rows, in this order."""
        names = ("part_N", "row_N", "contents_N", "prompts_N", "shapes_N")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows_K] for name in names})

    def limited(self, max_length: int | None, overlong: Overlong) -> Dataset:
        """The same rows under another length policy."""
        return dataclasses.replace(self, max_length=max_length, overlong=overlong)


def open_dataset(
    files: Sequence[DataSource],
    renderer: Renderer,
    *,
    max_length: int | None = None,
    overlong: Overlong = "drop",
    max_examples: int | None = None,
    skip_bad: bool = False,
    pairs: bool = False,
    never: Never = NOTHING,
) -> Dataset:
    """Read every row once and remember where it is. `max_examples` takes the first rows of all files together. `pairs`:
    a row is a chosen and a rejected answer, not the chosen one alone.

    Raises InputError for a file that cannot be read, if not a single row can be used, and for a constraint that most
    answers break.
    """
    names = Counter(file.path.name for file in files)
    rejects, violations, tally = Rejects(), Rejects(), Tally()
    shapes: dict[object, int] = {}
    opened: list[_Opened] = []
    left = max_examples
    for number, file in enumerate(files):
        if left == 0:
            break
        source = open_source(file.path, name=file.path.name if names[file.path.name] == 1 else str(file.path))
        rows = range(min(n for n in (len(source), file.max_examples, left) if n is not None))
        left = left if left is None else left - len(rows)
        part = _part(file, source, rows, renderer.has_template, pairs, never)
        put = _Sorted(number, rejects, violations, tally)
        opened.append(_read(part, rows, renderer.has_template, put, shapes))
    tally.refuse_most(", ".join(str(file.path) for file in files))
    if not any(len(one.row_K) for one in opened):
        raise rejects.nothing_left(", ".join(str(file.path) for file in files))
    digests_N2 = np.concatenate([one.digests_K2 for one in opened])
    return Dataset(
        parts=tuple(one.part for one in opened),
        renderer=renderer,
        part_N=np.repeat(np.arange(len(opened), dtype=np.int32), [len(one.row_K) for one in opened]),
        row_N=np.concatenate([one.row_K for one in opened]),
        contents_N=digests_N2[:, 0],
        prompts_N=digests_N2[:, 1],
        shapes_N=np.concatenate([one.shapes_K for one in opened]),
        rejects=rejects,
        violations=violations,
        tally=tally,
        max_length=max_length,
        overlong=overlong,
        skip_bad=skip_bad,
    )


class _Sorted(NamedTuple):
    """Where the rows of one file are remembered that are not used, and what is counted."""

    number: int
    rejects: Rejects
    violations: Rejects
    tally: Tally

    def out(self, row: int, problem: BadRow) -> None:
        if isinstance(problem, Violation):
            self.tally.lost(problem)
        into = self.violations if isinstance(problem, Violation) else self.rejects
        into.add(self.number, row, problem)


class _Opened(NamedTuple):
    part: Part
    row_K: np.ndarray  # int64, the rows that can be used
    digests_K2: np.ndarray
    shapes_K: np.ndarray


def _part(
    file: DataSource, source: Source | Folder, rows: range, has_template: bool, pairs: bool, never: Never
) -> Part:
    """How the rows of a file are read. Raises InputError for an unknown format or column."""
    where, format, reason, asking = str(file.path), file.format, "the recipe says so", None
    first = _first_rows(source, rows)
    if first and file.columns:
        check_columns(file.columns, first, format, where)
        first = [renamed(row, file.columns) for row in first]
    if file.prompts:
        asking, reason = asking_of(file, first, has_template)
        format = "completion"
    elif first and format == "auto":
        format, reason = detect(first, has_template, pairs=pairs)
    elif format == "auto":
        format, reason = "text", "no row can be read"
    elif note := note_on(format, pairs):
        reason += f"; {note}"
    return Part(source, format, reason, file.columns, file.weight, pairs, never, file.name, asking)


def _first_rows(source: Source | Folder, rows: range) -> list[Row]:
    """The first rows that can be decoded, a few, and not too much of them."""
    found: list[Row] = []
    size = 0
    for i in rows:
        try:
            found.append(source.row(i))
        except BadRow:
            continue
        size += source.raw(i, 0)[1]
        if len(found) == FIRST_ROWS or size > LONGEST_ROW:
            break
    return found


def _read(part: Part, rows: range, has_template: bool, put: _Sorted, shapes: dict[object, int]) -> _Opened:
    """Understand every row once. `shapes` numbers the shapes that were seen, and grows."""
    digests_R2, shapes_R = np.zeros((len(rows), 2), dtype=np.uint64), np.zeros(len(rows), dtype=np.uint16)
    good = array("q")
    for i in rows:
        try:
            example = part.example(i, has_template)
        except BadRow as problem:
            put.out(i, problem)
            continue
        put.tally.kept(example)
        digests_R2[len(good)] = part.digests(i, example)
        shapes_R[len(good)] = shapes.setdefault(shape(example), min(len(shapes), MOST_SHAPES))
        good.append(i)
    count = len(good)
    return _Opened(part, np.array(good, dtype=np.int64), digests_R2[:count], shapes_R[:count])


def raise_all(problems: Sequence[InputError], rows: int, where: str) -> None:
    """Raise one error that stands for all of them; do nothing if there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    lines = [f"\n  {problem.where}: {problem.what}" for problem in problems[:SHOWN_ERRORS]]
    more = f"\n  and {len(problems) - SHOWN_ERRORS:,} more" if len(problems) > SHOWN_ERRORS else ""
    what = f"{len(problems):,} of {rows:,} rows cannot be used:{''.join(lines)}{more}"
    raise InputError(what, where=where, fix=problems[0].fix)
