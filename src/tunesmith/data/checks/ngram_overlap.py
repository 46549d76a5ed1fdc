"""Measure n-gram overlap of held-out rows with training rows.

    held-out rows -> NgramIndex; .mark_trained(words of a training row) ...; .compute_overlap()

An n-gram has NGRAM_WORDS words (GPT-3's contamination measure, arXiv 2005.14165, appendix C). Above
MAX_NGRAMS, only hashes divisible by a power of two are kept, in held-out and training rows alike:
memory is bounded and shares stay unbiased."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tunesmith.data.checks.ngrams import exclude_values, hash_unique_ngrams

NGRAM_WORDS = 13
MIN_COPY_SHARE = 0.5  # of its n-grams: a row with more is a copy
MAX_NGRAMS = 2**24


@dataclass(frozen=True, eq=False)
class NgramOverlap:
    share_N: np.ndarray  # float, share of the n-grams of each held-out row that are trained
    trained_contents: np.ndarray  # uint64, digests of the training rows


class NgramIndex:
    """The n-grams of the rows of one held-out role."""

    def __init__(self, rows: Iterable[list[np.ndarray]], common: np.ndarray) -> None:
        """`rows` are the words of each text of each row, `common` n-grams that are not counted,
        since most rows have them."""
        self.common = common
        self.sampling_modulus = np.uint64(1)
        row_grams: list[np.ndarray] = []
        num_grams = 0
        for texts in rows:
            row_grams.append(self._subsample(self._extract_ngrams(texts)))
            num_grams += len(row_grams[-1])
            if num_grams > MAX_NGRAMS:
                self.sampling_modulus *= np.uint64(2)
                row_grams = [self._subsample(grams) for grams in row_grams]
                num_grams = sum(len(grams) for grams in row_grams)
        self.num_rows = len(row_grams)
        lengths_N = np.array([len(grams) for grams in row_grams], dtype=np.int64)
        self.row_P = np.repeat(np.arange(self.num_rows), lengths_N)
        grams_P = np.concatenate([np.empty(0, dtype=np.uint64), *row_grams])
        self.grams_Q, self.gram_index_P = np.unique(grams_P, return_inverse=True)
        self.is_trained_Q = np.zeros(len(self.grams_Q), dtype=bool)

    def _extract_ngrams(self, texts: Iterable[np.ndarray]) -> np.ndarray:
        long_texts = [words for words in texts if len(words) >= NGRAM_WORDS]
        return exclude_values(hash_unique_ngrams(long_texts, NGRAM_WORDS), self.common)

    def _subsample(self, grams: np.ndarray) -> np.ndarray:
        return grams if self.sampling_modulus == 1 else grams[grams % self.sampling_modulus == 0]

    def mark_trained(self, texts: Iterable[np.ndarray]) -> None:
        """Mark the n-grams of a training row."""
        if not len(self.grams_Q):
            return
        grams = self._subsample(self._extract_ngrams(texts))
        positions = np.searchsorted(self.grams_Q, grams)
        positions[positions == len(self.grams_Q)] = 0
        self.is_trained_Q[positions[self.grams_Q[positions] == grams]] = True

    def compute_overlap(self, trained_contents: np.ndarray) -> NgramOverlap:
        is_trained_P = self.is_trained_Q[self.gram_index_P]
        num_trained_N = np.bincount(self.row_P, is_trained_P, minlength=self.num_rows)
        num_grams_N = np.bincount(self.row_P, minlength=self.num_rows)
        return NgramOverlap(num_trained_N / np.maximum(1, num_grams_N), trained_contents)
