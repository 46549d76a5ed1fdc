"""Intervals, tests and verdicts: whether a difference is statistically significant.

In: counts, item values, or a Comparison. Out: 95% two-sided intervals, p-values, verdicts in words.
Rates get Wilson's interval, differences of paired rates Bonett and Price's with a quantile of t,
everything else a t interval corrected for skewness, and wider for few items. Fewer than MIN_ITEMS
items get no verdict. Several comparisons are corrected together (Holm). Simulated coverage:
docs/results/coverage.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy.special import bdtr, stdtr, stdtrit

from tunesmith.core.events import Score
from tunesmith.core.types import Comparison

Z = 1.959963984540054  # 97.5% quantile of the standard normal distribution
Z_POWER = 0.8416212335729143  # its 80% quantile
ALPHA = 0.05
MIN_ITEMS = 6  # independent ones; fewer get no verdict: of five pairs, the exact p is 0.06 or more
MIN_SEQUENCE = 30  # values from which a confidence sequence holds
# Few items show neither the tail nor the variance of a skewed distribution. These numbers bring the
# coverage of normal and skewed items to 95% +- 1.5 from FEW_ITEMS on (docs/results/coverage.md).
FEW_ITEMS = 5
SKEWNESS_CORRECTION = 3.0  # divided by the number of items
FAR_END_FACTOR = 2.2  # at FEW_ITEMS; falls with their power of 2.5
LOST_DEGREES = 1.5  # at FEW_ITEMS; falls with their power of 6
NO_DIFFERENCE = "no difference shown"
TOO_FEW_ITEMS = "too few items to tell"
SEEDS_UNKNOWN = "seed noise unknown"  # one seed each: items alone would say better or worse
SAME = 1e-9  # changes below it are rounding
SUM_DIGITS = 9  # with which sums of changes are the same
MAX_SUMS = 2**16  # of 16 changes of different sizes, or of any number on a common step
PADDING = 2  # values at either bound; with one, 5% of the runs of a rate of 0.9 are not covered


# ---------------------------------------------------------------- intervals


def compute_wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Return the score interval of a rate (Wilson 1927): within [0, 1], and not empty at 0 of n."""
    rate = successes / n
    shrink = 1 + Z**2 / n
    center = (rate + Z**2 / (2 * n)) / shrink
    half = Z * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2)) / shrink
    # The ends are exactly 0 and 1, without rounding errors.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return low, high


def compute_padded_interval(
    values: np.ndarray,
    weights: np.ndarray,
    strata: Sequence[np.ndarray],
    bounds: tuple[float, float],
) -> tuple[float, float]:
    """Return an interval of the mean over strata of the weighted means of bounded values.

    One more value at either bound, spread over the strata, keeps equal values from looking certain;
    its weight is the mean weight that an item finds in its group. For differences of paired rates
    in one stratum this is the interval of Bonett and Price (2012): Wald's with one more pair of
    either kind. The quantile is that of t: with the normal one, few pairs that nearly all differ
    are covered in 88%.
    """
    count = len(strata)
    total = sum(len(rows) for rows in strata)
    mean = variance = 0.0
    degrees = 1.0 + count
    for rows in strata:
        share = len(rows) / total
        unit = float(weights[rows] @ weights[rows] / weights[rows].sum())
        padded = np.append(values[rows], bounds)
        parts = np.append(weights[rows], (share * unit, share * unit))
        size = parts.sum()
        stratum_mean = float(parts @ padded / size)
        squares = np.append(weights[rows] ** 2, (share * unit**2, share * unit**2))
        num = len(rows) + 2 * share
        correction = num / (num - (1 - 1 / count))  # of many strata, each loses a degree
        spread = float(squares @ (padded - stratum_mean) ** 2) / size**2
        mean += stratum_mean / count
        variance += correction * spread / count**2
        degrees += _estimate_degrees_of(weights[rows])
    half = compute_t_quantile(degrees) * math.sqrt(variance)
    return mean - half, mean + half


def compute_constant_interval(difference: float, n: int) -> tuple[float, float]:
    """Return the interval of the mean of n equal differences, which show no spread: Student's, as
    wide as its p is that of the sign test, 2 / 2**n. It excludes 0 from 6 on."""
    statistic = -float(stdtrit(n - 1, 2.0**-n))  # infinite for more than 1,074 items
    half = abs(difference) * compute_t_quantile(n - 1) / statistic
    return difference - half, difference + half


@dataclass(frozen=True)
class _Moments:
    """Estimated moments of the mean of `size` items; `degrees` of freedom of its variance."""

    mean: float
    variance: float
    third: float
    degrees: float
    size: int


def compute_mean_interval(
    values: np.ndarray, weights: np.ndarray, strata: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Return the interval of the mean over strata of each stratum's weighted mean.

    A t interval whose ends follow the skewness of the items, by Hall's transformation (1992): the
    end on the long tail's side is that end or, with few items, beyond it; the other lies halfway
    between t's and Hall's. `strata` are arrays of item indices.
    """
    parts = [_estimate_moments(values[rows], weights[rows]) for rows in strata]
    count = len(parts)
    mean = sum(part.mean for part in parts) / count
    variance = sum(part.variance for part in parts) / count**2
    # Rounding alone is no variance.
    if variance <= (1e-12 * float(np.abs(values).max())) ** 2:
        return mean, mean
    # Welch and Satterthwaite
    shares = [part.variance / count**2 / variance for part in parts]
    degrees = 1 / sum(share**2 / part.degrees for share, part in zip(shares, parts, strict=True))
    size = 1 + 1 / sum(
        share**2 / max(1, part.size - 1) for share, part in zip(shares, parts, strict=True)
    )
    third = sum(part.third for part in parts) / count**3
    # The sample skewness of few items is too small.
    skewness = third / variance**1.5 * (1 + SKEWNESS_CORRECTION / size)
    scarcity = min(1.0, FEW_ITEMS / size)
    quantile = compute_t_quantile(max(1.0, degrees - LOST_DEGREES * scarcity**6))
    error = math.sqrt(variance)
    low = -_combine_ends(quantile, _invert_hall(quantile, skewness), scarcity)
    high = _combine_ends(quantile, -_invert_hall(-quantile, skewness), scarcity)
    return mean + error * low, mean + error * high


def _estimate_moments(values: np.ndarray, weights: np.ndarray) -> _Moments:
    """Return the moments of a weighted mean, of which equal weights are the plain case."""
    shares = weights / weights.sum()
    mean = float(shares @ values)
    deviations = shares * (values - mean)
    factors = 1 / np.maximum(1 - shares, 1e-9)
    variance = float((factors * deviations**2).sum())
    equal = 1 / float(shares @ shares)  # the number of items of equal weight
    correction = equal**2 / ((equal - 1) * (equal - 2)) if equal >= 3 - 1e-9 else 0.0
    third = correction * float((deviations**3).sum())
    degrees = _estimate_degrees(shares, factors * shares**2)
    return _Moments(mean, variance, third, degrees, int(np.count_nonzero(shares)))


def _estimate_degrees_of(weights: np.ndarray) -> float:
    shares = weights / weights.sum()
    return _estimate_degrees(shares, shares**2 / np.maximum(1 - shares, 1e-9))


def _estimate_degrees(shares: np.ndarray, factors: np.ndarray) -> float:
    """Return the degrees of freedom of a variance that is the sum of factors * residuals^2, by
    Bell and McCaffrey (2002): Satterthwaite's, for normal items of equal variance. A few long
    texts among short ones leave fewer than their number suggests.

    The covariance of two residuals is square_sum - shares_i - shares_j, and 1 more for i = j."""
    if shares.max() > 0.99:
        return 1.0  # the limit, which rounding would miss
    square_sum = float(shares @ shares)
    variances = 1 - 2 * shares + square_sum
    moments = [float(factors @ shares**power) for power in range(3)]
    crossed = (
        (square_sum * moments[0]) ** 2
        + 2 * moments[0] * moments[2]
        - 4 * square_sum * moments[0] * moments[1]
        + 2 * moments[1] ** 2
    )
    squares = float(factors**2 @ (variances**2 - (variances - 1) ** 2)) + crossed
    return max(1.0, float(factors @ variances) ** 2 / squares)


def _invert_hall(quantile: float, skewness: float) -> float:
    """Return the t statistic that Hall's cubic transformation takes to `quantile`."""
    slope = skewness / 3
    shifted = quantile - skewness / 6
    if abs(slope) < 1e-6:
        return shifted
    return float((np.cbrt(1 + 3 * slope * shifted) - 1) / slope)


def _combine_ends(t_end: float, hall_end: float, scarcity: float) -> float:
    """Return Hall's end, or farther, where it is the farther one; else the middle of both.

    scarcity: 1 for FEW_ITEMS items, towards 0 for many."""
    distance = hall_end - t_end
    if distance >= 0:
        return t_end + (1 + FAR_END_FACTOR * scarcity**2.5) * distance
    return t_end + (1 + scarcity**6) / 2 * distance


def compute_confidence_sequence(
    count_N: np.ndarray,
    sum_N: np.ndarray,
    square_sum_N: np.ndarray,
    bounds: tuple[float, float],
    *,
    alpha: float = ALPHA,
    narrowest: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (low, high) of a mean from the count, the sum and the sum of squares of the values so
    far. It may be read after every value: the mean lies outside at any time in at most a share
    `alpha` of all runs.

    bounds: of the values. narrowest: the number of values at which the interval is the narrowest
    for its kind. It is valid from MIN_SEQUENCE values on: the asymptotic confidence sequence of
    Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2024), theorem 2.2 and its choice of rho, on
    values with PADDING more at either bound, since the first thirty of rare events are often all
    equal, and have no variance.
    """
    size_N = count_N + 2 * PADDING
    mean_N = (sum_N + PADDING * sum(bounds)) / size_N
    padding_squares = PADDING * (bounds[0] ** 2 + bounds[1] ** 2)
    square_N = (square_sum_N + padding_squares) / size_N
    variance_N = np.maximum(0.0, square_N - mean_N**2) * size_N / (size_N - 1)
    log_term = -2 * math.log(alpha)
    spread_N = count_N * (log_term + math.log(log_term + 1)) / narrowest  # n rho^2
    factor_N = 2 * (spread_N + 1) / (count_N * spread_N) * np.log(np.sqrt(spread_N + 1) / alpha)
    half_N = np.sqrt(variance_N * factor_N)
    return np.maximum(bounds[0], mean_N - half_N), np.minimum(bounds[1], mean_N + half_N)


def compute_t_quantile(degrees: float) -> float:
    """Return the 97.5% quantile of Student's t; `degrees` of freedom are at least 1."""
    return float(stdtrit(degrees, 1 - ALPHA / 2))


# ---------------------------------------------------------------- tests


def compute_excess_p(gains: int, losses: int) -> float:
    """Return the one-sided exact p of McNemar's test (1947): that of so many `gains` or more, if
    gains and losses were equally likely."""
    return float(bdtr(losses, gains + losses, 0.5))


def compute_mcnemar_p(gains: int, losses: int) -> float:
    """Return the exact two-sided p of McNemar's test: the binomial test of the changed items."""
    return min(1.0, 2 * compute_excess_p(max(gains, losses), min(gains, losses)))


def compute_sign_flip_p(changes: np.ndarray) -> float | None:
    """Return the exact two-sided p of a sum whose terms might as well have the other sign (Fisher
    1935); of changes of +-1 it is McNemar's. None if there are too many sums: the interval holds
    by itself."""
    sizes = np.abs(changes)
    largest = float(sizes.max(initial=0.0))
    sums = np.zeros(1)
    shares = np.ones(1)
    for size in sizes[sizes > SAME * largest] / (largest or 1.0):
        both = np.concatenate([sums + size, sums - size]).round(SUM_DIGITS)
        sums, index_S = np.unique(both, return_inverse=True)
        shares = np.bincount(index_S, np.tile(shares / 2, 2))
        if len(sums) > MAX_SUMS:
            return None
    is_reached_S = np.abs(sums) >= abs(float(changes.sum())) / (largest or 1.0) - 1e-6
    return min(1.0, float(shares[is_reached_S].sum()))


def count_pairs(size: int) -> int:
    return size * (size - 1) // 2


def adjust_p_values(p_values: Sequence[float], num_tests: int | None = None) -> tuple[float, ...]:
    """Return p-values adjusted for multiple comparisons (Holm 1979), in the order given.

    num_tests: if these were chosen by the same data, the number that they were chosen from, such as
    all pairs for the comparisons with the best. Those not given count as larger than these, which
    can only raise the result."""
    num_tests = max(len(p_values), num_tests or 0)
    adjusted = [0.0] * len(p_values)
    running_max = 0.0
    ascending = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(ascending):
        running_max = max(running_max, min(1.0, (num_tests - rank) * p_values[index]))
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
    """Return the exact p of grades, else that of the interval with Student's tail.

    The end towards 0 counts: p is below 0.05 if the interval excludes 0. A normal tail would be too
    thin for Holm's correction, which reads it far out: of simulated differences of 5 items around
    0, it puts 1.0% below 0.05 / 32.
    """
    exact = comparison.p_value or 0.0
    difference = comparison.difference
    low = comparison.low
    high = comparison.high
    degrees = max(1.0, comparison.after.independent - 1)
    if comparison.seed_low is not None and comparison.seed_high is not None:
        low = comparison.seed_low
        high = comparison.seed_high
        degrees = comparison.seed_degrees or degrees
    elif comparison.p_value is not None:
        return exact
    half = difference - low if difference > 0 else high - difference
    if half <= 0:
        return 1.0 if difference == 0 else 0.0
    statistic = abs(difference) / half * compute_t_quantile(degrees)
    return max(exact, 2 * float(stdtr(degrees, -statistic)))


# ---------------------------------------------------------------- verdicts


def is_shown_above(score: Score, limit: float) -> bool:
    """Return whether a score lies above a limit with its whole interval, and on enough items."""
    return score.independent >= MIN_ITEMS and score.low > limit


def judge_comparison(comparison: Comparison) -> str:
    """Return better or worse if the interval excludes 0 and an exact p, if any, is below 0.05.

    Fewer than MIN_ITEMS items get neither.
    """
    if comparison.after.independent < MIN_ITEMS:
        return TOO_FEW_ITEMS
    low, high = comparison.interval
    if low <= 0 <= high or (comparison.p_value is not None and comparison.p_value >= ALPHA):
        return NO_DIFFERENCE
    if comparison.seed_low is not None and comparison.seed_degrees is None:
        return SEEDS_UNKNOWN
    return "better" if (low > 0) == comparison.higher_is_better else "worse"


def judge_comparisons(
    comparisons: Sequence[Comparison], num_tests: int | None = None
) -> tuple[str, ...]:
    """Return the verdict on each comparison, marked where it does not survive Holm correction for
    these, or for the `num_tests` that they were chosen from."""
    num_tests = max(len(comparisons), num_tests or 0)
    p_values = [compute_p_value(comparison) for comparison in comparisons]
    adjusted_p = adjust_p_values(p_values, num_tests)
    verdicts: list[str] = []
    for comparison, p in zip(comparisons, adjusted_p, strict=True):
        verdict = judge_comparison(comparison)
        if verdict in ("better", "worse") and p >= ALPHA:
            verdict += f", but not after Holm correction ({num_tests} comparisons)"
        verdicts.append(verdict)
    return tuple(verdicts)


def describe_evidence(comparison: Comparison) -> str:
    """Return the counts and p behind a verdict, and what a null result could have shown."""
    parts: list[str] = []
    after = comparison.after
    if comparison.improved is not None:
        parts.append(f"{comparison.improved} fixed, {comparison.worsened} broken")
    if comparison.p_value is not None:
        is_mcnemar = comparison.improved is not None and not after.groups
        parts.append(f"{'McNemar' if is_mcnemar else 'sign-flip'} {format_p(comparison.p_value)}")
    verdict = judge_comparison(comparison)
    if verdict == TOO_FEW_ITEMS:
        unit = " groups" if after.groups else ""
        parts.append(f"{after.independent} of at least {MIN_ITEMS}{unit}")
    if verdict == SEEDS_UNKNOWN:
        ends = f"[{comparison.seed_low:+.3f}, {comparison.seed_high:+.3f}]"
        parts.append(f"{ends} with what seeds usually add")
    if verdict == NO_DIFFERENCE and comparison.min_detectable:
        parts.append(f"minimum detectable difference {comparison.min_detectable:.2g}")
    return "; ".join(parts)


def format_p(p_value: float) -> str:
    """Return `p = 0.31`, `p = 0.042` or `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
