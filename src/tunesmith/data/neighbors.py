"""What is answered where nearly the same is asked: a row whose neighbours agree on another answer may be wrong.

    vectors of N questions and of their answers -> neighbours -> Neighbours -> disputed

The nearest questions of each row, by cosine, and how like its answer theirs are; and how like each other theirs are,
without which a low number says nothing: where every question has an answer of its own, none is like another. Noise in
labels is looked for like this since Wilson 1972 (Asymptotic Properties of Nearest Neighbor Rules Using Edited Data).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.data.checks.ngrams import words_of

NEAREST = 5
CHUNK = 2**22  # likenesses that are held at once
LONELY = 0.25  # of the rows
UNITED, APART = 0.6, 0.2  # likeness of the neighbours' answers with each other, and of the row's with theirs
SIZE = 512  # of a vector of words


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Of N rows, the K nearest by their questions."""

    nearest_NK: np.ndarray  # int64, the nearest first
    own_N: np.ndarray  # float32, mean likeness of a row's answer to theirs
    theirs_N: np.ndarray  # float32, mean likeness of their answers to each other
    near_N: np.ndarray  # float32, mean likeness of the questions

    @property
    def disputed_N(self) -> np.ndarray:
        """Rows whose neighbours answer alike, and otherwise. The most lonely rows are left out: their neighbours are no
        witnesses."""
        lonely = np.nanquantile(self.near_N, LONELY) if np.isfinite(self.near_N).any() else np.inf
        return (self.theirs_N >= UNITED) & (self.own_N <= APART) & (self.near_N >= lonely)


def neighbours(questions_NV: np.ndarray, answers_NW: np.ndarray, among: np.ndarray) -> Neighbours:
    """`among`: the rows that count; of others, and of fewer than three, nothing is said. Vectors are of length 1, or 0
    where there is nothing to go by."""
    count, kept = len(questions_NV), max(0, min(NEAREST, len(among) - 1))
    nearest_NK = np.zeros((count, kept), dtype=np.int64)
    own_N, theirs_N, near_N = (np.full(count, np.nan, dtype=np.float32) for _ in range(3))
    size = max(1, CHUNK // max(1, len(among)))
    for start in range(0, len(among) if kept > 1 else 0, size):
        rows = among[start : start + size]
        likeness_RN = questions_NV[rows] @ questions_NV[among].T
        places_RK = _nearest(likeness_RN, start, kept)
        near_RK, near_N[rows] = among[places_RK], np.take_along_axis(likeness_RN, places_RK, axis=1).mean(axis=1)
        answers_RKW = answers_NW[near_RK]
        nearest_NK[rows] = near_RK
        own_N[rows] = np.einsum("rw,rkw->r", answers_NW[rows], answers_RKW) / kept
        squares_R = (answers_RKW.sum(axis=1) ** 2).sum(axis=1) - (answers_RKW**2).sum(axis=(1, 2))
        theirs_N[rows] = squares_R / (kept * (kept - 1))
    return Neighbours(nearest_NK, own_N, theirs_N, near_N)


def _nearest(likeness_RN: np.ndarray, start: int, kept: int) -> np.ndarray:
    """int64 [R, kept], the nearest first; row r is the one at `start + r`, and no neighbour of its own."""
    own_R = np.arange(len(likeness_RN))
    likeness_RN[own_R, start + own_R] = -np.inf
    found = np.argpartition(-likeness_RN, kept - 1, axis=1)[:, :kept]
    order = np.argsort(-np.take_along_axis(likeness_RN, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def word_vectors(texts: Sequence[str]) -> np.ndarray:
    """float32 [texts, SIZE], of length 1: hashed words, rare ones heavier."""
    counts = np.zeros((len(texts), SIZE), dtype=np.float32)
    for place, text in enumerate(texts):
        counts[place] = np.bincount((words_of(text) % SIZE).astype(np.int64), minlength=SIZE)
    weights = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0)))
    return unit(np.log1p(counts) * weights)


def unit(vectors_NV: np.ndarray) -> np.ndarray:
    """The same directions, float32, of length 1; what is 0 stays 0."""
    return (vectors_NV / np.maximum(1e-9, np.linalg.norm(vectors_NV, axis=1, keepdims=True))).astype(np.float32)
