"""The texts of a data set as windows of tokens: what continued pretraining trains on.

    Dataset of texts -> open_corpus -> Corpus; corpus.document(i) -> window i
    tokens of a step -> Stream; stream.documents_of(step) -> windows

Every text is encoded once, a part at a time, into a temporary file, so that the number of tokens and of steps is exact,
any window is one read, and memory does not grow with the texts: a few numbers a row and a window are kept. A text ends
in the separator, the tokens of its windows overlap by one (windows.py), and nothing else stands around it.
"""

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
from tunesmith.data.chat_template.assistant_spans import FOREIGN
from tunesmith.data.dataset import NOT_RENDERED, Dataset
from tunesmith.data.length_stats import Scan, batches
from tunesmith.data.readers.decompress import Spool
from tunesmith.data.readers.invalid_row import BadRow, Rejects
from tunesmith.data.sampler import Changes, Passes, prefetch, spans
from tunesmith.data.windows import span, window_counts

TOKEN_BYTES = 4
DENSE = "no white space"  # what marks such rows
_DENSE = re.compile(r"[!-~]{10000}")  # ASCII only: there are languages without spaces
_HALF = re.compile(r"[!-~]{5000}")


@dataclass(frozen=True, eq=False)
class Corpus:
    """N texts, W windows."""

    rows: Dataset
    spool: Spool
    starts_N: np.ndarray  # int64, tokens in the spool before those of a text
    tokens_N: np.ndarray  # int64, 0 for a text that cannot be encoded
    targets: int  # of a window at most
    marked: Mapping[str, list[str]]  # DENSE or FOREIGN -> ids of the rows
    rejects: Rejects  # rows that cannot be encoded

    @cached_property
    def firsts_N(self) -> np.ndarray:
        """int64, number of the first window of each text, and behind the last one W."""
        counts_N = np.where(self.tokens_N > 0, window_counts(self.tokens_N, self.targets), 0)
        return np.concatenate(([0], np.cumsum(counts_N)))

    def __len__(self) -> int:
        return int(self.firsts_N[-1])

    @cached_property
    def lengths_W(self) -> np.ndarray:
        """int64, tokens of each window."""
        counts_N = np.diff(self.firsts_N)
        used = counts_N > 0
        sizes_N = -(-(self.tokens_N[used] - 1) // counts_N[used])
        lengths_W = np.repeat(sizes_N + 1, counts_N[used])
        lengths_W[self.firsts_N[1:][used] - 1] = self.tokens_N[used] - (counts_N[used] - 1) * sizes_N
        return lengths_W

    def windows_of(self, row: int) -> range:
        return range(int(self.firsts_N[row]), int(self.firsts_N[row + 1]))

    def document(self, number: int) -> Document:
        """Window 0 .. W-1. Raises IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        row = int(np.searchsorted(self.firsts_N, number, side="right")) - 1
        begin, end = span(int(self.tokens_N[row]), self.targets, number - int(self.firsts_N[row]))
        start = int(self.starts_N[row]) + begin
        tokens_L = np.frombuffer(self.spool.read(TOKEN_BYTES * start, TOKEN_BYTES * (end - begin)), dtype=np.int32)
        weights_L = np.full(len(tokens_L), self.rows.part(row).weight, dtype=np.float32)
        weights_L[0] = 0
        return Document(self.rows.id(row), tokens_L, weights_L)

    def scan(self) -> Scan:
        """All rows, as the data check wants to see them: the documents are the windows."""
        notes = {FOREIGN: self.marked[FOREIGN]} if FOREIGN in self.marked else {}
        marked = {DENSE: self.marked[DENSE]} if DENSE in self.marked else {}
        rows_R = np.arange(len(self.rows))
        supervised = int(self.lengths_W.sum()) - len(self)
        return Scan(rows_R, self.lengths_W, supervised, 0, {}, marked, notes, self.rejects, Rejects(), share=1)


def open_corpus(rows: Dataset, window: int) -> Corpus:
    """Encode every text of a data set. `window`: tokens of a window at most. Raises MachineError without room for the
    temporary file."""
    spool, starts, ends = Spool(Path(rows.path), sys.maxsize), array("q"), array("q")
    marked, rejects = defaultdict[str, list[str]](list), Rejects()
    written = 0
    for row, text, parts in _texts(rows):
        starts.append(written)
        try:
            for part in parts:
                spool.write(np.array(part, dtype=np.int32).tobytes())
                written += len(part)
        except InputError as problem:
            rejects.count(BadRow(NOT_RENDERED, problem.what, where=rows.id(row), fix=problem.fix))
            ends.append(starts[-1])
            continue
        ends.append(written)
        if _dense(text):
            marked[DENSE].append(rows.id(row))
        if rows.renderer.tokenizer.pattern.search(text):
            marked[FOREIGN].append(rows.id(row))
    spool.flush()
    starts_N = np.array(starts, dtype=np.int64)
    return Corpus(rows, spool, starts_N, np.array(ends) - starts_N, window - 1, marked, rejects)


def _texts(rows: Dataset) -> Iterator[tuple[int, str, Iterator[Sequence[int] | np.ndarray]]]:
    """(row, text, its tokens part by part) of every row; those of a batch are encoded together, on all cores, while the
    batch before is written."""

    def encoded(batch: list[int]) -> Iterator[tuple[int, str, Iterator[Sequence[int] | np.ndarray]]]:
        texts = [rows.example(row).text or "" for row in batch]
        return zip(batch, texts, rows.renderer.many_texts(texts), strict=True)

    yield from chain.from_iterable(prefetch(batches(rows, range(len(rows))), encoded))


def _dense(text: str) -> bool:
    """A run that long holds one half as long that begins at a multiple of 5,000, which is quickly seen."""
    return any(_HALF.match(text, start) for start in range(0, len(text), 5000)) and bool(_DENSE.search(text))


@dataclass(frozen=True, eq=False)
class Stream:
    """The windows of every step: of its `step_tokens` it takes what rehearsal leaves, up to half a window, from passes
    over all windows in random order. The last step takes what is left of the epochs; where the ratio of the rehearsal
    changes on the way, it is the number of steps that stays."""

    corpus: Corpus
    passes: Passes
    step_tokens: float
    all_tokens: float  # of the epochs
    ratio: float  # that rehearsal takes, from the first step on

    @classmethod
    def of(cls, corpus: Corpus, *, step_tokens: float, epochs: float, seed: int, ratio: float = 0) -> Stream:
        passes = Passes(corpus.lengths_W, seed)
        return cls(corpus, passes, step_tokens, epochs * float(corpus.lengths_W.sum()), ratio)

    def documents_of(self, step: int, changes: Changes = ()) -> list[Document]:
        """The windows of step 1.., a pure function of the texts and the arguments; behind the epochs there are none."""
        places = range(*(self.passes.taken(self._due(done, changes)) for done in (step - 1, step)))
        return [self.corpus.document(self.passes.item(place)[1]) for place in places]

    def _due(self, step: int, changes: Changes) -> float:
        """Tokens of the data up to `step`."""
        due = sum(steps * self.step_tokens * (1 - ratio) for steps, ratio in spans(step, self.ratio, changes))
        return due if changes else min(self.all_tokens, due)
