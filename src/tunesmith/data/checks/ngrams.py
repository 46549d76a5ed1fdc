"""Hash the words and word n-grams of texts: equal n-grams have equal hashes.

    text -> hash_words -> words_W (uint64) -> hash_ngrams -> grams (uint64)
    held-out rows -> NgramIndex; .mark_trained(words of a training row) ...; .compute_overlap()

Case and ASCII punctuation are ignored. In scripts without spaces, each character is a word."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

import numpy as np

SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
PUNCTUATION_TO_SPACE = bytes.maketrans(string.punctuation.encode(), b" " * len(string.punctuation))
PART_BYTES = 2**19  # of a long text, whose words are held at once
GOLDEN_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def hash_words(text: str) -> np.ndarray:
    """Return uint64 [words], one hash per word."""
    if not text.isascii():
        text = SPACELESS.sub(r" \g<0> ", text)
    content = text.lower().encode(errors="replace").translate(PUNCTUATION_TO_SPACE)
    parts: list[np.ndarray] = []
    end = 0
    while end < len(content) or not parts:
        start = end
        end = content.find(b" ", start + PART_BYTES)
        end = len(content) if end < 0 else end
        words = content[start:end].split()
        parts.append(np.fromiter(map(crc32, words), dtype=np.uint64, count=len(words)))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def hash_ngrams(words_W: np.ndarray, n: int) -> np.ndarray:
    """Return uint64, one hash per run of n words; a text of fewer words has one."""
    if not len(words_W):
        return words_W
    n = min(n, len(words_W))
    length = len(words_W) - n + 1
    grams = np.zeros(length, dtype=np.uint64)
    for offset in range(n):
        grams = grams * np.uint64(GOLDEN_MULTIPLIER) + words_W[offset : offset + length]
    grams ^= grams >> np.uint64(29)
    grams *= np.uint64(0xBF58476D1CE4E5B9)  # from splitmix64
    return grams ^ (grams >> np.uint64(32))


def hash_unique_ngrams(texts: Iterable[np.ndarray], n: int) -> np.ndarray:
    """Return the distinct n-grams of several texts, ascending; none spans two texts."""
    grams = [hash_ngrams(words_W, n) for words_W in texts if len(words_W)]
    return sort_unique(np.concatenate(grams)) if grams else np.empty(0, dtype=np.uint64)


def sort_unique(values: np.ndarray) -> np.ndarray:
    """Return the distinct values, ascending. For few values several times faster than
    `numpy.unique`."""
    values = np.sort(values)
    is_first = np.empty(len(values), dtype=bool)
    is_first[:1] = True
    is_first[1:] = values[1:] != values[:-1]
    return values[is_first]


def exclude_values(values: np.ndarray, sorted_values: np.ndarray) -> np.ndarray:
    """Return the `values` that are not in `sorted_values`."""
    if not len(sorted_values):
        return values
    positions = np.searchsorted(sorted_values, values)
    positions[positions == len(sorted_values)] = 0
    return values[sorted_values[positions] != values]


# ---------------------------------------------------------------- overlap of rows

# An n-gram has NGRAM_WORDS words (GPT-3's contamination measure, arXiv 2005.14165, appendix C).
# Above MAX_NGRAMS, only hashes divisible by a power of two are kept, in held-out and training rows
# alike: memory is bounded and shares stay unbiased.

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
        """Return the n-grams without a word of a common one: beside twelve words of an instruction,
        one more is no passage."""
        grams = [np.empty(0, dtype=np.uint64)]
        for words_W in texts:
            if len(words_W) >= NGRAM_WORDS:
                grams_G = hash_ngrams(words_W, NGRAM_WORDS)
                is_common_G = np.isin(grams_G, self.common)
                near_G = np.convolve(is_common_G, np.ones(2 * NGRAM_WORDS - 1))[NGRAM_WORDS - 1 :]
                grams.append(grams_G[near_G[: len(grams_G)] == 0])
        return sort_unique(np.concatenate(grams))

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
