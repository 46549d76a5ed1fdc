"""The rows of one data role, readable in any order.

    files -> open_dataset (parse-only pass) -> Dataset -> render_row(i) -> PreparedRow (documents)

The parse-only pass reads every row once, so the numbers of rows and of steps are known before
training. Rows that cannot be used are excluded and recorded in `rejected_rows`; rejects.py decides
whether a run may start without them. Only a few numbers per row are stored: row i is read and
rendered again on request. A row that loses all its documents keeps its slot. Left out: order and
steps (sampler.py)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.hub_names import format_path
from tunesmith.core.types import Document, Example, Row
from tunesmith.data.constraints import ConstraintCounts, ConstraintSet, Violation
from tunesmith.data.formats.parse import (
    SIDE_READERS,
    check_columns,
    detect_format,
    get_note,
    parse_labelled,
    parse_pair,
    parse_row,
    refuse_verdict,
    rename_columns,
)
from tunesmith.data.formats.prompt_templates import PromptFormatter, make_prompt_formatter
from tunesmith.data.formats.tables import find_table
from tunesmith.data.hashing import compute_shape, hash_example
from tunesmith.data.readers.invalid_row import InvalidRow, Reason, RejectedRows
from tunesmith.data.readers.row_index import MAX_ROW_BYTES, MAX_TURNS_BYTES
from tunesmith.data.readers.sources import Source, open_source
from tunesmith.data.readers.text_folder import TextFolder
from tunesmith.data.truncation import OverlongPolicy, PreparedRow, apply_max_length, scale_weights
from tunesmith.recipe.fields import DataSource, PromptForm

if TYPE_CHECKING:
    from tunesmith.data.chat_template.renderer import RenderedRow, Renderer

MAX_DETECTION_ROWS = 20  # enough to recognize a format
MAX_SHOWN_ERRORS = 5
MAX_SHAPES = 2**16 - 1
PAIR_TOO_LONG = "one side of the pair is longer than max_length"
NO_VIOLATION = "the base model's answer breaks no constraint"
NOT_RENDERED: Reason = "cannot be rendered"
RowKind = Literal["answer", "text", "pair", "labelled"]
ROW_PARSERS: dict[RowKind, Callable[[Row, str, bool], Example]] = {
    "answer": parse_row,
    "text": parse_row,  # of continued pretraining
    "pair": parse_pair,
    "labelled": parse_labelled,
}
NO_CONSTRAINTS = ConstraintSet()


@dataclass(frozen=True, eq=False)
class DataSourceReader:
    """One file of a role, and how its rows are parsed."""

    source: Source | TextFolder
    format: str
    format_reason: str
    columns: Mapping[str, str]  # our name -> column of the file
    weight: float
    row_kind: RowKind  # what a row holds
    constraint_set: ConstraintSet
    task: str = ""
    prompt_formatter: PromptFormatter | None = None  # for rows of columns without a prompt
    is_described: bool = True  # the recipe says what the rows are; else their keys do
    has_classes: bool = False  # a table whose answers are labels

    @property
    def has_pairs(self) -> bool:
        return self.row_kind == "pair"

    def read_mapped_row(self, index: int) -> Row:
        """Read a row and rename its columns."""
        row = self.source.read_row(index)
        return rename_columns(row, self.columns) if self.columns else row

    def read_row(self, index: int) -> Row:
        """Read a row, rename its columns and build its prompt."""
        row = self.read_mapped_row(index)
        return self.prompt_formatter.format_row(row) if self.prompt_formatter else row

    def compute_digests(self, index: int, example: Example) -> tuple[int, int]:
        """Return digests of (the full row, its prompt), the same for every prompt form."""
        if self.prompt_formatter:
            return self.prompt_formatter.compute_digests(self.read_mapped_row(index))
        return hash_example(example)

    def read_example(self, index: int, has_template: bool) -> Example:
        """Read and parse a row, and mark its banned spans. Raises InvalidRow or Violation."""
        self._refuse_long_turns(index)
        row = self.read_row(index)
        refuse_verdict(row)
        # With pair constraints a row may lack a rejected side: the base model will generate it.
        is_pair = self.format in SIDE_READERS or not self.constraint_set.has_pair_constraints
        parse = ROW_PARSERS[self.row_kind] if is_pair else parse_row
        example = parse(row, self.format, has_template)
        if not self.constraint_set.constraints and not example.negative:
            return example
        return self.constraint_set.mark_violations(example)

    def _refuse_long_turns(self, index: int) -> None:
        num_bytes = self.source.get_num_bytes(index)
        if self.format == "text" or num_bytes <= MAX_TURNS_BYTES:
            return
        message = (
            f"the row has {num_bytes:,} bytes; at most {MAX_TURNS_BYTES >> 20} MiB of a "
            f"{self.format} row are read"
        )
        fix = f"split or remove it; a row of plain `text` may have {MAX_ROW_BYTES >> 20} MiB"
        raise InvalidRow("too long", message, where=self.source.get_id(index), fix=fix)


@dataclass(frozen=True, eq=False)
class Dataset:
    """N rows of one role. Digests ignore differences in white space."""

    parts: tuple[DataSourceReader, ...]
    renderer: Renderer
    part_N: np.ndarray  # int32, index into parts
    row_N: np.ndarray  # int64, index of the row in its part
    contents_N: np.ndarray  # uint64, digest of the full row without its rejected side
    prompts_N: np.ndarray  # uint64, digest of everything before the last answer
    shapes_N: np.ndarray  # uint16, rows of one shape look alike to a chat template
    rejected_rows: RejectedRows  # invalid rows of the files, not among the N
    violations: RejectedRows  # rows excluded by a constraint, which is not an error
    constraint_counts: ConstraintCounts
    max_length: int | None = None  # tokens per document
    on_overlong: OverlongPolicy = "drop"
    skip_invalid: bool = False  # a row that cannot be rendered becomes an empty slot
    # Row -> the row with its generated rejected side, once the sides are generated.
    synthetic: Mapping[int, Example] | None = None

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def has_pairs(self) -> bool:
        return any(part.has_pairs for part in self.parts)

    @property
    def has_labels(self) -> bool:
        return any(part.row_kind == "labelled" for part in self.parts)

    @property
    def is_trained(self) -> bool:
        return not any(part.constraint_set.is_held_out for part in self.parts)

    @property
    def tasks(self) -> dict[str, int]:
        """The number of rows of each named task, in the order of the files."""
        tasks: dict[str, int] = {}
        counts = np.bincount(self.part_N, minlength=len(self.parts)).tolist()
        for part, count in zip(self.parts, counts, strict=True):
            if part.task and count:
                tasks[part.task] = count
        return tasks

    @property
    def unmatched_bans(self) -> list[str]:
        """The names of `ban` constraints that no row breaks."""
        for part in self.parts:
            constraint_set = part.constraint_set
            if constraint_set.can_ban and not constraint_set.is_held_out:
                bans = [each.name for each in constraint_set.constraints if each.mode == "ban"]
                return [name for name in bans if name not in self.constraint_counts.banned]
        return []

    @property
    def path(self) -> str:
        return ", ".join(format_path(part.source.path) for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """The sha256 of the file; for several files, the sha256 of their sha256."""
        fingerprints = [part.source.fingerprint for part in self.parts]
        if len(fingerprints) == 1:
            return fingerprints[0]
        return hashlib.sha256("".join(fingerprints).encode()).hexdigest()

    def get_part(self, index: int) -> DataSourceReader:
        """Return the file of a row."""
        return self.parts[self.part_N[index]]

    def get_id(self, index: int) -> str:
        """Return the id of a row, such as `train.jsonl:7`."""
        return self.get_part(index).source.get_id(self.row_N[index])

    def get_row_bytes(self, index: int) -> int:
        """Return the length of a row in its file, in bytes."""
        return self.get_part(index).source.get_num_bytes(self.row_N[index])

    def read_row(self, index: int) -> Row:
        """Read a row with its columns renamed and its prompt built."""
        return self.get_part(index).read_row(self.row_N[index])

    def read_example(self, index: int) -> Example:
        """Read and parse a row, with its generated rejected side if there is one."""
        example = self.get_part(index).read_example(self.row_N[index], self.renderer.has_template)
        return example if self.synthetic is None else self.synthetic.get(index, example)

    def render_rows(self, indices: Sequence[int]) -> list[RenderedRow]:
        """Render many rows for `render_row`; their text is encoded in one batch, on all cores."""
        return self.renderer.render_rows([self.read_example(index) for index in indices])

    def render_row(
        self, index: int, rendered: RenderedRow | None = None
    ) -> tuple[Example, PreparedRow]:
        """Render one row, unless it is `rendered` already, and apply the over-long policy.

        A row that cannot be rendered has a `problem` and no documents. Raises InputError for a
        document over max_length if the policy is `refuse`."""
        example = self.read_example(index) if rendered is None else rendered.example
        if self.synthetic is not None and example.rejected is None:
            return example, PreparedRow(example.id, (), drop_reason=NO_VIOLATION)
        if rendered is None:
            (rendered,) = self.renderer.render_rows([example])
        if error := rendered.error:
            problem = InvalidRow(NOT_RENDERED, error.message, where=example.id, fix=error.fix)
            drop_reason = f"{NOT_RENDERED}: {error.message}"
            return example, PreparedRow(example.id, (), drop_reason=drop_reason, problem=problem)
        part = self.get_part(index)
        documents = scale_weights(rendered.documents, part.weight)
        if part.task:
            documents = [dataclasses.replace(each, task=part.task) for each in documents]
        # Pairs with a generated side are not cut: their chosen side fit before.
        max_length = None if self.synthetic and index in self.synthetic else self.max_length
        prepared = apply_max_length(example.id, documents, max_length, self.on_overlong)
        if 0 < len(prepared.documents) < len(documents) and example.rejected is not None:
            prepared = dataclasses.replace(prepared, documents=(), drop_reason=PAIR_TOO_LONG)
        return example, dataclasses.replace(prepared, notes=tuple(rendered.notes))

    def render_documents(self, index: int) -> tuple[Document, ...]:
        """Return the documents of a row.

        Raises InvalidRow if it cannot be rendered, unless `skip_invalid`."""
        prepared = self.render_row(index)[1]
        if prepared.problem and not self.skip_invalid:
            raise prepared.problem
        return prepared.documents

    def select_rows(self, rows_K: np.ndarray) -> Dataset:
        """Return the data set of these rows, in this order."""
        return dataclasses.replace(
            self,
            part_N=self.part_N[rows_K],
            row_N=self.row_N[rows_K],
            contents_N=self.contents_N[rows_K],
            prompts_N=self.prompts_N[rows_K],
            shapes_N=self.shapes_N[rows_K],
        )

    def with_max_length(self, max_length: int | None, on_overlong: OverlongPolicy) -> Dataset:
        """Return the same rows under another length policy."""
        return dataclasses.replace(self, max_length=max_length, on_overlong=on_overlong)


def open_dataset(
    files: Sequence[DataSource],
    renderer: Renderer,
    *,
    max_length: int | None = None,
    on_overlong: OverlongPolicy = "drop",
    max_examples: int | None = None,
    skip_invalid: bool = False,
    row_kind: RowKind = "answer",
    constraint_set: ConstraintSet = NO_CONSTRAINTS,
) -> Dataset:
    """Parse every row once and store where it is.

    `max_examples` takes the first rows of all files together. A row is an answer, a pair (a chosen
    and a rejected one), or a labelled answer. Raises InputError for an unreadable file,
    if no row is valid, and for a constraint that most answers break."""
    scanner = _DatasetScanner(renderer.has_template)
    for file, source, rows in _open_sources(files, max_examples):
        part = _build_part(file, source, rows, renderer.has_template, row_kind, constraint_set)
        scanner.scan(part, rows)
    path = ", ".join(format_path(file.path) for file in files)
    scanner.constraint_counts.refuse_broad_constraints(path)
    if not scanner.row_N:
        raise scanner.rejected_rows.build_empty_error(path)
    return Dataset(
        parts=tuple(scanner.parts),
        renderer=renderer,
        part_N=np.array(scanner.part_N, dtype=np.int32),
        row_N=np.array(scanner.row_N, dtype=np.int64),
        contents_N=np.array(scanner.contents_N, dtype=np.uint64),
        prompts_N=np.array(scanner.prompts_N, dtype=np.uint64),
        shapes_N=np.array(scanner.shapes_N, dtype=np.uint16),
        rejected_rows=scanner.rejected_rows,
        violations=scanner.violations,
        constraint_counts=scanner.constraint_counts,
        max_length=max_length,
        on_overlong=on_overlong,
        skip_invalid=skip_invalid,
    )


def _open_sources(
    files: Sequence[DataSource], max_examples: int | None
) -> Iterator[tuple[DataSource, Source | TextFolder, range]]:
    """Yield each file with the rows to read; all files of a source share its max_examples."""
    all_paths = [path for file in files for path in file.files]
    name_counts = Counter(path.name for path in all_paths)
    remaining = math.inf if max_examples is None else max_examples
    for file in files:
        file_remaining = math.inf if file.max_examples is None else file.max_examples
        for path in file.files:
            if not min(remaining, file_remaining):
                break
            is_unique_name = name_counts[path.name] == 1
            source = open_source(path, name=path.name if is_unique_name else format_path(path))
            num_rows = int(min(len(source), remaining, file_remaining))
            remaining -= num_rows
            file_remaining -= num_rows
            yield file, source, range(num_rows)


class _DatasetScanner:
    """Parses every row of the files once; the arrays have one number per valid row."""

    def __init__(self, has_template: bool) -> None:
        self.parts: list[DataSourceReader] = []
        self.part_N = array("i")
        self.row_N = array("q")
        self.contents_N = array("Q")
        self.prompts_N = array("Q")
        self.shapes_N = array("H")
        self.rejected_rows = RejectedRows()
        self.violations = RejectedRows()
        self.constraint_counts = ConstraintCounts()
        self._has_template = has_template
        self._shapes: dict[object, int] = {}  # shape -> its number

    def scan(self, part: DataSourceReader, rows: range) -> None:
        """Parse the rows of one file."""
        part_index = len(self.parts)
        self.parts.append(part)
        for row in rows:
            try:
                example = part.read_example(row, self._has_template)
            except Violation as violation:
                self.constraint_counts.count_violation(violation)
                self.violations.add(part_index, row, violation)
                continue
            except InvalidRow as problem:
                self.rejected_rows.add(part_index, row, problem)
                continue
            self.constraint_counts.count_example(example)
            content, prompt = part.compute_digests(row, example)
            shape_number = min(len(self._shapes), MAX_SHAPES)
            self.part_N.append(part_index)
            self.row_N.append(row)
            self.contents_N.append(content)
            self.prompts_N.append(prompt)
            self.shapes_N.append(self._shapes.setdefault(compute_shape(example), shape_number))


def _build_part(
    file: DataSource,
    source: Source | TextFolder,
    rows: range,
    has_template: bool,
    row_kind: RowKind,
    constraint_set: ConstraintSet,
) -> DataSourceReader:
    """Decide how the rows of a file are parsed. Raises InputError for an unknown format."""
    has_pairs = row_kind in ("pair", "labelled")
    format = file.format
    reason = "set in the recipe"
    prompt_formatter = None
    first_rows = _read_first_rows(source, rows)
    if first_rows and file.columns:
        check_columns(file.columns, first_rows, format, format_path(source.path))
        first_rows = [rename_columns(row, file.columns) for row in first_rows]
    columns: Mapping[str, str] = file.columns
    table = None
    if row_kind == "answer" and format == "auto" and not file.prompts:
        table = find_table(first_rows, has_template)
    if table:
        forms = (PromptForm(prompt=table.prompt),)
        prompt_formatter = PromptFormatter(forms, has_template, answer_column=table.answer)
        columns = table.map_columns(file.columns)
        format = "completion"
        reason = table.reason
    elif file.prompts:
        prompt_formatter, reason = make_prompt_formatter(file, first_rows, has_template)
        format = "completion"
    elif first_rows and format == "auto":
        format, reason = detect_format(first_rows, has_template, has_pairs=has_pairs)
    elif format == "auto":
        format = "text"
        reason = "no row can be read"
    elif note := get_note(format, has_pairs):
        reason += f"; {note}"
    return DataSourceReader(
        source=source,
        format=format,
        format_reason=reason,
        columns=columns,
        weight=file.weight,
        row_kind=row_kind,
        constraint_set=constraint_set,
        task=file.name,
        prompt_formatter=prompt_formatter,
        is_described=bool(file.columns or file.prompts) or file.format != "auto",
        has_classes=table is not None and table.has_classes,
    )


def _read_first_rows(source: Source | TextFolder, rows: range) -> list[Row]:
    """Return the first rows that can be decoded: a few, and not too many bytes."""
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


def raise_combined(problems: Sequence[InputError], num_rows: int, where: str) -> None:
    """Raise one error for all problems, if there are any."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    message = f"{len(problems):,} of {num_rows:,} rows cannot be used:"
    for problem in problems[:MAX_SHOWN_ERRORS]:
        message += f"\n  {problem.where}: {problem.message}"
    if len(problems) > MAX_SHOWN_ERRORS:
        message += f"\n  and {len(problems) - MAX_SHOWN_ERRORS:,} more"
    raise InputError(message, where=where, fix=problems[0].fix)
