"""One look at the rendered rows of a data set: how long they are, what is lost, which rows stand
out.

    Dataset -> Scan -> the numbers of a DataReport

Up to `ALL_ROWS` rows are rendered; of more, a fixed sample of `SAMPLE` rows, and the totals are
estimates (the report says so). Besides the sample one row of each shape is rendered, since a
template that refuses one refuses all of them. With `overlong: refuse` all rows are rendered, since
each may refuse."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example
from tunesmith.data.chat_template.renderer import RenderDraft
from tunesmith.data.dataset import Dataset, raise_combined
from tunesmith.data.readers.invalid_row import RejectedRows
from tunesmith.data.sampler import permutation
from tunesmith.data.truncation import PreparedRow

MAX_FULL_SCAN_ROWS = 20_000
SAMPLE_ROWS = 2_000
BATCH_ROWS, BATCH_BYTES = 256, 2**20  # how much text is encoded together


@dataclass(frozen=True, eq=False)
class DatasetScan:
    """What was seen in the scanned rows. `marked` names the rows that have something to say, by
    kind."""

    rows_R: np.ndarray  # indices of the scanned rows, ascending
    lengths_D: np.ndarray  # tokens of each document, as rendered and cut
    supervised_tokens: int
    num_truncated: int  # documents
    dropped: Mapping[str, list[str]]  # reason -> ids of the rows without a document
    flagged: Mapping[str, list[str]]  # overlong | answer too long | no system | empty prompt -> ids
    notes: Mapping[str, list[str]]  # what the render said -> ids
    rejected_rows: RejectedRows  # rows that cannot be rendered
    rare_rejected_rows: RejectedRows  # the same, of shapes that the sample lacks: at least so many
    scanned_share: float  # of the rows, that were scanned
    task_tokens: Mapping[str, int] = field(
        default_factory=dict[str, int]
    )  # of the documents of each task, "" without a name

    def estimate_total(self, count: int) -> int:
        """A count in the scanned rows, as an estimate for all rows."""
        return round(count / self.scanned_share)


def scan_dataset(dataset: Dataset) -> DatasetScan:
    """Render the rows, or a sample. Raises InputError that counts the rows which `overlong: refuse`
    refuses."""
    rows_R = select_scan_rows(dataset)
    lengths: list[int] = []
    num_supervised = num_truncated = 0
    task_tokens: Counter[str] = Counter()
    dropped, flagged, notes = (defaultdict[str, list[str]](list) for _ in range(3))
    rejected_rows = RejectedRows()
    problems: list[InputError] = []
    for row, draft in _iter_drafts(dataset, rows_R.tolist()):
        try:
            example, prepared = dataset.render_row(row, draft)
        except InputError as problem:
            problems.append(problem)
            continue
        if prepared.problem:
            rejected_rows.count(prepared.problem)
            continue
        lengths += [len(document) for document in prepared.documents]
        for document in prepared.documents:
            task_tokens[document.task] += len(document)
        num_supervised += sum(
            int(np.count_nonzero(document.weights_L)) for document in prepared.documents
        )
        num_truncated += prepared.num_truncated
        if prepared.drop_reason:
            dropped[prepared.drop_reason].append(prepared.id)
        for flag in _iter_flags(example, prepared):
            flagged[flag].append(prepared.id)
        for note in prepared.notes:
            notes[note].append(prepared.id)
    raise_combined(problems, len(rows_R), dataset.path)
    scanned_share = len(rows_R) / max(1, len(dataset))
    rare_rejected_rows = _check_rare_rows(dataset, rows_R)
    return DatasetScan(
        rows_R,
        np.array(lengths, np.int64),
        num_supervised,
        num_truncated,
        dropped,
        flagged,
        notes,
        rejected_rows,
        rare_rejected_rows,
        scanned_share,
        task_tokens,
    )


def _check_rare_rows(dataset: Dataset, rows_R: np.ndarray) -> RejectedRows:
    rejected_rows = RejectedRows()
    for row in find_rare_rows(dataset, rows_R).tolist():
        if problem := dataset.with_max_length(None, "drop").prepare_row(row).problem:
            rejected_rows.count(problem)
    return rejected_rows


def find_rare_rows(dataset: Dataset, rows_R: np.ndarray) -> np.ndarray:
    """The first row of each shape, a sample's worth at most, without those that are looked at
    anyway."""
    _, first_S = np.unique(dataset.shapes_N, return_index=True)
    return np.setdiff1d(first_S[:SAMPLE_ROWS], rows_R)


def _iter_drafts(dataset: Dataset, rows: Sequence[int]) -> Iterator[tuple[int, RenderDraft]]:
    for batch in iter_batches(dataset, rows):
        yield from zip(batch, dataset.build_drafts(batch), strict=True)


def iter_batches(dataset: Dataset, rows: Sequence[int]) -> Iterator[list[int]]:
    """Rows whose text is encoded together."""
    batch: list[int] = []
    size_bytes = 0
    for row in rows:
        batch.append(row)
        size_bytes += dataset.get_row_bytes(row)
        if len(batch) == BATCH_ROWS or size_bytes > BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def select_scan_rows(dataset: Dataset) -> np.ndarray:
    """Which rows a scan looks at, ascending."""
    if len(dataset) > MAX_FULL_SCAN_ROWS and dataset.overlong != "refuse":
        return np.sort(permutation(0, 0, len(dataset))[:SAMPLE_ROWS])
    return np.arange(len(dataset))


def iter_documents(dataset: Dataset) -> Iterator[Document]:
    """Of all rows, in their order."""
    for row, draft in _iter_drafts(dataset, range(len(dataset))):
        yield from dataset.render_row(row, draft)[1].documents


def render_first_documents(
    dataset: Dataset, permutation_N: np.ndarray
) -> list[tuple[Document, ...]]:
    """The documents of a run's first rows, in its order: as many rows as are encoded together."""
    rows = next(iter_batches(dataset, permutation_N.tolist()), [])
    drafts = zip(rows, dataset.build_drafts(rows), strict=True)
    return [dataset.render_row(row, draft)[1].documents for row, draft in drafts]


def _iter_flags(example: Example, prepared: PreparedRow) -> Iterable[str]:
    if prepared.num_overlong:
        yield "overlong"
    if prepared.is_answer_too_long:
        yield "answer too long"
    if example.messages and not any(
        message["role"] in ("system", "developer") for message in example.messages
    ):
        yield "no system"
    if any(
        message["role"] == "user" and not message["content"].strip() for message in example.messages
    ):
        yield "empty prompt"


def compute_percentiles(lengths_D: np.ndarray) -> dict[str, int]:
    """p50, p90, p99 and max, each the length of a real document; empty without documents."""
    if not len(lengths_D):
        return {}
    p50, p90, p99, maximum = np.percentile(lengths_D, [50, 90, 99, 100], method="higher")
    return {"p50": int(p50), "p90": int(p90), "p99": int(p99), "max": int(maximum)}
