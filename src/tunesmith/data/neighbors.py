"""Rows with a possibly wrong answer: their nearest neighbors agree on a different one.

    vectors of N questions and of their answers -> find_neighbors -> Neighbors -> disputed_N

For each row: the nearest questions by cosine similarity, how similar their answers are to the row's
answer, and how similar they are to each other. The latter is needed because in a data set in which
every question has a different answer, no answer is similar to another. The idea is edited nearest
neighbors: Wilson 1972, Asymptotic Properties of Nearest Neighbor Rules Using Edited Data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.data.checks.ngrams import hash_words

MAX_NEIGHBORS = 5
CHUNK_SIZE = 2**22  # similarities in memory at once
ISOLATED_QUANTILE = 0.25  # rows whose questions are less similar to others are not judged
MIN_NEIGHBOR_AGREEMENT = 0.6  # similarity of the neighbors' answers to each other
MAX_ANSWER_SIMILARITY = 0.2  # similarity of the row's answer to theirs
VECTOR_SIZE = 512


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The K rows with the nearest questions for each of N rows; nan for rows not compared."""

    nearest_NK: np.ndarray  # int64, the nearest first
    answer_similarity_N: np.ndarray  # float32, mean similarity of the row's answer to theirs
    neighbor_agreement_N: np.ndarray  # float32, mean similarity of their answers to each other
    question_similarity_N: np.ndarray  # float32, mean similarity of the questions

    @property
    def disputed_N(self) -> np.ndarray:
        """bool: rows whose neighbors agree with each other, but not with the row."""
        min_similarity = np.inf
        if np.isfinite(self.question_similarity_N).any():
            min_similarity = np.nanquantile(self.question_similarity_N, ISOLATED_QUANTILE)
        neighbors_agree_N = self.neighbor_agreement_N >= MIN_NEIGHBOR_AGREEMENT
        row_differs_N = self.answer_similarity_N <= MAX_ANSWER_SIMILARITY
        return neighbors_agree_N & row_differs_N & (self.question_similarity_N >= min_similarity)


def find_neighbors(
    questions_NV: np.ndarray, answers_NW: np.ndarray, candidates: np.ndarray
) -> Neighbors:
    """Compare the `candidates` (indices of rows, at least three) with each other.

    Vectors have length 1, or 0 if a text has no features."""
    num_rows = len(questions_NV)
    num_neighbors = max(0, min(MAX_NEIGHBORS, len(candidates) - 1))
    nearest_NK = np.zeros((num_rows, num_neighbors), dtype=np.int64)
    answer_similarity_N = np.full(num_rows, np.nan, dtype=np.float32)
    neighbor_agreement_N = np.full(num_rows, np.nan, dtype=np.float32)
    question_similarity_N = np.full(num_rows, np.nan, dtype=np.float32)
    chunk_rows = max(1, CHUNK_SIZE // max(1, len(candidates)))
    for start in range(0, len(candidates) if num_neighbors > 1 else 0, chunk_rows):
        rows = candidates[start : start + chunk_rows]
        similarity_RN = questions_NV[rows] @ questions_NV[candidates].T
        positions_RK = _find_nearest(similarity_RN, start, num_neighbors)
        nearest_NK[rows] = candidates[positions_RK]
        nearest_similarity_RK = np.take_along_axis(similarity_RN, positions_RK, axis=1)
        question_similarity_N[rows] = nearest_similarity_RK.mean(axis=1)
        answers_RKW = answers_NW[nearest_NK[rows]]
        answer_sums_R = np.einsum("rw,rkw->r", answers_NW[rows], answers_RKW)
        answer_similarity_N[rows] = answer_sums_R / num_neighbors
        # The sum over all pairs i != j is the squared norm of the sum minus the squared norms.
        pair_sums_R = (answers_RKW.sum(axis=1) ** 2).sum(axis=1) - (answers_RKW**2).sum(axis=(1, 2))
        neighbor_agreement_N[rows] = pair_sums_R / (num_neighbors * (num_neighbors - 1))
    return Neighbors(nearest_NK, answer_similarity_N, neighbor_agreement_N, question_similarity_N)


def _find_nearest(similarity_RN: np.ndarray, start: int, num_neighbors: int) -> np.ndarray:
    """Return int64 [R, num_neighbors], the nearest first, without the row itself.

    Row r of the matrix is candidate `start + r`."""
    rows_R = np.arange(len(similarity_RN))
    similarity_RN[rows_R, start + rows_R] = -np.inf
    positions_RK = np.argpartition(-similarity_RN, num_neighbors - 1, axis=1)[:, :num_neighbors]
    similarity_RK = np.take_along_axis(similarity_RN, positions_RK, axis=1)
    order_RK = np.argsort(-similarity_RK, axis=1, kind="stable")
    return np.take_along_axis(positions_RK, order_RK, axis=1)


def build_word_vectors(texts: Sequence[str]) -> np.ndarray:
    """Return float32 [texts, VECTOR_SIZE]: normalized TF-IDF vectors of hashed words."""
    counts = np.zeros((len(texts), VECTOR_SIZE), dtype=np.float32)
    for index, text in enumerate(texts):
        buckets = (hash_words(text) % VECTOR_SIZE).astype(np.int64)
        counts[index] = np.bincount(buckets, minlength=VECTOR_SIZE)
    weights = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0)))
    return normalize_rows(np.log1p(counts) * weights)


def normalize_rows(vectors_NV: np.ndarray) -> np.ndarray:
    """Scale vectors to length 1, as float32; zero vectors stay zero."""
    norms_N1 = np.maximum(1e-9, np.linalg.norm(vectors_NV, axis=1, keepdims=True))
    return (vectors_NV / norms_N1).astype(np.float32)
