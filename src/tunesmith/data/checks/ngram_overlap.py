"""Passages of held-out rows that stand word by word in rows that are trained.

    held-out rows -> Passages; .meet(words of a training row) ...; .found() -> Parts

A passage is GRAM words long (GPT-3's measure of contamination, arXiv 2005.14165, appendix C). Of more than MOST of them
every k-th hash is kept, on both sides the same, so that memory is bounded and shares stay right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tunesmith.data.checks.ngrams import all_grams, outside

GRAM = 13
MOSTLY = 0.5  # of a row's passages: it is a copy
MOST = 2**24


@dataclass(frozen=True, eq=False)
class Parts:
    share_N: np.ndarray  # float, of the passages of each held-out row those that are trained
    trained_contents: np.ndarray  # uint64, digests of the rows that were met


class Passages:
    """Those of the rows of one role."""

    def __init__(self, rows: Iterable[list[np.ndarray]], common: np.ndarray) -> None:
        """`rows`: the words of each text of each row. `common`: passages that most rows have, which count for none."""
        self.common, self.every = common, np.uint64(1)
        kept: list[tuple[int, np.ndarray]] = []
        size = self.rows = 0
        for texts in rows:
            grams = self._kept(self._long(texts))
            if len(grams):
                kept.append((self.rows, grams))
            self.rows, size = self.rows + 1, size + len(grams)
            if size > MOST:
                self.every *= np.uint64(2)
                kept = [(row, self._kept(grams)) for row, grams in kept]
                size = sum(len(grams) for _, grams in kept)
        self.owner_P = np.repeat([row for row, _ in kept], [len(grams) for _, grams in kept]).astype(np.int64)
        every = np.concatenate([grams for _, grams in kept]) if kept else np.empty(0, dtype=np.uint64)
        self.grams_Q, self.which_P = np.unique(every, return_inverse=True)
        self.met_Q = np.zeros(len(self.grams_Q), dtype=bool)

    def _long(self, texts: Iterable[np.ndarray]) -> np.ndarray:
        return outside(all_grams((words for words in texts if len(words) >= GRAM), GRAM), self.common)

    def _kept(self, grams: np.ndarray) -> np.ndarray:
        return grams if self.every == 1 else grams[grams % self.every == 0]

    def meet(self, texts: Iterable[np.ndarray]) -> None:
        """The words of a row that is trained."""
        if not len(self.grams_Q):
            return
        grams = self._kept(self._long(texts))
        places = np.searchsorted(self.grams_Q, grams)
        places[places == len(self.grams_Q)] = 0
        self.met_Q[places[self.grams_Q[places] == grams]] = True

    def found(self, trained_contents: np.ndarray) -> Parts:
        met_N = np.bincount(self.owner_P, self.met_Q[self.which_P], minlength=self.rows)
        return Parts(met_N / np.maximum(1, np.bincount(self.owner_P, minlength=self.rows)), trained_contents)
