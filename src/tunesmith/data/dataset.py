"""The rows of one data role, readable in any order.

    files -> open_dataset (parse-only pass) -> Dataset; Dataset.prepare(i) -> Prepared (documents of row i)

The parse-only pass reads every row once, so the number of rows (and of steps) is known, and rows
that cannot be used are known before anything starts: they are left out here and kept in `rejects`;
whether a run goes on without them is decided elsewhere. It keeps a few numbers a row, never the
rows: row i is read and rendered again when asked for. A row whose documents all fall away keeps its
slot, with no documents. Order and steps: `schedule.py`."""

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
from tunesmith.data.constraints import ConstraintCounts, ConstraintSet, Violation
from tunesmith.data.formats.prompt_templates import PromptFormatter, make_prompt_formatter
from tunesmith.data.formats.row_formats import (
    SIDE_READERS,
    detect_format,
    get_note,
    parse_pair,
    parse_row,
)
from tunesmith.data.hashing import compute_shape, hash_example
from tunesmith.data.readers.columns import check_columns, rename_columns
from tunesmith.data.readers.invalid_row import InvalidRow, Reason, RejectedRows
from tunesmith.data.readers.row_index import MAX_ROW_BYTES
from tunesmith.data.readers.sources import Source, open_source
from tunesmith.data.readers.text_folder import TextFolder
from tunesmith.data.truncation import OverlongPolicy, PreparedRow, apply_max_length, scale_weights
from tunesmith.recipe.fields import DataSource

if TYPE_CHECKING:
    from tunesmith.data.chat_template.renderer import RenderDraft, Renderer

MAX_DETECTION_ROWS = 20  # enough to see a format
MAX_SHOWN_ERRORS = 5
MAX_SHAPES = 2**16 - 1
PAIR_TOO_LONG = "one side of the pair is longer than max_length"
NO_VIOLATION = "the base model's answer breaks no constraint"
NOT_RENDERED: Reason = "cannot be rendered"
NO_CONSTRAINTS = ConstraintSet()


@dataclass(frozen=True, eq=False)
class DataSourceReader:
    """One file of a role, and how its rows are read."""

    source: Source | TextFolder
    format: str
    format_reason: str  # of the format
    columns: Mapping[str, str]  # our name -> the file's
    weight: float
    has_pairs: bool  # both sides of its preference rows are read
    constraint_set: ConstraintSet  # what its answers may not say
    task: str = ""  # that its rows are of
    # how its rows are asked, where they hold columns and no prompt
    prompt_formatter: PromptFormatter | None = None

    def read_mapped_row(self, index: int) -> Row:
        """A row as it stands in the file, its columns under our names."""
        row = self.source.read_row(index)
        return rename_columns(row, self.columns) if self.columns else row

    def read_row(self, index: int) -> Row:
        row = self.read_mapped_row(index)
        return self.prompt_formatter.format_row(row) if self.prompt_formatter else row

    def compute_digests(self, index: int, example: Example) -> tuple[int, int]:
        """Of one row, whatever form it is asked in."""
        return (
            self.prompt_formatter.compute_digests(self.read_mapped_row(index))
            if self.prompt_formatter
            else hash_example(example)
        )

    def read_example(self, index: int, has_template: bool) -> Example:
        is_pair = self.has_pairs and (
            self.format in SIDE_READERS or not self.constraint_set.has_pair_constraints
        )
        parser = parse_pair if is_pair else parse_row
        return self.constraint_set.mark_violations(
            parser(self.read_row(index), self.format, has_template)
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of one role. N rows; the digests compare contents with white space evened out."""

    parts: tuple[DataSourceReader, ...]
    renderer: Renderer
    part_N: np.ndarray  # int32, into parts
    row_N: np.ndarray  # int64, into the rows of that part
    contents_N: np.ndarray  # uint64, digest of the whole row
    prompts_N: np.ndarray  # uint64, digest of what stands before the last answer
    shapes_N: np.ndarray  # uint16, rows of one shape look alike to a template
    rejected_rows: RejectedRows  # rows of the files that are not among the N
    violations: RejectedRows  # those that are not since they break a constraint, which is no error
    constraint_counts: ConstraintCounts  # of the constraints
    max_length: int | None = None  # tokens of a document
    overlong: OverlongPolicy = "drop"
    # a row that cannot be rendered is an empty slot, and no error
    should_skip_invalid: bool = False
    # row -> it and the worse side made for it, once that is done
    synthetic: Mapping[int, Example] | None = None

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def has_pairs(self) -> bool:
        return any(part.has_pairs for part in self.parts)

    @property
    def is_trained(self) -> bool:
        return not any(part.constraint_set.is_held_out for part in self.parts)

    @property
    def tasks(self) -> dict[str, int]:
        """How many rows each named task has, in the order of the files."""
        counts = np.bincount(self.part_N, minlength=len(self.parts)).tolist()
        return {
            part.task: count
            for part, count in zip(self.parts, counts, strict=True)
            if part.task and count
        }

    @property
    def unmatched_bans(self) -> list[str]:
        """Constraints that rows should be trained away from, and no row breaks."""
        constraint_sets = [
            part.constraint_set
            for part in self.parts
            if part.constraint_set.can_ban and not part.constraint_set.is_held_out
        ][:1]
        bans = [
            constraint.name
            for constraint_set in constraint_sets
            for constraint in constraint_set.constraints
            if constraint.mode == "ban"
        ]
        return [name for name in bans if name not in self.constraint_counts.banned]

    @property
    def path(self) -> str:
        return ", ".join(str(part.source.path) for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """sha256 over the bytes of the file; of several files, over their sha256."""
        fingerprints = [part.source.fingerprint for part in self.parts]
        return (
            fingerprints[0]
            if len(fingerprints) == 1
            else hashlib.sha256("".join(fingerprints).encode()).hexdigest()
        )

    def get_part(self, index: int) -> DataSourceReader:
        return self.parts[self.part_N[index]]

    def get_id(self, index: int) -> str:
        return self.get_part(index).source.get_id(self.row_N[index])

    def read_row(self, index: int) -> Row:
        return self.get_part(index).read_row(self.row_N[index])

    def get_row_bytes(self, index: int) -> int:
        """How long a row is in its file."""
        return self.get_part(index).source.read_raw(self.row_N[index], 0)[1]

    def read_example(self, index: int) -> Example:
        example = self.get_part(index).read_example(self.row_N[index], self.renderer.has_template)
        return example if self.synthetic is None else self.synthetic.get(index, example)

    def build_drafts(self, indices: Sequence[int]) -> list[RenderDraft]:
        """Many rows for `understand`; their text is encoded here, on all cores."""
        return self.renderer.make_drafts([self.read_example(index) for index in indices])

    def render_row(
        self, index: int, draft: RenderDraft | None = None
    ) -> tuple[Example, PreparedRow]:
        """Render one row and apply the over-long policy, which may raise InputError. A row that
        cannot be rendered has no documents, and `problem` says why."""
        draft = draft or self.renderer.make_draft(self.read_example(index))
        example = draft.example
        if self.synthetic is not None and example.rejected is None:
            return example, PreparedRow(example.id, (), drop_reason=NO_VIOLATION)
        try:
            rendered = self.renderer.finish_draft(draft)
        except InputError as error:
            problem = InvalidRow(NOT_RENDERED, error.message, where=example.id, fix=error.fix)
            return example, PreparedRow(
                example.id, (), drop_reason=f"{NOT_RENDERED}: {error.message}", problem=problem
            )
        documents = scale_weights(rendered.documents, self.get_part(index).weight)
        if task := self.get_part(index).task:
            documents = [dataclasses.replace(document, task=task) for document in documents]
        max_length = None if self.synthetic and index in self.synthetic else self.max_length
        prepared = apply_max_length(example.id, documents, max_length, self.overlong)
        if 0 < len(prepared.documents) < len(documents) and example.rejected is not None:
            prepared = dataclasses.replace(prepared, documents=(), drop_reason=PAIR_TOO_LONG)
        return example, dataclasses.replace(prepared, notes=tuple(rendered.notes))

    def prepare_row(self, index: int) -> PreparedRow:
        return self.render_row(index)[1]

    def render_documents(self, index: int) -> tuple[Document, ...]:
        """The documents of a row. Raises BadRow if it cannot be rendered, unless `skip_bad`."""
        prepared = self.prepare_row(index)
        if prepared.problem and not self.should_skip_invalid:
            raise prepared.problem
        return prepared.documents

    def select_rows(self, rows_K: np.ndarray) -> Dataset:
        """The data set of these rows, in this order."""
        names = ("part_N", "row_N", "contents_N", "prompts_N", "shapes_N")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows_K] for name in names})

    def with_max_length(self, max_length: int | None, overlong: OverlongPolicy) -> Dataset:
        """The same rows under another length policy."""
        return dataclasses.replace(self, max_length=max_length, overlong=overlong)


def open_dataset(
    files: Sequence[DataSource],
    renderer: Renderer,
    *,
    max_length: int | None = None,
    overlong: OverlongPolicy = "drop",
    max_examples: int | None = None,
    should_skip_invalid: bool = False,
    has_pairs: bool = False,
    constraint_set: ConstraintSet = NO_CONSTRAINTS,
) -> Dataset:
    """Read every row once and remember where it is. `max_examples` takes the first rows of all
    files together. `pairs`: a row is a chosen and a rejected answer, not the chosen one alone.

    Raises InputError for a file that cannot be read, if not a single row can be used, and for a
    constraint that most answers break."""
    name_counts = Counter(file.path.name for file in files)
    rejected_rows, violations, constraint_counts = (
        RejectedRows(),
        RejectedRows(),
        ConstraintCounts(),
    )
    shapes: dict[object, int] = {}
    scanned_sources: list[_ScannedSource] = []
    remaining = max_examples
    for number, file in enumerate(files):
        if remaining == 0:
            break
        source = open_source(
            file.path, name=file.path.name if name_counts[file.path.name] == 1 else str(file.path)
        )
        rows = range(
            min(limit for limit in (len(source), file.max_examples, remaining) if limit is not None)
        )
        remaining = remaining if remaining is None else remaining - len(rows)
        part = _build_part(file, source, rows, renderer.has_template, has_pairs, constraint_set)
        collector = _RejectCollector(number, rejected_rows, violations, constraint_counts)
        scanned_sources.append(_scan_rows(part, rows, renderer.has_template, collector, shapes))
    constraint_counts.refuse_broad_constraints(", ".join(str(file.path) for file in files))
    if not any(len(scanned.row_K) for scanned in scanned_sources):
        raise rejected_rows.build_empty_error(", ".join(str(file.path) for file in files))
    digests_N2 = np.concatenate([scanned.digests_K2 for scanned in scanned_sources])
    return Dataset(
        parts=tuple(scanned.part for scanned in scanned_sources),
        renderer=renderer,
        part_N=np.repeat(
            np.arange(len(scanned_sources), dtype=np.int32),
            [len(scanned.row_K) for scanned in scanned_sources],
        ),
        row_N=np.concatenate([scanned.row_K for scanned in scanned_sources]),
        contents_N=digests_N2[:, 0],
        prompts_N=digests_N2[:, 1],
        shapes_N=np.concatenate([scanned.shapes_K for scanned in scanned_sources]),
        rejected_rows=rejected_rows,
        violations=violations,
        constraint_counts=constraint_counts,
        max_length=max_length,
        overlong=overlong,
        should_skip_invalid=should_skip_invalid,
    )


class _RejectCollector(NamedTuple):
    """Where the rows of one file are remembered that are not used, and what is counted."""

    part_index: int
    rejected_rows: RejectedRows
    violations: RejectedRows
    constraint_counts: ConstraintCounts

    def reject(self, row: int, problem: InvalidRow) -> None:
        if isinstance(problem, Violation):
            self.constraint_counts.count_violation(problem)
        rejected_rows = self.violations if isinstance(problem, Violation) else self.rejected_rows
        rejected_rows.add(self.part_index, row, problem)


class _ScannedSource(NamedTuple):
    part: DataSourceReader
    row_K: np.ndarray  # int64, the rows that can be used
    digests_K2: np.ndarray
    shapes_K: np.ndarray


def _build_part(
    file: DataSource,
    source: Source | TextFolder,
    rows: range,
    has_template: bool,
    has_pairs: bool,
    constraint_set: ConstraintSet,
) -> DataSourceReader:
    """How the rows of a file are read. Raises InputError for an unknown format or column."""
    where, format, reason, prompt_formatter = (
        str(file.path),
        file.format,
        "the recipe says so",
        None,
    )
    first_rows = _read_first_rows(source, rows)
    if first_rows and file.columns:
        check_columns(file.columns, first_rows, format, where)
        first_rows = [rename_columns(row, file.columns) for row in first_rows]
    if file.prompts:
        prompt_formatter, reason = make_prompt_formatter(file, first_rows, has_template)
        format = "completion"
    elif first_rows and format == "auto":
        format, reason = detect_format(first_rows, has_template, has_pairs=has_pairs)
    elif format == "auto":
        format, reason = "text", "no row can be read"
    elif note := get_note(format, has_pairs):
        reason += f"; {note}"
    return DataSourceReader(
        source,
        format,
        reason,
        file.columns,
        file.weight,
        has_pairs,
        constraint_set,
        file.name,
        prompt_formatter,
    )


def _read_first_rows(source: Source | TextFolder, rows: range) -> list[Row]:
    """The first rows that can be decoded, a few, and not too much of them."""
    first_rows: list[Row] = []
    size_bytes = 0
    for i in rows:
        try:
            first_rows.append(source.read_row(i))
        except InvalidRow:
            continue
        size_bytes += source.read_raw(i, 0)[1]
        if len(first_rows) == MAX_DETECTION_ROWS or size_bytes > MAX_ROW_BYTES:
            break
    return first_rows


def _scan_rows(
    part: DataSourceReader,
    rows: range,
    has_template: bool,
    collector: _RejectCollector,
    shapes: dict[object, int],
) -> _ScannedSource:
    """Understand every row once. `shapes` numbers the shapes that were seen, and grows."""
    digests_R2, shapes_R = (
        np.zeros((len(rows), 2), dtype=np.uint64),
        np.zeros(len(rows), dtype=np.uint16),
    )
    usable_rows = array("q")
    for i in rows:
        try:
            example = part.read_example(i, has_template)
        except InvalidRow as problem:
            collector.reject(i, problem)
            continue
        collector.constraint_counts.count_example(example)
        digests_R2[len(usable_rows)] = part.compute_digests(i, example)
        shapes_R[len(usable_rows)] = shapes.setdefault(
            compute_shape(example), min(len(shapes), MAX_SHAPES)
        )
        usable_rows.append(i)
    count = len(usable_rows)
    return _ScannedSource(
        part, np.array(usable_rows, dtype=np.int64), digests_R2[:count], shapes_R[:count]
    )


def raise_combined(problems: Sequence[InputError], rows: int, where: str) -> None:
    """Raise one error that stands for all of them; do nothing if there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    lines = [f"\n  {problem.where}: {problem.message}" for problem in problems[:MAX_SHOWN_ERRORS]]
    more = (
        f"\n  and {len(problems) - MAX_SHOWN_ERRORS:,} more"
        if len(problems) > MAX_SHOWN_ERRORS
        else ""
    )
    message = f"{len(problems):,} of {rows:,} rows cannot be used:{''.join(lines)}{more}"
    raise InputError(message, where=where, fix=problems[0].fix)
