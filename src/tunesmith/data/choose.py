"""Which rows are kept of many: quality first, then diversity, with a reason for every row that is not.

    Dataset -> faults (what no model needs to be asked); with the scores of a model -> choose -> rows, and reasons

Quality is the instruction-following difficulty of Li 2023 (arXiv 2308.12032): perplexity of the answer behind its
question over that of the answer alone. At 1 and more the question does not help, and the row is left out; below, a high
value is much to learn and a low one is known already. Of the best rows, OVER times as many as are wanted, those are
taken that are farthest from the ones taken so far, by their words (farthest-first traversal, Gonzalez 1985). Nothing is
edited. Left out: the scores (curate.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tunesmith.data.audit.near import Sets
from tunesmith.data.audit.reading import read_all, row_of
from tunesmith.data.audit.said import ROW_CHECKS
from tunesmith.data.audit.words import words_of
from tunesmith.data.dataset import Dataset
from tunesmith.data.schedule import order

OVER = 3
UNLIKELY = 0.95  # of the perplexities: above this quantile an answer is noise more often than news
SIZE = 512  # of a vector of words
ROLE = "data"


@dataclass(frozen=True, eq=False)
class Scores:
    """What the base model says of N rows; nan where a row has no answer to score."""

    perplexity_N: np.ndarray  # of the last answer behind its question
    difficulty_N: np.ndarray  # that, over the perplexity of the answer alone
    answer_tokens_N: np.ndarray  # int64
    problems: Mapping[int, str]  # rows that cannot be trained on -> why


def faults(dataset: Dataset, held_out: Mapping[str, Dataset]) -> dict[int, str]:
    """Row -> why it is left out, whatever a model says of it."""
    found: dict[int, str] = {}
    for role, rows in held_out.items():
        for row in np.flatnonzero(np.isin(dataset.contents_N, rows.contents_N)).tolist():
            found.setdefault(row, f"is also in {role}")
    alike = Sets(len(dataset))
    alike.join_equal(dataset.contents_N)
    reading = read_all({ROLE: dataset}, {})
    for row, _, first in reading.alike.of(ROLE) if reading.alike else ():
        alike.join(first, row)
    for row, first in enumerate(alike.firsts().tolist()):
        if first != row:
            found.setdefault(row, f"says what {dataset.id(first)} says")
    for row in range(len(dataset)):
        if row not in found and (fault := _fault(dataset, row)):
            found[row] = fault
    return found


def _fault(dataset: Dataset, row: int) -> str:
    seen = row_of(dataset.example(row))
    kinds = ((name, kind) for name, check in ROW_CHECKS.items() for kind, _ in check.find(seen))
    return next((f"{name}: {kind}" for name, kind in kinds), "")


def choose(
    dataset: Dataset, scores: Scores, left_out: Mapping[int, str], keep: int
) -> tuple[np.ndarray, dict[int, str]]:
    """(rows that are kept, ascending, at most `keep`; row -> why it is not)."""
    reasons = {**scores.problems, **left_out}
    scored = ~np.isnan(scores.perplexity_N)
    limit = float(np.quantile(scores.perplexity_N[scored], UNLIKELY)) if scored.any() else np.inf
    for row in np.flatnonzero(scored).tolist():
        if scores.perplexity_N[row] > limit:
            reasons.setdefault(row, f"an unlikely answer: perplexity {scores.perplexity_N[row]:.3g}, over {limit:.3g}")
        elif scores.difficulty_N[row] >= 1:
            reasons.setdefault(row, f"the question does not help: difficulty {scores.difficulty_N[row]:.3f}")
    good = np.array([row for row in range(len(dataset)) if row not in reasons], dtype=np.int64)
    good = good[np.argsort(-scores.difficulty_N[good], kind="stable")]
    best = good[: OVER * keep]
    for row in good[OVER * keep :].tolist():
        reasons[row] = f"known already: difficulty {scores.difficulty_N[row]:.3f}, not among the best {len(best):,}"
    places, nearest = farthest(word_vectors(dataset, best), keep)
    for place, row in enumerate(best.tolist()):
        if place not in set(places):
            reasons[row] = f"like {dataset.id(int(best[nearest[place]]))}, which is kept"
    return np.sort(best[places]), reasons


def word_vectors(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """float32 [rows, SIZE], of length 1: hashed words of what is said, rare ones heavier."""
    counts = np.zeros((len(rows), SIZE), dtype=np.float32)
    for place, row in enumerate(rows.tolist()):
        for text in row_of(dataset.example(row)).turns:
            counts[place] += np.bincount((words_of(text) % SIZE).astype(np.int64), minlength=SIZE)
    weights = np.log((1 + len(rows)) / (1 + (counts > 0).sum(axis=0)))
    vectors = np.log1p(counts) * weights
    return (vectors / np.maximum(1e-9, np.linalg.norm(vectors, axis=1, keepdims=True))).astype(np.float32)


def farthest(vectors: np.ndarray, keep: int) -> tuple[list[int], np.ndarray]:
    """(places that are kept, the first one first; for every place the kept one that is nearest to it)."""
    if not len(vectors):
        return [], np.empty(0, dtype=np.int64)
    kept, nearest = [0], np.zeros(len(vectors), dtype=np.int64)
    likeness = vectors @ vectors[0]
    likeness[0] = np.inf
    while len(kept) < min(keep, len(vectors)):
        place = int(likeness.argmin())
        kept.append(place)
        new = vectors @ vectors[place]
        nearest = np.where(new > likeness, place, nearest)
        likeness = np.maximum(likeness, new)
        likeness[place] = np.inf
    return kept, nearest


def baselines(scores: Scores, rows: int, keep: int, seed: int) -> dict[str, np.ndarray]:
    """Subsets of the same size that a choice has to beat: random rows, and those with the longest answers. Published
    methods often do not (Xia 2024, arXiv 2410.09335; Zhao 2024, arXiv 2402.04833)."""
    usable = np.array([row for row in range(rows) if row not in scores.problems], dtype=np.int64)
    drawn = usable[order(seed, 0, len(usable))[:keep]] if len(usable) else usable
    longest = usable[np.argsort(-scores.answer_tokens_N[usable], kind="stable")[:keep]]
    return {"random": np.sort(drawn), "longest": np.sort(longest)}
