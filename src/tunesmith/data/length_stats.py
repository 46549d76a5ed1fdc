"""Render the rows of a data set once: their lengths, what is lost, and unusual rows.

    Dataset -> scan_dataset -> DatasetScan -> the numbers of a DataReport

Up to `MAX_FULL_SCAN_ROWS` rows are all rendered. A larger data set is sampled (`SAMPLE_ROWS` rows,
always the same), and totals are estimates, which the report says. In addition one row of each shape
is rendered, since a template that refuses one refuses them all. With `on_overlong: refuse` all rows
are rendered, since any may be refused."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example
from tunesmith.data.chat_template.renderer import RenderedRow
from tunesmith.data.dataset import Dataset, raise_combined
from tunesmith.data.readers.invalid_row import RejectedRows
from tunesmith.data.sampler import permute_rows
from tunesmith.data.truncation import PreparedRow

MAX_FULL_SCAN_ROWS = 20_000
SAMPLE_ROWS = 2_000
# Rows and bytes of text that are encoded together.
BATCH_ROWS = 256
NUM_LENGTH_BINS = 12
BATCH_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class DatasetScan:
    """Counts and lengths of the scanned rows."""

    rows_R: np.ndarray  # indices of the scanned rows, ascending
    lengths_D: np.ndarray  # tokens of each document, after truncation
    supervised_tokens: int
    num_truncated: int  # documents
    dropped: Mapping[str, list[str]]  # reason -> ids of rows without documents
    flagged: Mapping[str, list[str]]  # overlong | answer too long | no system | ... -> row ids
    notes: Mapping[str, list[str]]  # remark of the renderer -> row ids
    rejected_rows: RejectedRows  # rows that cannot be rendered
    rare_rejected_rows: RejectedRows  # the same, in shapes missing in the sample: a lower bound
    scanned_share: float  # scanned rows over all rows
    # Tokens by task of the documents, "" for no task.
    task_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    first_document: Document | None = None  # of the first scanned row that has one

    def estimate_total(self, count: int) -> int:
        """Extrapolate a count from the scanned rows to all rows."""
        return round(count / self.scanned_share)


def scan_dataset(dataset: Dataset) -> DatasetScan:
    """Render the rows, or a sample of them.

    Raises InputError with the number of refused rows under `on_overlong: refuse`."""
    rows_R = select_scan_rows(dataset)
    lengths: list[int] = []
    num_supervised = 0
    num_truncated = 0
    task_tokens: Counter[str] = Counter()
    first_document: Document | None = None
    dropped: defaultdict[str, list[str]] = defaultdict(list)
    flagged: defaultdict[str, list[str]] = defaultdict(list)
    notes: defaultdict[str, list[str]] = defaultdict(list)
    rejected_rows = RejectedRows()
    problems: list[InputError] = []
    for row, rendered in _iter_rendered(dataset, rows_R.tolist()):
        try:
            example, prepared = dataset.render_row(row, rendered)
        except InputError as problem:
            problems.append(problem)
            continue
        if prepared.problem:
            rejected_rows.count(prepared.problem)
            continue
        for document in prepared.documents:
            lengths.append(len(document))
            task_tokens[document.task] += len(document)
            first_document = first_document or document
            num_supervised += int(np.count_nonzero(document.weights_L))
        num_truncated += prepared.num_truncated
        if prepared.drop_reason:
            dropped[prepared.drop_reason].append(prepared.id)
        for flag in _iter_flags(example, prepared):
            flagged[flag].append(prepared.id)
        for note in prepared.notes:
            notes[note].append(prepared.id)
    raise_combined(problems, len(rows_R), dataset.path)
    rare_rejected_rows = RejectedRows()
    for row in find_rare_rows(dataset, rows_R).tolist():
        if problem := dataset.with_max_length(None, "drop").render_row(row)[1].problem:
            rare_rejected_rows.count(problem)
    return DatasetScan(
        rows_R=rows_R,
        lengths_D=np.array(lengths, np.int64),
        supervised_tokens=num_supervised,
        num_truncated=num_truncated,
        dropped=dropped,
        flagged=flagged,
        notes=notes,
        rejected_rows=rejected_rows,
        rare_rejected_rows=rare_rejected_rows,
        scanned_share=len(rows_R) / max(1, len(dataset)),
        task_tokens=task_tokens,
        first_document=first_document,
    )


def find_rare_rows(dataset: Dataset, rows_R: np.ndarray) -> np.ndarray:
    """Return the first row of each shape, at most `SAMPLE_ROWS`, without those in `rows_R`."""
    _, first_S = np.unique(dataset.shapes_N, return_index=True)
    return np.setdiff1d(first_S[:SAMPLE_ROWS], rows_R)


def _iter_rendered(dataset: Dataset, rows: Sequence[int]) -> Iterator[tuple[int, RenderedRow]]:
    for batch in iter_batches(dataset, rows):
        yield from zip(batch, dataset.render_rows(batch), strict=True)


def iter_batches(dataset: Dataset, rows: Sequence[int]) -> Iterator[list[int]]:
    """Yield batches of rows to encode together."""
    batch: list[int] = []
    size_bytes = 0
    for row in rows:
        batch.append(row)
        size_bytes += dataset.get_row_bytes(row)
        if len(batch) == BATCH_ROWS or size_bytes > BATCH_BYTES:
            yield batch
            batch = []
            size_bytes = 0
    if batch:
        yield batch


def select_scan_rows(dataset: Dataset) -> np.ndarray:
    """Return the rows that a scan renders, ascending."""
    if len(dataset) > MAX_FULL_SCAN_ROWS and dataset.on_overlong != "refuse":
        return np.sort(permute_rows(0, 0, len(dataset))[:SAMPLE_ROWS])
    return np.arange(len(dataset))


def iter_documents(dataset: Dataset) -> Iterator[Document]:
    """Yield the documents of all rows, in the order of the rows."""
    for row, rendered in _iter_rendered(dataset, range(len(dataset))):
        yield from dataset.render_row(row, rendered)[1].documents


def render_first_documents(
    dataset: Dataset, permutation_N: np.ndarray
) -> list[tuple[Document, ...]]:
    """Return the documents of each of the first rows of a run: one batch of rows, in its order."""
    rows = next(iter_batches(dataset, permutation_N.tolist()), [])
    documents: list[tuple[Document, ...]] = []
    for row, rendered in zip(rows, dataset.render_rows(rows), strict=True):
        documents.append(dataset.render_row(row, rendered)[1].documents)
    return documents


def _iter_flags(example: Example, prepared: PreparedRow) -> Iterable[str]:
    if prepared.num_overlong:
        yield "overlong"
    if prepared.is_answer_too_long:
        yield "answer too long"
    roles = {message["role"] for message in example.messages}
    if example.messages:
        yield "system" if roles & {"system", "developer"} else "no system"
    user_texts = [each["content"] for each in example.messages if each["role"] == "user"]
    if not all(text.strip() for text in user_texts):
        yield "empty prompt"


def count_lengths(lengths_D: np.ndarray) -> dict[str, int]:
    """Return the documents of each of at most NUM_LENGTH_BINS bins of equal width, by the longest
    length of the bin; {} without documents."""
    if not len(lengths_D):
        return {}
    width = -(-int(lengths_D.max()) // NUM_LENGTH_BINS)
    counts = np.bincount((lengths_D - 1).clip(0) // width)
    return {str((n + 1) * width): int(count) for n, count in enumerate(counts)}


def compute_percentiles(lengths_D: np.ndarray) -> dict[str, int]:
    """Return p50, p90, p99 and max, each the length of a real document; {} without documents."""
    if not len(lengths_D):
        return {}
    p50, p90, p99, maximum = np.percentile(lengths_D, [50, 90, 99, 100], method="higher")
    return {"p50": int(p50), "p90": int(p90), "p99": int(p99), "max": int(maximum)}
