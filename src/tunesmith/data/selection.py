"""Which rows are kept of many: quality first, then diversity, with a reason for every row that is not.

    Dataset -> faults (what no model needs to be asked); with the scores of a model -> choose -> rows, and reasons

Quality is the instruction-following difficulty of Li 2023 (arXiv 2308.12032): perplexity of the answer behind its
question over that of the answer alone. At 1 and more the question does not help, and the row is left out; below, a high
value is much to learn and a low one is known already. A row that its neighbours contradict is left out too. Of the best
rows, OVER times as many as are wanted, those are taken that are farthest from the ones taken so far, by their words or
as the model sees them (farthest-first traversal, Gonzalez 1985). Nothing is edited. Left out: the scores (curate.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tunesmith.data.checks.minhash import Sets
from tunesmith.data.checks.row_checks import ROW_CHECKS
from tunesmith.data.checks.text_stats import read_all, row_of
from tunesmith.data.dataset import Dataset
from tunesmith.data.neighbors import Neighbours
from tunesmith.data.sampler import order

OVER = 3
UNLIKELY = 0.95  # of the perplexities: above this quantile an answer is noise more often than news
NAMED = 3  # neighbours
ROLE = "data"


@dataclass(frozen=True, eq=False)
class Scores:
    """What the base model says of N rows; nan where a row has no answer to score."""

    perplexity_N: np.ndarray  # of the last answer behind its question
    difficulty_N: np.ndarray  # that, over the perplexity of the answer alone
    answer_tokens_N: np.ndarray  # int64
    problems: Mapping[int, str]  # rows that cannot be trained on -> why
    vectors_NV: np.ndarray  # float32, of length 1: what a row is like; 0 where it cannot be told
    neighbours: Neighbours  # by their questions

    @property
    def usable_N(self) -> np.ndarray:
        """int64, the rows that can be trained on."""
        return np.array([row for row in range(len(self.perplexity_N)) if row not in self.problems], dtype=np.int64)


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
    for row in np.flatnonzero(scores.neighbours.disputed_N).tolist():
        reasons.setdefault(row, _disputed(dataset, scores.neighbours, row))
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
    places, nearest = farthest(scores.vectors_NV[best], keep)
    for place, row in enumerate(best.tolist()):
        if place not in set(places):
            reasons[row] = f"like {dataset.id(int(best[nearest[place]]))}, which is kept"
    return np.sort(best[places]), reasons


def _disputed(dataset: Dataset, known: Neighbours, row: int) -> str:
    named = ", ".join(dataset.id(near) for near in known.nearest_NK[row, :NAMED].tolist())
    alike = f"{known.theirs_N[row]:.2f} alike, {known.own_N[row]:.2f} like its own"
    return f"the nearest questions have another answer: {named} and others ({alike})"


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


def baselines(scores: Scores, keep: int, seed: int) -> dict[str, np.ndarray]:
    """Subsets of the same size that a choice has to beat: random rows, and those with the longest answers. Published
    methods often do not (Xia 2024, arXiv 2410.09335; Zhao 2024, arXiv 2402.04833)."""
    usable = scores.usable_N
    longest = usable[np.argsort(-scores.answer_tokens_N[usable], kind="stable")[:keep]]
    return {"random": drawn(usable, keep, seed), "longest": np.sort(longest)}


def drawn(rows: np.ndarray, keep: int, seed: int) -> np.ndarray:
    """Some of these rows, ascending."""
    return np.sort(rows[order(seed, 0, len(rows))[:keep]]) if len(rows) else rows
