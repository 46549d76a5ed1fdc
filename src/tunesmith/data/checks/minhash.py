"""Rows that say nearly the same, among any number of rows.

    grams of each row -> Signer -> bands_MB -> candidate pairs -> verified -> Alike

MinHash signatures are datasketch's; its index would take 5.7 kB a row. Here a signature is folded into BANDS numbers of
64 bits, and rows that share one are candidates: sorting the bands finds them. The Jaccard similarity of a candidate is
then counted, not estimated. The bands find a pair of similarity s with 1 - (1 - s^8)^16: at 0.8 95%, at 0.9 99.99%.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.checks.ngrams import ODD

ALIKE = 0.8  # Jaccard similarity of the runs of WORDS words
WORDS = 5
BANDS, DEPTH = 16, 8
PIECE = 4096  # grams that are signed at once


class Signer:
    """Raises ImportError without datasketch."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self.sketch: Any = MinHash(num_perm=BANDS * DEPTH, hashfunc=int, scheme="affine32")
        powers = [pow(ODD, place, 2**64) for place in range(1, DEPTH + 1)]
        self.powers_D = np.array(powers, dtype=np.uint64)

    def bands(self, grams: np.ndarray) -> np.ndarray:
        """uint64 [BANDS]."""
        self.sketch.clear()
        high = (grams >> np.uint64(32)).tolist()
        for start in range(0, len(high), PIECE):
            self.sketch.update_batch(high[start : start + PIECE])
        values_BD = self.sketch.hashvalues.reshape(BANDS, DEPTH).astype(np.uint64) + np.uint64(1)
        keys_B = (values_BD * self.powers_D).sum(axis=1)
        return keys_B ^ (keys_B >> np.uint64(31))


class Sets:
    """Members 0..n-1 in disjoint sets; the first of a set is its smallest member."""

    def __init__(self, count: int) -> None:
        self.above = np.arange(count)

    def first(self, member: int) -> int:
        above = self.above
        while above[member] != member:
            above[member] = above[above[member]]
            member = above[member]
        return int(member)

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self.above[high] = low

    def join_equal(self, values_N: np.ndarray) -> None:
        """Members with equal values."""
        _, first_K, group_N = np.unique(values_N, return_index=True, return_inverse=True)
        for member in np.flatnonzero(first_K[group_N] != np.arange(len(values_N))).tolist():
            self.join(int(first_K[group_N[member]]), member)

    def firsts(self) -> np.ndarray:
        """int64 [members], the first of each one's set."""
        return np.array([self.first(member) for member in range(len(self.above))], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Alike:
    """Which rows say nearly the same. M rows of all roles, equal ones but once, in the order of the roles."""

    roles: tuple[str, ...]
    role_M: np.ndarray  # int8, into `roles`
    row_M: np.ndarray  # int64
    first_M: np.ndarray  # int64, into M: the first row of those that are alike

    def of(self, role: str) -> Iterator[tuple[int, str, int]]:
        """(row of the role, role of the first row that is like it, that row)."""
        for place in np.flatnonzero(self.role_M == self.roles.index(role)).tolist():
            if (first := self.first_M[place]) != place:
                yield int(self.row_M[place]), self.roles[self.role_M[first]], int(self.row_M[first])


def candidates(bands_MB: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2], smaller first, each once: rows that share a band, with the first and the last one before."""
    found = [np.empty(0, dtype=np.int64)]
    count = len(bands_MB)
    for band_M in bands_MB.T if count else ():
        order_M = np.argsort(band_M, kind="stable")
        again_M = np.concatenate(([False], band_M[order_M[1:]] == band_M[order_M[:-1]]))
        start_M = np.maximum.accumulate(np.where(again_M, 0, np.arange(count)))
        member = order_M[again_M]
        found += [order_M[start_M[again_M]] * count + member, order_M[:-1][again_M[1:]] * count + member]
        found = [np.unique(np.concatenate(found))]
    return np.stack(np.divmod(found[0], max(1, count)), axis=1)


def firsts_of(bands_MB: np.ndarray, grams: Callable[[int], np.ndarray]) -> np.ndarray:
    """int64 [M]: the first row of those that are alike. `grams(m)` reads the grams of a row again."""
    sets = Sets(len(bands_MB))
    held: tuple[int, np.ndarray] | None = None
    for one, other in candidates(bands_MB).tolist():
        if sets.first(one) == sets.first(other):
            continue
        if held is None or held[0] != one:
            held = one, grams(one)
        if jaccard(held[1], grams(other)) >= ALIKE:
            sets.join(one, other)
    return sets.firsts()


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Of two ascending arrays without repeats."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / max(1, len(one) + len(other) - both)


def joined(roles: Mapping[str, tuple[np.ndarray, np.ndarray]], grams: Callable[[str, int], np.ndarray]) -> Alike:
    """`roles`: role -> (rows, their bands)."""
    names = tuple(roles)
    role_M = np.concatenate([np.full(len(rows), i, np.int8) for i, (rows, _) in enumerate(roles.values())])
    row_M = np.concatenate([rows for rows, _ in roles.values()])
    bands_MB = np.concatenate([bands for _, bands in roles.values()])
    first_M = firsts_of(bands_MB, lambda place: grams(names[role_M[place]], int(row_M[place])))
    return Alike(names, role_M, row_M, first_M)
