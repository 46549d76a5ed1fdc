"""Hash the words and word n-grams of texts: equal n-grams have equal hashes.

    text -> hash_words -> words_W (uint64) -> hash_ngrams -> grams (uint64)

Case and ASCII punctuation are ignored. In scripts without spaces, each character is a word."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
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
