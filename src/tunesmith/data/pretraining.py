"""The texts of a data set as windows of tokens: what continued pretraining trains on.

    Dataset of texts -> open_corpus -> Corpus; corpus.document(i) -> window i
    tokens of a step -> Stream; stream.documents_of(step) -> windows

Every text is encoded once, a part at a time, into a temporary file, so that the number of tokens
and of steps is exact, any window is one read, and memory does not grow with the texts: a few
numbers a row and a window are kept. A text ends in the separator, the tokens of its windows overlap
by one (windows.py), and nothing else stands around it."""

from __future__ import annotations

import re
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document
from tunesmith.data.chat_template.assistant_spans import CONTROL_LIKE_TEXT
from tunesmith.data.dataset import NOT_RENDERED, Dataset
from tunesmith.data.length_stats import DatasetScan, iter_batches
from tunesmith.data.readers.decompress import TempCopy
from tunesmith.data.readers.invalid_row import InvalidRow, RejectedRows
from tunesmith.data.sampler import CyclicSampler, RatioChanges, iter_ratio_segments, prefetch
from tunesmith.data.windows import count_windows, find_window

TOKEN_BYTES = 4
DENSE = "no white space"  # what marks such rows
_DENSE_RUN = re.compile(r"[!-~]{10000}")  # ASCII only: there are languages without spaces
_HALF_RUN = re.compile(r"[!-~]{5000}")


@dataclass(frozen=True, eq=False)
class PretrainingCorpus:
    """N texts, W windows."""

    dataset: Dataset
    token_file: TempCopy
    starts_N: np.ndarray  # int64, tokens in the spool before those of a text
    tokens_N: np.ndarray  # int64, 0 for a text that cannot be encoded
    max_targets: int  # of a window at most
    flagged: Mapping[str, list[str]]  # DENSE or FOREIGN -> ids of the rows
    rejected_rows: RejectedRows  # rows that cannot be encoded

    @cached_property
    def firsts_N(self) -> np.ndarray:
        """int64, number of the first window of each text, and behind the last one W."""
        counts_N = np.where(self.tokens_N > 0, count_windows(self.tokens_N, self.max_targets), 0)
        return np.concatenate(([0], np.cumsum(counts_N)))

    def __len__(self) -> int:
        return int(self.firsts_N[-1])

    @cached_property
    def lengths_W(self) -> np.ndarray:
        """int64, tokens of each window."""
        counts_N = np.diff(self.firsts_N)
        has_windows_N = counts_N > 0
        sizes_N = -(-(self.tokens_N[has_windows_N] - 1) // counts_N[has_windows_N])
        lengths_W = np.repeat(sizes_N + 1, counts_N[has_windows_N])
        lengths_W[self.firsts_N[1:][has_windows_N] - 1] = (
            self.tokens_N[has_windows_N] - (counts_N[has_windows_N] - 1) * sizes_N
        )
        return lengths_W

    def get_windows(self, row: int) -> range:
        return range(int(self.firsts_N[row]), int(self.firsts_N[row + 1]))

    def read_window(self, index: int) -> Document:
        """Window 0 .. W-1. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        row = int(np.searchsorted(self.firsts_N, index, side="right")) - 1
        begin, end = find_window(
            int(self.tokens_N[row]), self.max_targets, index - int(self.firsts_N[row])
        )
        start = int(self.starts_N[row]) + begin
        tokens_L = np.frombuffer(
            self.token_file.read(TOKEN_BYTES * start, TOKEN_BYTES * (end - begin)), dtype=np.int32
        )
        weights_L = np.full(len(tokens_L), self.dataset.get_part(row).weight, dtype=np.float32)
        weights_L[0] = 0
        return Document(self.dataset.get_id(row), tokens_L, weights_L)

    def build_scan(self) -> DatasetScan:
        """All rows, as the data check wants to see them: the documents are the windows."""
        notes = (
            {CONTROL_LIKE_TEXT: self.flagged[CONTROL_LIKE_TEXT]}
            if CONTROL_LIKE_TEXT in self.flagged
            else {}
        )
        flagged = {DENSE: self.flagged[DENSE]} if DENSE in self.flagged else {}
        rows_R = np.arange(len(self.dataset))
        num_supervised = int(self.lengths_W.sum()) - len(self)
        return DatasetScan(
            rows_R,
            self.lengths_W,
            num_supervised,
            0,
            {},
            flagged,
            notes,
            self.rejected_rows,
            RejectedRows(),
            scanned_share=1,
        )


def open_corpus(dataset: Dataset, window_tokens: int) -> PretrainingCorpus:
    """Encode every text of a data set. `window`: tokens of a window at most. Raises MachineError
    without room for the temporary file."""
    token_file, starts, ends = TempCopy(Path(dataset.path), sys.maxsize), array("q"), array("q")
    flagged, rejected_rows = defaultdict[str, list[str]](list), RejectedRows()
    num_tokens = 0
    for row, text, parts in _iter_texts(dataset):
        starts.append(num_tokens)
        try:
            for part in parts:
                token_file.write(np.array(part, dtype=np.int32).tobytes())
                num_tokens += len(part)
        except InputError as problem:
            rejected_rows.count(
                InvalidRow(
                    NOT_RENDERED, problem.message, where=dataset.get_id(row), fix=problem.fix
                )
            )
            ends.append(starts[-1])
            continue
        ends.append(num_tokens)
        if _is_dense(text):
            flagged[DENSE].append(dataset.get_id(row))
        if dataset.renderer.tokenizer.pattern.search(text):
            flagged[CONTROL_LIKE_TEXT].append(dataset.get_id(row))
    token_file.flush()
    starts_N = np.array(starts, dtype=np.int64)
    return PretrainingCorpus(
        dataset,
        token_file,
        starts_N,
        np.array(ends) - starts_N,
        window_tokens - 1,
        flagged,
        rejected_rows,
    )


def _iter_texts(
    dataset: Dataset,
) -> Iterator[tuple[int, str, Iterator[Sequence[int] | np.ndarray]]]:
    """(row, text, its tokens part by part) of every row; those of a batch are encoded together, on
    all cores, while the batch before is written."""

    def encode_batch(
        batch: list[int],
    ) -> Iterator[tuple[int, str, Iterator[Sequence[int] | np.ndarray]]]:
        texts = [dataset.read_example(row).text or "" for row in batch]
        return zip(batch, texts, dataset.renderer.iter_texts_ids(texts), strict=True)

    yield from chain.from_iterable(
        prefetch(iter_batches(dataset, range(len(dataset))), encode_batch)
    )


def _is_dense(text: str) -> bool:
    """A run that long holds one half as long that begins at a multiple of 5,000, which is quickly
    seen."""
    return any(_HALF_RUN.match(text, start) for start in range(0, len(text), 5000)) and bool(
        _DENSE_RUN.search(text)
    )


@dataclass(frozen=True, eq=False)
class WindowSampler:
    """The windows of every step: of its `step_tokens` it takes what rehearsal leaves, up to half a
    window, from passes over all windows in random order. The last step takes what is left of the
    epochs; where the ratio of the rehearsal changes on the way, it is the number of steps that
    stays."""

    corpus: PretrainingCorpus
    sampler: CyclicSampler
    step_tokens: float
    total_tokens: float  # of the epochs
    rehearsal_ratio: float  # that rehearsal takes, from the first step on

    @classmethod
    def from_corpus(
        cls,
        corpus: PretrainingCorpus,
        *,
        step_tokens: float,
        epochs: float,
        seed: int,
        rehearsal_ratio: float = 0,
    ) -> WindowSampler:
        sampler = CyclicSampler(corpus.lengths_W, seed)
        return cls(
            corpus, sampler, step_tokens, epochs * float(corpus.lengths_W.sum()), rehearsal_ratio
        )

    def read_documents(self, step: int, ratio_changes: RatioChanges = ()) -> list[Document]:
        """The windows of step 1.., a pure function of the texts and the arguments; behind the
        epochs there are none."""
        positions = range(
            *(
                self.sampler.count_due_items(self._compute_due_tokens(steps, ratio_changes))
                for steps in (step - 1, step)
            )
        )
        return [
            self.corpus.read_window(self.sampler.get_item(position)[1]) for position in positions
        ]

    def _compute_due_tokens(self, step: int, ratio_changes: RatioChanges) -> float:
        """Tokens of the data up to `step`."""
        due_tokens = sum(
            steps * self.step_tokens * (1 - ratio)
            for steps, ratio in iter_ratio_segments(step, self.rehearsal_ratio, ratio_changes)
        )
        return due_tokens if ratio_changes else min(self.total_tokens, due_tokens)
