"""One look at the rendered rows of a data set: how long they are, what is lost, which rows stand out.

    Dataset -> Scan -> the numbers of a DataReport

Up to `ALL_ROWS` rows are rendered; of more, a fixed sample of `SAMPLE` rows, and the totals are estimates (the report
says so). Besides the sample one row of each shape is rendered, since a template that refuses one refuses all of them.
With `overlong: refuse` all rows are rendered, since each may refuse.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example
from tunesmith.data.chat_template.renderer import Draft
from tunesmith.data.dataset import Dataset, raise_all
from tunesmith.data.readers.invalid_row import Rejects
from tunesmith.data.sampler import order
from tunesmith.data.truncation import Prepared

ALL_ROWS = 20_000
SAMPLE = 2_000
BATCH_ROWS, BATCH_BYTES = 256, 2**20  # how much text is encoded together


@dataclass(frozen=True, eq=False)
class Scan:
    """What was seen in the scanned rows. `marked` names the rows that have something to say, by kind."""

    rows_R: np.ndarray  # indices of the scanned rows, ascending
    lengths_D: np.ndarray  # tokens of each document, as rendered and cut
    supervised_tokens: int
    truncated: int  # documents
    dropped: Mapping[str, list[str]]  # reason -> ids of the rows without a document
    marked: Mapping[str, list[str]]  # overlong | answer too long | no system | empty prompt -> ids
    notes: Mapping[str, list[str]]  # what the render said -> ids
    rejects: Rejects  # rows that cannot be rendered
    rare: Rejects  # the same, of shapes that the sample lacks: at least so many
    share: float  # of the rows, that were scanned
    task_tokens: Mapping[str, int] = field(
        default_factory=dict[str, int]
    )  # of the documents of each task, "" without a name

    def scaled(self, count: int) -> int:
        """A count in the scanned rows, as an estimate for all rows."""
        return round(count / self.share)


def scan(dataset: Dataset) -> Scan:
    """Render the rows, or a sample. Raises InputError that counts the rows which `overlong: refuse` refuses."""
    rows_R = scanned_rows(dataset)
    lengths: list[int] = []
    supervised = truncated = 0
    task_tokens: Counter[str] = Counter()
    dropped, marked, notes = (defaultdict[str, list[str]](list) for _ in range(3))
    rejects = Rejects()
    problems: list[InputError] = []
    for row, draft in _drafts(dataset, rows_R.tolist()):
        try:
            example, prepared = dataset.understand(row, draft)
        except InputError as problem:
            problems.append(problem)
            continue
        if prepared.problem:
            rejects.count(prepared.problem)
            continue
        lengths += [len(document) for document in prepared.documents]
        for document in prepared.documents:
            task_tokens[document.task] += len(document)
        supervised += sum(int(np.count_nonzero(document.weights_L)) for document in prepared.documents)
        truncated += prepared.truncated
        if prepared.dropped:
            dropped[prepared.dropped].append(prepared.id)
        for mark in _marks(example, prepared):
            marked[mark].append(prepared.id)
        for note in prepared.notes:
            notes[note].append(prepared.id)
    raise_all(problems, len(rows_R), dataset.path)
    share = len(rows_R) / max(1, len(dataset))
    rare = _rare(dataset, rows_R)
    return Scan(
        rows_R,
        np.array(lengths, np.int64),
        supervised,
        truncated,
        dropped,
        marked,
        notes,
        rejects,
        rare,
        share,
        task_tokens,
    )


def _rare(dataset: Dataset, rows_R: np.ndarray) -> Rejects:
    rejects = Rejects()
    for row in rare_rows(dataset, rows_R).tolist():
        if problem := dataset.limited(None, "drop").prepare(row).problem:
            rejects.count(problem)
    return rejects


def rare_rows(dataset: Dataset, rows_R: np.ndarray) -> np.ndarray:
    """The first row of each shape, a sample's worth at most, without those that are looked at anyway."""
    _, first_S = np.unique(dataset.shapes_N, return_index=True)
    return np.setdiff1d(first_S[:SAMPLE], rows_R)


def _drafts(dataset: Dataset, rows: Sequence[int]) -> Iterator[tuple[int, Draft]]:
    for batch in batches(dataset, rows):
        yield from zip(batch, dataset.drafts(batch), strict=True)


def batches(dataset: Dataset, rows: Sequence[int]) -> Iterator[list[int]]:
    """Rows whose text is encoded together."""
    batch: list[int] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += dataset.row_bytes(row)
        if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def scanned_rows(dataset: Dataset) -> np.ndarray:
    """Which rows a scan looks at, ascending."""
    if len(dataset) > ALL_ROWS and dataset.overlong != "refuse":
        return np.sort(order(0, 0, len(dataset))[:SAMPLE])
    return np.arange(len(dataset))


def every_document(dataset: Dataset) -> Iterator[Document]:
    """Of all rows, in their order."""
    for row, draft in _drafts(dataset, range(len(dataset))):
        yield from dataset.understand(row, draft)[1].documents


def first_documents(dataset: Dataset, order_N: np.ndarray) -> list[tuple[Document, ...]]:
    """The documents of a run's first rows, in its order: as many rows as are encoded together."""
    rows = next(batches(dataset, order_N.tolist()), [])
    drafts = zip(rows, dataset.drafts(rows), strict=True)
    return [dataset.understand(row, draft)[1].documents for row, draft in drafts]


def _marks(example: Example, prepared: Prepared) -> Iterable[str]:
    if prepared.overlong:
        yield "overlong"
    if prepared.answer_too_long:
        yield "answer too long"
    if example.messages and not any(message["role"] in ("system", "developer") for message in example.messages):
        yield "no system"
    if any(message["role"] == "user" and not message["content"].strip() for message in example.messages):
        yield "empty prompt"


def percentiles(lengths_D: np.ndarray) -> dict[str, int]:
    """p50, p90, p99 and max, each the length of a real document; empty without documents."""
    if not len(lengths_D):
        return {}
    p50, p90, p99, most = np.percentile(lengths_D, [50, 90, 99, 100], method="higher")
    return {"p50": int(p50), "p90": int(p90), "p99": int(p99), "max": int(most)}
