"""Select training rows: by quality, then by diversity, with a reason for every excluded row.

    Dataset -> find_faults (without a model)
    Dataset, scores of a model, faults -> select_rows -> rows, and reasons for the others

Quality is the instruction-following difficulty (IFD) of Li 2023 (arXiv 2308.12032): the perplexity
of the answer given its question, over the perplexity of the answer alone. At 1 and above the
question does not help, and the row is excluded. Below, a high value means much to learn and a low
one X as many as wanted, those are selected that are farthest from the ones selected
before (farthest-first traversal, Gonzalez 1985), by hidden states of their questions. Rows are
never edited. Left out: the scores (advise/curate.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tunesmith.data.checks.minhash import UnionFind
from tunesmith.data.checks.row_checks import ROW_CHECKS, RowCheck
from tunesmith.data.checks.text_stats import compute_text_stats, extract_row_texts
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import permute_rows

OVERSAMPLING = 3
PERSONAL_CHECK = "personal"  # of ROW_CHECKS
MAX_PERPLEXITY_QUANTILE = 0.95  # above it, an answer is noise more often than new information
ROLE = "data"


@dataclass(frozen=True, eq=False)
class SelectionScores:
    """Scores of the base model for N rows; nan if a row has no answer to score."""

    perplexity_N: np.ndarray  # of the last answer given its question
    difficulty_N: np.ndarray  # that, over the perplexity of the answer alone
    answer_tokens_N: np.ndarray  # int64
    problems: Mapping[int, str]  # rows that cannot be trained on -> reason
    vectors_NV: np.ndarray  # float32 features of length 1, or 0 if unknown

    @property
    def usable_N(self) -> np.ndarray:
        """The rows that can be trained on, int64."""
        rows = [row for row in range(len(self.perplexity_N)) if row not in self.problems]
        return np.array(rows, dtype=np.int64)


def find_faults(
    dataset: Dataset, held_out: Mapping[str, Dataset], *, allow_personal: bool = False
) -> dict[int, str]:
    """Return row -> reason for rows that are excluded whatever a model says.

    With `allow_personal`, addresses, phone numbers and the like are no fault."""
    checks = {name: check for name, check in ROW_CHECKS.items() if name != PERSONAL_CHECK}
    if not allow_personal:
        checks = ROW_CHECKS
    faults: dict[int, str] = {}
    for role, held_out_rows in held_out.items():
        is_shared_N = np.isin(dataset.contents_N, held_out_rows.contents_N)
        for row in np.flatnonzero(is_shared_N).tolist():
            faults.setdefault(row, f"is also in {role}")
    duplicates = UnionFind(len(dataset))
    duplicates.union_equal(dataset.contents_N)
    stats = compute_text_stats({ROLE: dataset}, {})
    if stats.near_duplicates:
        for row, _, first in stats.near_duplicates.iter_matches(ROLE):
            duplicates.union(first, row)
    for row, first in enumerate(duplicates.find_roots().tolist()):
        if first != row:
            faults.setdefault(row, f"duplicate of {dataset.get_id(first)}")
    for row in range(len(dataset)):
        if row not in faults and (fault := _find_fault(dataset, row, checks)):
            faults[row] = fault
    return faults


def _find_fault(dataset: Dataset, row: int, checks: Mapping[str, RowCheck]) -> str:
    """Return the first finding of the row checks, "" if there is none."""
    row_texts = extract_row_texts(dataset.read_example(row))
    for name, check in checks.items():
        for kind, _ in check.find(row_texts):
            return f"{name}: {kind}"
    return ""


def select_rows(
    dataset: Dataset, scores: SelectionScores, excluded: Mapping[int, str], max_rows: int
) -> tuple[np.ndarray, dict[int, str]]:
    """Return (at most `max_rows` selected rows, ascending; row -> reason for the others)."""
    reasons = {**scores.problems, **excluded}
    is_scored_N = ~np.isnan(scores.perplexity_N)
    max_perplexity = np.inf
    if is_scored_N.any():
        scored = scores.perplexity_N[is_scored_N]
        max_perplexity = float(np.quantile(scored, MAX_PERPLEXITY_QUANTILE))
    for row in np.flatnonzero(is_scored_N).tolist():
        perplexity = scores.perplexity_N[row]
        difficulty = scores.difficulty_N[row]
        if perplexity > max_perplexity:
            reason = f"unlikely answer: perplexity {perplexity:.3g}, above {max_perplexity:.3g}"
            reasons.setdefault(row, reason)
        elif difficulty >= 1:
            reasons.setdefault(row, f"the question does not help: difficulty {difficulty:.3f}")
    candidates = np.array([row for row in range(len(dataset)) if row not in reasons], np.int64)
    hardest_first = np.argsort(-scores.difficulty_N[candidates], kind="stable")
    candidates = candidates[hardest_first]
    best = candidates[: OVERSAMPLING * max_rows]
    for row in candidates[OVERSAMPLING * max_rows :].tolist():
        difficulty = f"difficulty {scores.difficulty_N[row]:.3f}"
        reasons[row] = f"little to learn: {difficulty}, not among the hardest {len(best):,}"
    positions, nearest = select_farthest(scores.vectors_NV[best], max_rows)
    selected = set(positions)
    for position, row in enumerate(best.tolist()):
        if position not in selected:
            similar_id = dataset.get_id(int(best[nearest[position]]))
            reasons[row] = f"similar to {similar_id}, which is selected"
    return np.sort(best[positions]), reasons


def select_farthest(vectors_KV: np.ndarray, max_rows: int) -> tuple[list[int], np.ndarray]:
    """Return (selected positions, int64 [K] with the nearest selected position of each)."""
    if not len(vectors_KV):
        return [], np.empty(0, dtype=np.int64)
    selected = [0]
    nearest_K = np.zeros(len(vectors_KV), dtype=np.int64)
    similarity_K = vectors_KV @ vectors_KV[0]
    similarity_K[0] = np.inf
    while len(selected) < min(max_rows, len(vectors_KV)):
        position = int(similarity_K.argmin())
        selected.append(position)
        new_similarity_K = vectors_KV @ vectors_KV[position]
        nearest_K = np.where(new_similarity_K > similarity_K, position, nearest_K)
        similarity_K = np.maximum(similarity_K, new_similarity_K)
        similarity_K[position] = np.inf
    return selected, nearest_K


def select_baselines(scores: SelectionScores, num_rows: int, seed: int) -> dict[str, np.ndarray]:
    """Return subsets of the same size that a selection must beat: random rows, longest answers.

    Published methods often do not beat them (Xia 2024, arXiv 2410.09335; Zhao 2024, arXiv
    2402.04833)."""
    usable = scores.usable_N
    longest_first = np.argsort(-scores.answer_tokens_N[usable], kind="stable")
    longest = usable[longest_first[:num_rows]]
    return {"random": sample_rows(usable, num_rows, seed), "longest": np.sort(longest)}


def sample_rows(rows: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """Return a random sample of rows, ascending."""
    return np.sort(rows[permute_rows(seed, 0, len(rows))[:num_rows]]) if len(rows) else rows
