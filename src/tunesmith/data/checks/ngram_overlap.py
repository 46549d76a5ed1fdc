"""Passages of held-out rows that stand word by word in rows that are trained.

    held-out rows -> Passages; .meet(words of a training row) ...; .found() -> Parts

A passage is GRAM words long (GPT-3's measure of contamination, arXiv 2005.14165, appendix C). Of
more than MOST of them every k-th hash is kept, on both sides the same, so that memory is bounded
and shares stay right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tunesmith.data.checks.ngrams import exclude_values, hash_unique_ngrams

NGRAM_WORDS = 13
MIN_COPY_SHARE = 0.5  # of a row's passages: it is a copy
MAX_NGRAMS = 2**24


@dataclass(frozen=True, eq=False)
class NgramOverlap:
    share_N: np.ndarray  # float, of the passages of each held-out row those that are trained
    trained_contents: np.ndarray  # uint64, digests of the rows that were met


class NgramIndex:
    """Those of the rows of one role."""

    def __init__(self, rows: Iterable[list[np.ndarray]], common: np.ndarray) -> None:
        """`rows`: the words of each text of each row. `common`: passages that most rows have, which
        count for none."""
        self.common, self.sampling_modulus = common, np.uint64(1)
        row_grams: list[tuple[int, np.ndarray]] = []
        num_grams = self.num_rows = 0
        for texts in rows:
            grams = self._subsample_ngrams(self._extract_ngrams(texts))
            if len(grams):
                row_grams.append((self.num_rows, grams))
            self.num_rows, num_grams = self.num_rows + 1, num_grams + len(grams)
            if num_grams > MAX_NGRAMS:
                self.sampling_modulus *= np.uint64(2)
                row_grams = [(row, self._subsample_ngrams(grams)) for row, grams in row_grams]
                num_grams = sum(len(grams) for _, grams in row_grams)
        self.row_P = np.repeat(
            [row for row, _ in row_grams], [len(grams) for _, grams in row_grams]
        ).astype(np.int64)
        grams_P = (
            np.concatenate([grams for _, grams in row_grams])
            if row_grams
            else np.empty(0, dtype=np.uint64)
        )
        self.grams_Q, self.gram_index_P = np.unique(grams_P, return_inverse=True)
        self.is_trained_Q = np.zeros(len(self.grams_Q), dtype=bool)

    def _extract_ngrams(self, texts: Iterable[np.ndarray]) -> np.ndarray:
        return exclude_values(
            hash_unique_ngrams(
                (words for words in texts if len(words) >= NGRAM_WORDS), NGRAM_WORDS
            ),
            self.common,
        )

    def _subsample_ngrams(self, grams: np.ndarray) -> np.ndarray:
        return grams if self.sampling_modulus == 1 else grams[grams % self.sampling_modulus == 0]

    def mark_trained(self, texts: Iterable[np.ndarray]) -> None:
        """The words of a row that is trained."""
        if not len(self.grams_Q):
            return
        grams = self._subsample_ngrams(self._extract_ngrams(texts))
        positions = np.searchsorted(self.grams_Q, grams)
        positions[positions == len(self.grams_Q)] = 0
        self.is_trained_Q[positions[self.grams_Q[positions] == grams]] = True

    def compute_overlap(self, trained_contents: np.ndarray) -> NgramOverlap:
        num_trained_N = np.bincount(
            self.row_P, self.is_trained_Q[self.gram_index_P], minlength=self.num_rows
        )
        return NgramOverlap(
            num_trained_N / np.maximum(1, np.bincount(self.row_P, minlength=self.num_rows)),
            trained_contents,
        )
