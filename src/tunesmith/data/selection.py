"""Which rows are kept of many: quality first, then diversity, with a reason for every row that is
not.

    Dataset -> faults (what no model needs to be asked); with the scores of a model -> choose -> rows, and reasons

Quality is the instruction-following difficulty of Li 2023 (arXiv 2308.12032): perplexity of the
answer behind its question over that of the answer alone. At 1 and more the question does not help,
and the row is left out; below, a high value is much to learn and a low one is known already. A row
that its neighbours contradict is left out too. Of the best rows, OVER times as many as are wanted,
those are taken that are farthest from the ones taken so far, by their words or as the model sees
them (farthest-first traversal, Gonzalez 1985). Nothing is edited. Left out: the scores (curate.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tunesmith.data.checks.minhash import UnionFind
from tunesmith.data.checks.row_checks import ROW_CHECKS
from tunesmith.data.checks.text_stats import compute_text_stats, extract_row_texts
from tunesmith.data.dataset import Dataset
from tunesmith.data.neighbors import Neighbours
from tunesmith.data.sampler import permutation

OVERSAMPLING = 3
# of the perplexities: above this quantile an answer is noise more often than news
MAX_PERPLEXITY_QUANTILE = 0.95
MAX_SHOWN_NEIGHBOURS = 3  # neighbours
ROLE = "data"


@dataclass(frozen=True, eq=False)
class SelectionScores:
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
        return np.array(
            [row for row in range(len(self.perplexity_N)) if row not in self.problems],
            dtype=np.int64,
        )


def find_faults(dataset: Dataset, held_out: Mapping[str, Dataset]) -> dict[int, str]:
    """Row -> why it is left out, whatever a model says of it."""
    faults: dict[int, str] = {}
    for role, held_out_rows in held_out.items():
        for row in np.flatnonzero(np.isin(dataset.contents_N, held_out_rows.contents_N)).tolist():
            faults.setdefault(row, f"is also in {role}")
    duplicates = UnionFind(len(dataset))
    duplicates.union_equal(dataset.contents_N)
    stats = compute_text_stats({ROLE: dataset}, {})
    for row, _, first in stats.near_duplicates.iter_matches(ROLE) if stats.near_duplicates else ():
        duplicates.union(first, row)
    for row, first in enumerate(duplicates.find_roots().tolist()):
        if first != row:
            faults.setdefault(row, f"says what {dataset.get_id(first)} says")
    for row in range(len(dataset)):
        if row not in faults and (fault := _find_fault(dataset, row)):
            faults[row] = fault
    return faults


def _find_fault(dataset: Dataset, row: int) -> str:
    row_texts = extract_row_texts(dataset.read_example(row))
    kinds = (
        (name, kind) for name, check in ROW_CHECKS.items() for kind, _ in check.find(row_texts)
    )
    return next((f"{name}: {kind}" for name, kind in kinds), "")


def select_rows(
    dataset: Dataset, scores: SelectionScores, excluded: Mapping[int, str], max_rows: int
) -> tuple[np.ndarray, dict[int, str]]:
    """(rows that are kept, ascending, at most `keep`; row -> why it is not)."""
    reasons = {**scores.problems, **excluded}
    for row in np.flatnonzero(scores.neighbours.disputed_N).tolist():
        reasons.setdefault(row, _describe_dispute(dataset, scores.neighbours, row))
    is_scored_N = ~np.isnan(scores.perplexity_N)
    max_perplexity = (
        float(np.quantile(scores.perplexity_N[is_scored_N], MAX_PERPLEXITY_QUANTILE))
        if is_scored_N.any()
        else np.inf
    )
    for row in np.flatnonzero(is_scored_N).tolist():
        if scores.perplexity_N[row] > max_perplexity:
            reasons.setdefault(
                row,
                f"an unlikely answer: perplexity {scores.perplexity_N[row]:.3g}, over {max_perplexity:.3g}",
            )
        elif scores.difficulty_N[row] >= 1:
            reasons.setdefault(
                row, f"the question does not help: difficulty {scores.difficulty_N[row]:.3f}"
            )
    candidates = np.array(
        [row for row in range(len(dataset)) if row not in reasons], dtype=np.int64
    )
    candidates = candidates[np.argsort(-scores.difficulty_N[candidates], kind="stable")]
    best = candidates[: OVERSAMPLING * max_rows]
    for row in candidates[OVERSAMPLING * max_rows :].tolist():
        reasons[row] = (
            f"known already: difficulty {scores.difficulty_N[row]:.3f}, not among the best {len(best):,}"
        )
    positions, nearest = select_farthest(scores.vectors_NV[best], max_rows)
    for position, row in enumerate(best.tolist()):
        if position not in set(positions):
            reasons[row] = f"like {dataset.get_id(int(best[nearest[position]]))}, which is kept"
    return np.sort(best[positions]), reasons


def _describe_dispute(dataset: Dataset, neighbours: Neighbours, row: int) -> str:
    neighbour_ids = ", ".join(
        dataset.get_id(neighbour)
        for neighbour in neighbours.nearest_NK[row, :MAX_SHOWN_NEIGHBOURS].tolist()
    )
    similarities = f"{neighbours.neighbour_agreement_N[row]:.2f} alike, {neighbours.answer_similarity_N[row]:.2f} like its own"
    return f"the nearest questions have another answer: {neighbour_ids} and others ({similarities})"


def select_farthest(vectors: np.ndarray, max_rows: int) -> tuple[list[int], np.ndarray]:
    """(places that are kept, the first one first; for every place the kept one that is nearest to
    it)."""
    if not len(vectors):
        return [], np.empty(0, dtype=np.int64)
    selected, nearest = [0], np.zeros(len(vectors), dtype=np.int64)
    similarity = vectors @ vectors[0]
    similarity[0] = np.inf
    while len(selected) < min(max_rows, len(vectors)):
        position = int(similarity.argmin())
        selected.append(position)
        new_similarity = vectors @ vectors[position]
        nearest = np.where(new_similarity > similarity, position, nearest)
        similarity = np.maximum(similarity, new_similarity)
        similarity[position] = np.inf
    return selected, nearest


def select_baselines(scores: SelectionScores, num_rows: int, seed: int) -> dict[str, np.ndarray]:
    """Subsets of the same size that a choice has to beat: random rows, and those with the longest
    answers. Published methods often do not (Xia 2024, arXiv 2410.09335; Zhao 2024, arXiv
    2402.04833)."""
    usable = scores.usable_N
    longest = usable[np.argsort(-scores.answer_tokens_N[usable], kind="stable")[:num_rows]]
    return {"random": sample_rows(usable, num_rows, seed), "longest": np.sort(longest)}


def sample_rows(rows: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """Some of these rows, ascending."""
    return np.sort(rows[permutation(seed, 0, len(rows))[:num_rows]]) if len(rows) else rows
