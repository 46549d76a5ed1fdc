"""Intervals, all 95% and two-sided: Wilson's for a rate, Bonett and Price's for the difference of
paired rates, and a bootstrap for everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tunesmith.evaluate.significance import Z

NUM_RESAMPLES = 10_000
CHUNK_VALUES = 2**22  # random numbers at once: 32 MB


def compute_wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Interval of a rate (Wilson 1927). Stays inside [0, 1] and is not empty at 0 of n."""
    rate, shrink = successes / n, 1 + Z**2 / n
    centre = (rate + Z**2 / (2 * n)) / shrink
    half = Z * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2)) / shrink
    # Exactly 0 and 1 at the ends, where rounding would leave a trace.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def compute_paired_rate_interval(gains: int, losses: int, n: int) -> tuple[float, float]:
    """Interval of (gains - losses) / n over n pairs of 0/1 values (Bonett and Price 2012): a Wald
    interval with one more pair of either kind. Not empty when all pairs agree, or all differ alike,
    where a bootstrap would be."""
    gain, loss = (gains + 1) / (n + 2), (losses + 1) / (n + 2)
    half = Z * math.sqrt((gain + loss - (gain - loss) ** 2) / (n + 2))
    return max(-1.0, gain - loss - half), min(1.0, gain - loss + half)


def bootstrap_interval(
    values: np.ndarray, weights: np.ndarray, groups: Sequence[np.ndarray], *, seed: int
) -> tuple[float, float]:
    """Percentile interval of the mean over groups of each group's weighted mean; items are drawn
    within their group.

    Deviations are widened by sqrt(n / (n - 1)) of the group: a resample varies that much less than
    a new sample would."""
    rng = np.random.default_rng(seed)
    means = np.mean([_resample_means(values[rows], weights[rows], rng) for rows in groups], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _resample_means(
    values: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """RESAMPLES weighted means of as many items as there are, drawn with replacement."""
    n, means = len(values), []
    rows = max(1, CHUNK_VALUES // n)
    for start in range(0, NUM_RESAMPLES, rows):
        indices = rng.integers(n, size=(min(rows, NUM_RESAMPLES - start), n))
        sampled_weights = weights[indices]
        means.append((sampled_weights * values[indices]).sum(axis=1) / sampled_weights.sum(axis=1))
    centre = np.average(values, weights=weights)
    widened = centre + (np.concatenate(means) - centre) * math.sqrt(n / (n - 1))
    return np.clip(widened, values.min(), values.max())
