"""What is answered where nearly the same is asked: a row whose neighbours agree on another answer
may be wrong.

    vectors of N questions and of their answers -> neighbours -> Neighbours -> disputed

The nearest questions of each row, by cosine, and how like its answer theirs are; and how like each
other theirs are, without which a low number says nothing: where every question has an answer of its
own, none is like another. Noise in labels is looked for like this since Wilson 1972 (Asymptotic
Properties of Nearest Neighbor Rules Using Edited Data)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.data.checks.ngrams import hash_words

MAX_NEIGHBOURS = 5
CHUNK_SIZE = 2**22  # likenesses that are held at once
ISOLATED_QUANTILE = 0.25  # of the rows
MIN_NEIGHBOUR_AGREEMENT, MAX_ANSWER_SIMILARITY = (
    0.6,
    0.2,
)  # likeness of the neighbours' answers with each other, and of the row's with theirs
VECTOR_SIZE = 512  # of a vector of words


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Of N rows, the K nearest by their questions."""

    nearest_NK: np.ndarray  # int64, the nearest first
    answer_similarity_N: np.ndarray  # float32, mean likeness of a row's answer to theirs
    neighbour_agreement_N: np.ndarray  # float32, mean likeness of their answers to each other
    question_similarity_N: np.ndarray  # float32, mean likeness of the questions

    @property
    def disputed_N(self) -> np.ndarray:
        """Rows whose neighbours answer alike, and otherwise. The most lonely rows are left out:
        their neighbours are no witnesses."""
        min_similarity = (
            np.nanquantile(self.question_similarity_N, ISOLATED_QUANTILE)
            if np.isfinite(self.question_similarity_N).any()
            else np.inf
        )
        return (
            (self.neighbour_agreement_N >= MIN_NEIGHBOUR_AGREEMENT)
            & (self.answer_similarity_N <= MAX_ANSWER_SIMILARITY)
            & (self.question_similarity_N >= min_similarity)
        )


def find_neighbours(
    questions_NV: np.ndarray, answers_NW: np.ndarray, candidates: np.ndarray
) -> Neighbours:
    """`among`: the rows that count; of others, and of fewer than three, nothing is said. Vectors
    are of length 1, or 0 where there is nothing to go by."""
    count, num_neighbours = len(questions_NV), max(0, min(MAX_NEIGHBOURS, len(candidates) - 1))
    nearest_NK = np.zeros((count, num_neighbours), dtype=np.int64)
    answer_similarity_N, neighbour_agreement_N, question_similarity_N = (
        np.full(count, np.nan, dtype=np.float32) for _ in range(3)
    )
    chunk_rows = max(1, CHUNK_SIZE // max(1, len(candidates)))
    for start in range(0, len(candidates) if num_neighbours > 1 else 0, chunk_rows):
        rows = candidates[start : start + chunk_rows]
        similarity_RN = questions_NV[rows] @ questions_NV[candidates].T
        positions_RK = _find_nearest(similarity_RN, start, num_neighbours)
        nearest_RK, question_similarity_N[rows] = (
            candidates[positions_RK],
            np.take_along_axis(similarity_RN, positions_RK, axis=1).mean(axis=1),
        )
        answers_RKW = answers_NW[nearest_RK]
        nearest_NK[rows] = nearest_RK
        answer_similarity_N[rows] = (
            np.einsum("rw,rkw->r", answers_NW[rows], answers_RKW) / num_neighbours
        )
        pair_sums_R = (answers_RKW.sum(axis=1) ** 2).sum(axis=1) - (answers_RKW**2).sum(axis=(1, 2))
        neighbour_agreement_N[rows] = pair_sums_R / (num_neighbours * (num_neighbours - 1))
    return Neighbours(nearest_NK, answer_similarity_N, neighbour_agreement_N, question_similarity_N)


def _find_nearest(similarity_RN: np.ndarray, start: int, num_neighbours: int) -> np.ndarray:
    """int64 [R, kept], the nearest first; row r is the one at `start + r`, and no neighbour of its
    own."""
    rows_R = np.arange(len(similarity_RN))
    similarity_RN[rows_R, start + rows_R] = -np.inf
    positions_RK = np.argpartition(-similarity_RN, num_neighbours - 1, axis=1)[:, :num_neighbours]
    order_RK = np.argsort(
        -np.take_along_axis(similarity_RN, positions_RK, axis=1), axis=1, kind="stable"
    )
    return np.take_along_axis(positions_RK, order_RK, axis=1)


def build_word_vectors(texts: Sequence[str]) -> np.ndarray:
    """float32 [texts, SIZE], of length 1: hashed words, rare ones heavier."""
    counts = np.zeros((len(texts), VECTOR_SIZE), dtype=np.float32)
    for index, text in enumerate(texts):
        counts[index] = np.bincount(
            (hash_words(text) % VECTOR_SIZE).astype(np.int64), minlength=VECTOR_SIZE
        )
    weights = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0)))
    return normalize_rows(np.log1p(counts) * weights)


def normalize_rows(vectors_NV: np.ndarray) -> np.ndarray:
    """The same directions, float32, of length 1; what is 0 stays 0."""
    return (
        vectors_NV / np.maximum(1e-9, np.linalg.norm(vectors_NV, axis=1, keepdims=True))
    ).astype(np.float32)
