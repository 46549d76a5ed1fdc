"""Intervals, tests and verdicts: whether a difference is statistically significant.

In: counts, item values, or a Comparison. Out: 95% two-sided intervals, p-values, verdicts in words.
Rates get Wilson's interval, differences of paired rates Bonett and Price's, everything else a
bootstrap over items. Several comparisons are corrected together (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import numpy as np

from tunesmith.core.types import Comparison

Z = 1.959963984540054  # 97.5% quantile of the standard normal distribution
Z_POWER = 0.8416212335729143  # its 80% quantile
ALPHA = 0.05
NUM_RESAMPLES = 10_000
CHUNK_VALUES = 2**22  # resampled indices at once: 32 MB
NO_DIFFERENCE = "no difference shown"


# ---------------------------------------------------------------- intervals


def compute_wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Return the score interval of a rate (Wilson 1927): within [0, 1], and not empty at 0 of n."""
    rate = successes / n
    shrink = 1 + Z**2 / n
    centre = (rate + Z**2 / (2 * n)) / shrink
    half = Z * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2)) / shrink
    # The ends are exactly 0 and 1, without rounding errors.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def compute_paired_rate_interval(gains: int, losses: int, n: int) -> tuple[float, float]:
    """Return the interval of (gains - losses) / n over n pairs of 0/1 values.

    Bonett and Price (2012): a Wald interval with one more pair of either kind. Unlike a bootstrap,
    it is not empty when all pairs agree, or when all differ in the same way.
    """
    gain = (gains + 1) / (n + 2)
    loss = (losses + 1) / (n + 2)
    half = Z * math.sqrt((gain + loss - (gain - loss) ** 2) / (n + 2))
    return max(-1.0, gain - loss - half), min(1.0, gain - loss + half)


def bootstrap_interval(
    values: np.ndarray, weights: np.ndarray, groups: Sequence[np.ndarray], *, seed: int
) -> tuple[float, float]:
    """Return the percentile interval of the mean over groups of each group's weighted mean.

    Items are resampled within their group (arrays of item indices). Deviations are widened by
    sqrt(n / (n - 1)), since a resample of n items varies that much less than a new sample.
    """
    rng = np.random.default_rng(seed)
    means = np.mean([_resample_means(values[rows], weights[rows], rng) for rows in groups], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _resample_means(
    values: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the weighted means of NUM_RESAMPLES samples with replacement."""
    n = len(values)
    means: list[np.ndarray] = []
    chunk_rows = max(1, CHUNK_VALUES // n)
    for start in range(0, NUM_RESAMPLES, chunk_rows):
        num_rows = min(chunk_rows, NUM_RESAMPLES - start)
        indices = rng.integers(n, size=(num_rows, n))
        sampled_weights = weights[indices]
        means.append((sampled_weights * values[indices]).sum(axis=1) / sampled_weights.sum(axis=1))
    centre = np.average(values, weights=weights)
    widened = centre + (np.concatenate(means) - centre) * math.sqrt(n / (n - 1))
    return np.clip(widened, values.min(), values.max())


# ---------------------------------------------------------------- tests


def compute_mcnemar_p(gains: int, losses: int) -> float:
    """Return the exact two-sided p of McNemar's test (1947): the binomial test of the items that
    changed."""
    changed = gains + losses
    tail = sum(math.comb(changed, k) for k in range(min(gains, losses) + 1))
    return min(1.0, 2 * tail / 2**changed)


def adjust_p_values(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return p-values adjusted for multiple comparisons (Holm 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    running_max = 0.0
    ascending = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(ascending):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running_max
    return tuple(adjusted)


def compute_standard_error(low: float, high: float) -> float:
    """Return the standard error of a normal estimate with this 95% interval."""
    return (high - low) / (2 * Z)


def compute_robust_sd(values: Sequence[float]) -> float:
    """Return the standard deviation estimated by the median absolute deviation."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def compute_detectable_difference(low: float, high: float) -> float:
    """Return the difference that a repetition would show with 80% power: (1.96 + 0.84) standard
    errors of a paired difference with this 95% interval."""
    return (Z + Z_POWER) * compute_standard_error(low, high)


def compute_p_value(comparison: Comparison) -> float:
    """Return McNemar's exact p for 0/1 items, else a normal approximation from the interval."""
    if comparison.p_value is not None:
        return comparison.p_value
    error = compute_standard_error(comparison.low, comparison.high)
    if not error:
        return 1.0 if comparison.difference == 0 else 0.0
    return math.erfc(abs(comparison.difference) / error / math.sqrt(2))


# ---------------------------------------------------------------- verdicts


def judge_comparison(comparison: Comparison) -> str:
    """Return better or worse if the interval excludes 0 and an exact p, if any, is below 0.05."""
    low, high = comparison.low, comparison.high
    if low <= 0 <= high or (comparison.p_value is not None and comparison.p_value >= ALPHA):
        return NO_DIFFERENCE
    return "better" if (low > 0) == comparison.higher_is_better else "worse"


def judge_comparisons(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Return the verdict on each comparison, marked where it does not survive Holm correction."""
    adjusted_p = adjust_p_values([compute_p_value(comparison) for comparison in comparisons])
    verdicts: list[str] = []
    for comparison, p in zip(comparisons, adjusted_p, strict=True):
        verdict = judge_comparison(comparison)
        if verdict != NO_DIFFERENCE and p >= ALPHA:
            verdict += f", but not after Holm correction ({len(comparisons)} comparisons)"
        verdicts.append(verdict)
    return tuple(verdicts)


def describe_evidence(comparison: Comparison) -> str:
    """Return the counts and p behind a verdict, and what a null result could have shown."""
    parts: list[str] = []
    if comparison.p_value is not None:
        counts = f"{comparison.improved} improved, {comparison.worsened} worsened"
        parts.append(f"{counts}; McNemar {format_p(comparison.p_value)}")
    if judge_comparison(comparison) == NO_DIFFERENCE and comparison.min_detectable:
        parts.append(f"minimum detectable difference {comparison.min_detectable:.2g}")
    return "; ".join(parts)


def format_p(p_value: float) -> str:
    """Return `p = 0.31`, `p = 0.042` or `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
