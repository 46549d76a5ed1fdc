"""Find near duplicates among any number of rows, by MinHash and locality-sensitive hashing.

    grams of each row -> MinHasher -> bands_MB -> candidate pairs -> verified -> NearDuplicates

MinHash signatures are datasketch's; its index would take 5.7 kB per row. Here a signature is folded
into NUM_BANDS numbers of 64 bits. Rows that share one are candidates, found by sorting, and their
Jaccard similarity is computed exactly. A pair of similarity s becomes a candidate with probability
1 - (1 - s^5)^24: 86% at 0.6, 98.8% at 0.7, 99.99% at 0.8."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.checks.ngrams import GOLDEN_MULTIPLIER

MIN_JACCARD = 0.6  # of the shingles of near duplicates
SHINGLE_WORDS = 3
NUM_BANDS = 24
BAND_DEPTH = 5
BATCH_GRAMS = 4096  # grams per call of datasketch


class MinHasher:
    """Compute the MinHash bands of rows. Raises ImportError without datasketch."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self.minhash: Any = MinHash(
            num_perm=NUM_BANDS * BAND_DEPTH, hashfunc=int, scheme="affine32"
        )
        powers = [pow(GOLDEN_MULTIPLIER, exponent, 2**64) for exponent in range(1, BAND_DEPTH + 1)]
        self.powers_D = np.array(powers, dtype=np.uint64)

    def compute_bands(self, grams: np.ndarray) -> np.ndarray:
        """Return uint64 [NUM_BANDS]."""
        self.minhash.clear()
        high_bits = (grams >> np.uint64(32)).tolist()
        for start in range(0, len(high_bits), BATCH_GRAMS):
            self.minhash.update_batch(high_bits[start : start + BATCH_GRAMS])
        values_BD = self.minhash.hashvalues.reshape(NUM_BANDS, BAND_DEPTH).astype(np.uint64)
        keys_B = ((values_BD + np.uint64(1)) * self.powers_D).sum(axis=1)
        return keys_B ^ (keys_B >> np.uint64(31))


class UnionFind:
    """Disjoint sets of the members 0..n-1; the root of a set is its smallest member."""

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
        """Merge the sets of members with equal values."""
        _, first_K, group_N = np.unique(values_N, return_index=True, return_inverse=True)
        for member in np.flatnonzero(first_K[group_N] != np.arange(len(values_N))).tolist():
            self.union(int(first_K[group_N[member]]), member)

    def find_roots(self) -> np.ndarray:
        """Return int64 [members], the root of each member."""
        roots = [self.find_root(member) for member in range(len(self.parents))]
        return np.array(roots, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """Groups of near duplicates among M rows: those of all roles in order, exact duplicates
    dropped."""

    roles: tuple[str, ...]
    role_M: np.ndarray  # int8, into `roles`
    row_M: np.ndarray  # int64
    first_M: np.ndarray  # int64, into M: the first row of the group

    def iter_matches(self, role: str) -> Iterator[tuple[int, str, int]]:
        """Yield (row, role of its group's first row, that row) for all rows but the first."""
        for index in np.flatnonzero(self.role_M == self.roles.index(role)).tolist():
            if (first := self.first_M[index]) != index:
                yield int(self.row_M[index]), self.roles[self.role_M[first]], int(self.row_M[first])


def find_candidates(bands_MB: np.ndarray) -> np.ndarray:
    """Return int64 [pairs, 2], distinct, smaller first: each row that shares a band with earlier
    rows, paired with the first and the last of them."""
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
    """Return int64 [M], the first row of each row's group. `read_grams(m)` reads the grams of row
    m again."""
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
    """Return the Jaccard similarity of two ascending arrays without repeats."""
    num_shared = len(np.intersect1d(first, second, assume_unique=True))
    return num_shared / max(1, len(first) + len(second) - num_shared)


def find_near_duplicates(
    roles: Mapping[str, tuple[np.ndarray, np.ndarray]], read_grams: Callable[[str, int], np.ndarray]
) -> NearDuplicates:
    """Group the rows of all roles. `roles` maps a role to its rows and their bands."""
    names = tuple(roles)
    row_M = np.concatenate([rows for rows, _ in roles.values()])
    bands_MB = np.concatenate([bands for _, bands in roles.values()])
    role_sizes = [len(rows) for rows, _ in roles.values()]
    role_M = np.repeat(np.arange(len(names), dtype=np.int8), role_sizes)

    def read_row_grams(index: int) -> np.ndarray:
        return read_grams(names[role_M[index]], int(row_M[index]))

    return NearDuplicates(names, role_M, row_M, find_first_rows(bands_MB, read_row_grams))
