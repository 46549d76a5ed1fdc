"""Moments, p-values and verdicts, compared with scipy and with formulas written another way."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from tunesmith.core.events import Score
from tunesmith.core.types import Comparison
from tunesmith.evaluate.statistics import (
    _estimate_moments,
    compute_detectable_difference,
    compute_mean_interval,
    compute_p_value,
    compute_padded_interval,
    compute_robust_sd,
    compute_standard_error,
    format_p,
    is_shown_above,
    judge_comparison,
    judge_comparisons,
)


def everything(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    return values, np.ones(len(values)), [np.arange(len(values))]


def make_comparison_of(
    difference: float, low: float, high: float, *, n: int = 80, **changed: Any
) -> Comparison:
    score = Score("task", "loss", 1.0, 0.9, 1.1, n, 0)
    return Comparison("task", "loss", score, score, difference, low, high, True, **changed)


@pytest.mark.parametrize("n", [2, 3, 4, 11, 60])
def test_moments_of_equal_weights_are_those_of_the_mean(n: int) -> None:
    values = np.random.default_rng(n).gamma(2.0, size=n)
    moments = _estimate_moments(values, np.full(n, 3.0))
    assert moments.mean == pytest.approx(values.mean())
    assert moments.variance == pytest.approx(values.var(ddof=1) / n)
    third = 0.0 if n < 3 else float(stats.kstat(values, 3)) / n**2
    assert moments.third == pytest.approx(third)
    assert moments.degrees == pytest.approx(n - 1)


def test_moments_of_unequal_weights() -> None:
    values = np.array([1.0, 4.0, 2.0, 8.0])
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    moments = _estimate_moments(values, weights)
    shares = weights / 10
    mean = (1 + 8 + 6 + 32) / 10
    size = 1 / (0.01 + 0.04 + 0.09 + 0.16)
    assert moments.mean == pytest.approx(mean)
    expected = sum(w**2 * (v - mean) ** 2 / (1 - w) for w, v in zip(shares, values, strict=True))
    assert moments.variance == pytest.approx(expected)
    third = sum(w**3 * (v - mean) ** 3 for w, v in zip(shares, values, strict=True))
    assert moments.third == pytest.approx(third * size**2 / ((size - 1) * (size - 2)))
    assert moments.size == len(values)
    few = _estimate_moments(values[:3], np.array([1.0, 1.0, 4.0]))
    assert few.third == 0.0  # as of two items
    alone = _estimate_moments(values[:2], np.array([1.0, 1e-20]))
    assert (alone.mean, alone.degrees) == (pytest.approx(1.0), 1.0)
    assert math.isfinite(alone.variance)


@pytest.mark.parametrize(
    "weights",
    [[1, 1, 1, 1, 1, 1], [3, 1, 4, 1, 5, 9, 2, 6], [1, 60], [1, 2, 500, 3], [40, 50, 1, 1, 1, 0]],
)
def test_degrees_of_freedom_of_a_weighted_mean_are_bell_and_mccaffreys(weights: list[int]) -> None:
    """With matrices: the variance is x' A x, of independent x of equal variance."""
    shares = np.array(weights, float) / sum(weights)
    residuals = np.eye(len(shares)) - np.outer(np.ones(len(shares)), shares)
    form = residuals.T @ np.diag(shares**2 / (1 - shares)) @ residuals
    expected = np.trace(form) ** 2 / np.trace(form @ form)
    moments = _estimate_moments(np.arange(len(shares), dtype=float), np.array(weights, float))
    assert moments.degrees == pytest.approx(expected, rel=1e-6)
    assert moments.size == np.count_nonzero(weights)


def test_one_text_with_nearly_all_tokens_leaves_one_degree_of_freedom() -> None:
    degrees = [
        _estimate_moments(np.arange(6.0), np.array([length, 1.0, 1.0, 1.0, 1.0, 1.0])).degrees
        for length in (1e1, 1e2, 4.9e2, 5.1e2, 1e4, 1e9)
    ]
    assert degrees == sorted(degrees, reverse=True)
    assert degrees[-3:] == [1.0, 1.0, 1.0]
    assert degrees[-4] == pytest.approx(1.0, abs=0.01)


def solve_hall(quantile: float, skewness: float) -> float:
    """Invert Hall's transformation numerically, without its closed form."""

    def transform(t: float) -> float:
        return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6 - quantile

    return float(optimize.brentq(transform, -1000, 1000, xtol=1e-12))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("sizes", [(5,), (12,), (40,), (6, 9, 30)])
def test_the_ends_follow_hall_and_welch(sizes: tuple[int, ...], sign: int) -> None:
    random = np.random.default_rng(len(sizes))
    parts = [sign * random.exponential(scale=i + 1, size=n) for i, n in enumerate(sizes)]
    count = len(parts)
    mean = sum(part.mean() for part in parts) / count
    variances = [part.var(ddof=1) / len(part) / count**2 for part in parts]
    variance = sum(variances)
    shares = [v**2 / (len(part) - 1) for v, part in zip(variances, parts, strict=True)]
    degrees = variance**2 / sum(shares)
    scarcity = min(1.0, 5 / (degrees + 1))
    third = sum(float(stats.kstat(part, 3)) / len(part) ** 2 for part in parts) / count**3
    skewness = third / variance**1.5 * (degrees + 4) / (degrees + 1)
    quantile = float(stats.t.ppf(0.975, degrees - 1.5 * scarcity**6))
    ends: list[float] = []
    for side in (1, -1):
        distance = side * solve_hall(side * quantile, skewness) - quantile
        is_far = distance >= 0
        factor = 1 + 2.2 * scarcity**2.5 if is_far else 0.5 + scarcity**6 / 2
        ends.append(quantile + factor * distance)
    error = math.sqrt(variance)
    starts = np.cumsum([0, *sizes]).tolist()
    groups = [np.arange(first, last) for first, last in pairwise(starts)]
    values = np.concatenate(parts)
    actual = compute_mean_interval(values, np.ones(len(values)), groups)
    assert actual == pytest.approx((mean - error * ends[0], mean + error * ends[1]), rel=1e-4)


def test_two_items_have_one_degree_of_freedom() -> None:
    low, high = compute_mean_interval(*everything(np.array([1.0, 3.0])))
    assert (low, high) == pytest.approx((2 - stats.t.ppf(0.975, 1), 2 + stats.t.ppf(0.975, 1)))


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 2.0)])
def test_padded_intervals_have_one_more_value_at_each_bound(bounds: tuple[float, float]) -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.5] * 3)
    groups = [np.arange(5), np.arange(5, 15), np.arange(15, 27)]
    means: list[float] = []
    variances: list[float] = []
    for rows in groups:
        share = len(rows) / len(values)
        padded = np.concatenate([values[rows], bounds])
        weights = np.array([1.0] * len(rows) + [share, share])
        mean = np.average(padded, weights=weights)
        spread = np.average((padded - mean) ** 2, weights=weights)
        means.append(float(mean))
        variances.append(float(spread) / (weights.sum() - 2 / 3))
    half = float(stats.t.ppf(0.975, len(values) + 1)) * math.sqrt(sum(variances)) / 3
    middle = sum(means) / 3
    expected = (max(bounds[0], middle - half), min(bounds[1], middle + half))
    low, high = compute_padded_interval(values, np.ones(len(values)), groups, bounds)
    actual = (max(bounds[0], low), min(bounds[1], high))
    assert actual == pytest.approx(expected, rel=1e-4)


def test_rounding_is_no_variance() -> None:
    values = np.full(9, 0.1) + np.arange(9) * 1e-17
    assert compute_mean_interval(*everything(values)) == (values.mean(), values.mean())
    apart = np.array([1.0, 1.0 + 1e-9, 1.0, 1.0, 1.0])
    low, high = compute_mean_interval(*everything(apart))
    assert 1e-10 < high - low < 1e-8


@pytest.mark.parametrize(
    ("difference", "low", "high"),
    [(0.3, 0.1, 0.9), (-0.3, -0.9, -0.1), (0.3, -0.1, 0.4), (-0.2, -0.3, 0.5)],
)
def test_p_is_that_of_the_end_towards_zero(difference: float, low: float, high: float) -> None:
    half = difference - low if difference > 0 else high - difference
    quantile = stats.t.isf(0.025, 79)
    expected = 2 * stats.t.sf(abs(difference) / half * quantile, 79)
    p_value = compute_p_value(make_comparison_of(difference, low, high))
    assert p_value == pytest.approx(expected, rel=1e-9)
    assert (p_value < 0.05) == (low > 0 or high < 0)


def test_few_items_need_the_tail_of_t() -> None:
    """Of null differences of 5 items, the normal tail would put 1% below 0.0016; t puts 0.2%."""
    values = np.random.default_rng(0).normal(size=(4_000, 5))
    half = stats.t.isf(0.025, 4) * values.std(1, ddof=1) / np.sqrt(5)
    results = [
        make_comparison_of(mean, mean - width, mean + width, n=5)
        for mean, width in zip(values.mean(1).tolist(), half.tolist(), strict=True)
    ]
    p_values = np.array([compute_p_value(result) for result in results])
    assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.01)
    assert np.mean(p_values < 0.05 / 32) < 0.004
    # ten times its interval's half width: certain by the normal tail, 1 in 100,000 by that of t
    few = compute_p_value(make_comparison_of(1.0, 0.9, 1.1, n=5))
    assert 1e-6 < few < 1e-4


def test_p_of_an_empty_interval_is_certain() -> None:
    assert compute_p_value(make_comparison_of(0.0, 0.0, 0.0)) == 1.0
    assert compute_p_value(make_comparison_of(0.5, 0.5, 0.5)) == 0.0
    assert compute_p_value(make_comparison_of(-0.5, -0.5, -0.5)) == 0.0
    assert compute_p_value(make_comparison_of(-0.5, -0.5, -0.5, p_value=0.25)) == 0.25


@pytest.mark.parametrize(
    ("n", "low", "is_above"),
    [(6, 0.26, True), (5, 0.26, False), (6, 0.25, False), (80, 0.24, False), (80, 0.26, True)],
)
def test_a_score_is_above_a_limit_with_its_interval(n: int, low: float, is_above: bool) -> None:
    assert is_shown_above(Score("task", "loss", 0.5, low, 0.6, n, 0), 0.25) == is_above


@pytest.mark.parametrize(
    ("low", "high", "p_value", "verdict"),
    [
        (0.0, 0.5, None, "no difference shown"),
        (-0.5, 0.0, None, "no difference shown"),
        (0.001, 0.5, None, "better"),
        (-0.5, -0.001, None, "worse"),
        (0.001, 0.5, 0.05, "no difference shown"),
        (0.001, 0.5, 0.049, "better"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(
    low: float, high: float, p_value: float | None, verdict: str
) -> None:
    comparison = make_comparison_of((low + high) / 2, low, high, p_value=p_value)
    assert judge_comparison(comparison) == verdict


def test_holm_marks_a_p_of_exactly_five_percent() -> None:
    sure = make_comparison_of(0.3, 0.2, 0.4, p_value=0.025)
    assert (
        judge_comparisons([sure, sure])
        == ("better, but not after Holm correction (2 comparisons)",) * 2
    )
    assert (
        judge_comparisons([make_comparison_of(0.3, 0.2, 0.4, p_value=0.024)] * 2) == ("better",) * 2
    )


def test_errors_and_spreads_have_their_constants() -> None:
    assert compute_standard_error(-1.0, 3.0) == pytest.approx(4 / 2 / stats.norm.ppf(0.975))
    shown = compute_detectable_difference(-1.0, 1.0)
    quantiles = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert shown == pytest.approx(quantiles / stats.norm.ppf(0.975))
    assert compute_robust_sd([1.0, 2.0, 4.0]) == pytest.approx(1.4826)
    assert format_p(0.001) == "p = 0.001"
