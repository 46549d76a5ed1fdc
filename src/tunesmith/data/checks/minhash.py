"""Rows that say nearly the same, among any number of rows.

    grams of each row -> Signer -> bands_MB -> candidate pairs -> verified -> Alike

MinHash signatures are datasketch's; its index would take 5.7 kB a row. Here a signature is folded
into BANDS numbers of 64 bits, and rows that share one are candidates: sorting the bands finds them.
The Jaccard similarity of a candidate is then counted, not estimated. The bands find a pair of
similarity s with 1 - (1 - s^8)^16: at 0.8 95%, at 0.9 99.99%."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.checks.ngrams import GOLDEN_MULTIPLIER

MIN_JACCARD = 0.8  # Jaccard similarity of the runs of WORDS words
SHINGLE_WORDS = 5
NUM_BANDS, BAND_DEPTH = 16, 8
BATCH_GRAMS = 4096  # grams that are signed at once


class MinHasher:
    """Raises ImportError without datasketch."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self.minhash: Any = MinHash(
            num_perm=NUM_BANDS * BAND_DEPTH, hashfunc=int, scheme="affine32"
        )
        powers = [pow(GOLDEN_MULTIPLIER, exponent, 2**64) for exponent in range(1, BAND_DEPTH + 1)]
        self.powers_D = np.array(powers, dtype=np.uint64)

    def compute_bands(self, grams: np.ndarray) -> np.ndarray:
        """uint64 [BANDS]."""
        self.minhash.clear()
        high_bits = (grams >> np.uint64(32)).tolist()
        for start in range(0, len(high_bits), BATCH_GRAMS):
            self.minhash.update_batch(high_bits[start : start + BATCH_GRAMS])
        values_BD = self.minhash.hashvalues.reshape(NUM_BANDS, BAND_DEPTH).astype(
            np.uint64
        ) + np.uint64(1)
        keys_B = (values_BD * self.powers_D).sum(axis=1)
        return keys_B ^ (keys_B >> np.uint64(31))


class UnionFind:
    """Members 0..n-1 in disjoint sets; the first of a set is its smallest member."""

    def __init__(self, count: int) -> None:
        self.parents = np.arange(count)

    def find_root(self, member: int) -> int:
        parents = self.parents
        while parents[member] != member:
            parents[member] = parents[parents[member]]
            member = parents[member]
        return int(member)

    def union(self, first: int, second: int) -> None:
        low, high = sorted((self.find_root(first), self.find_root(second)))
        self.parents[high] = low

    def union_equal(self, values_N: np.ndarray) -> None:
        """Members with equal values."""
        _, first_K, group_N = np.unique(values_N, return_index=True, return_inverse=True)
        for member in np.flatnonzero(first_K[group_N] != np.arange(len(values_N))).tolist():
            self.union(int(first_K[group_N[member]]), member)

    def find_roots(self) -> np.ndarray:
        """int64 [members], the first of each one's set."""
        return np.array(
            [self.find_root(member) for member in range(len(self.parents))], dtype=np.int64
        )


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """Which rows say nearly the same. M rows of all roles, equal ones but once, in the order of the
    roles."""

    roles: tuple[str, ...]
    role_M: np.ndarray  # int8, into `roles`
    row_M: np.ndarray  # int64
    first_M: np.ndarray  # int64, into M: the first row of those that are alike

    def iter_matches(self, role: str) -> Iterator[tuple[int, str, int]]:
        """(row of the role, role of the first row that is like it, that row)."""
        for index in np.flatnonzero(self.role_M == self.roles.index(role)).tolist():
            if (first := self.first_M[index]) != index:
                yield int(self.row_M[index]), self.roles[self.role_M[first]], int(self.row_M[first])


def find_candidates(bands_MB: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2], smaller first, each once: rows that share a band, with the first and the
    last one before."""
    pairs = [np.empty(0, dtype=np.int64)]
    count = len(bands_MB)
    for band_M in bands_MB.T if count else ():
        order_M = np.argsort(band_M, kind="stable")
        is_repeat_M = np.concatenate(([False], band_M[order_M[1:]] == band_M[order_M[:-1]]))
        start_M = np.maximum.accumulate(np.where(is_repeat_M, 0, np.arange(count)))
        member = order_M[is_repeat_M]
        pairs += [
            order_M[start_M[is_repeat_M]] * count + member,
            order_M[:-1][is_repeat_M[1:]] * count + member,
        ]
        pairs = [np.unique(np.concatenate(pairs))]
    return np.stack(np.divmod(pairs[0], max(1, count)), axis=1)


def find_first_rows(bands_MB: np.ndarray, read_grams: Callable[[int], np.ndarray]) -> np.ndarray:
    """int64 [M]: the first row of those that are alike. `grams(m)` reads the grams of a row
    again."""
    union_find = UnionFind(len(bands_MB))
    cached: tuple[int, np.ndarray] | None = None
    for first, second in find_candidates(bands_MB).tolist():
        if union_find.find_root(first) == union_find.find_root(second):
            continue
        if cached is None or cached[0] != first:
            cached = first, read_grams(first)
        if compute_jaccard(cached[1], read_grams(second)) >= MIN_JACCARD:
            union_find.union(first, second)
    return union_find.find_roots()


def compute_jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Of two ascending arrays without repeats."""
    num_shared = len(np.intersect1d(first, second, assume_unique=True))
    return num_shared / max(1, len(first) + len(second) - num_shared)


def find_near_duplicates(
    roles: Mapping[str, tuple[np.ndarray, np.ndarray]], read_grams: Callable[[str, int], np.ndarray]
) -> NearDuplicates:
    """`roles`: role -> (rows, their bands)."""
    names = tuple(roles)
    role_M = np.concatenate(
        [np.full(len(rows), i, np.int8) for i, (rows, _) in enumerate(roles.values())]
    )
    row_M = np.concatenate([rows for rows, _ in roles.values()])
    bands_MB = np.concatenate([bands for _, bands in roles.values()])
    first_M = find_first_rows(
        bands_MB, lambda index: read_grams(names[role_M[index]], int(row_M[index]))
    )
    return NearDuplicates(names, role_M, row_M, first_M)
