"""How far reviewers agree on the verdicts of the same rows.

    verdicts of each row -> measure_agreement -> Agreement: share, Krippendorff's alpha, Gwet's AC1

Alpha (Krippendorff 2011, nominal data) and AC1 (Gwet 2008) correct for chance. Alpha is low where
nearly all rows have the same verdict; AC1 is not. Both allow any number of reviewers, and rows that
not all have seen; with two, alpha is near Cohen's kappa. Intervals are bootstrapped over rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_ROWS = 10  # with several verdicts
NUM_DRAWS = 2_000
LEVEL = 0.95


@dataclass(frozen=True)
class Coefficient:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Coefficients are None for fewer than MIN_ROWS rows, and where all verdicts are the same."""

    rows: int  # with verdicts of two reviewers or more
    equal_rows: int  # with one verdict
    share: Coefficient | None  # of the pairs of verdicts on one row that are equal
    alpha: Coefficient | None
    ac1: Coefficient | None


def measure_agreement(verdicts: Sequence[Sequence[str]]) -> Agreement | None:
    """Return the agreement, given the verdicts of each row; None if no row has two."""
    names = sorted({name for row in verdicts for name in row})
    counts = [list(map(Counter(row).__getitem__, names)) for row in verdicts if row]
    counts_NK = np.array(counts, dtype=np.float64).reshape(-1, len(names))
    pairs_NK = counts_NK[counts_NK.sum(axis=1) >= 2]
    if not len(pairs_NK):
        return None
    num_equal = int((np.count_nonzero(pairs_NK, axis=1) == 1).sum())
    if len(pairs_NK) < MIN_ROWS:
        return Agreement(len(pairs_NK), num_equal, None, None, None)
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(counts_NK), size=len(counts_NK)) for _ in range(NUM_DRAWS))
    values_DC = np.array([compute_agreement(counts_NK[draw_N]) for draw_N in draws])
    coefficients: list[Coefficient | None] = []
    for value, values_D in zip(compute_agreement(counts_NK), values_DC.T, strict=True):
        if np.isnan(value):
            coefficients.append(None)
        else:
            low, high = np.nanquantile(values_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            coefficients.append(Coefficient(value, float(low), float(high)))
    return Agreement(len(pairs_NK), num_equal, *coefficients)


def compute_agreement(counts_NK: np.ndarray) -> tuple[float, float, float]:
    """Return the share of equal pairs, alpha and AC1; NaN where all verdicts are the same one, or
    no row has two. `counts_NK` has how many reviewers gave each of N rows each of K verdicts."""
    sizes_N = counts_NK.sum(axis=1)
    pairs_NK = counts_NK[sizes_N >= 2]
    if not len(pairs_NK):
        return np.nan, np.nan, np.nan
    pair_sizes_N = pairs_NK.sum(axis=1)
    equal_N = (pairs_NK * (pairs_NK - 1)).sum(axis=1)
    share = float((equal_N / (pair_sizes_N * (pair_sizes_N - 1))).mean())
    totals_K = pairs_NK.sum(axis=0)
    total = totals_K.sum()
    observed = 1 - (equal_N / (pair_sizes_N - 1)).sum() / total
    expected = 1 - (totals_K * (totals_K - 1)).sum() / (total * (total - 1))
    prevalence_K = (counts_NK / sizes_N[:, None]).mean(axis=0)
    num_verdicts = np.count_nonzero(prevalence_K)
    if expected == 0 or num_verdicts < 2:
        return share, np.nan, np.nan
    chance = (prevalence_K * (1 - prevalence_K)).sum() / (num_verdicts - 1)
    return share, float(1 - observed / expected), float((share - chance) / (1 - chance))
