"""The always-valid interval: its formula, and simulated coverage and power under peeking."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunesmith.evaluate.statistics import (
    ALPHA,
    MIN_SEQUENCE,
    compute_confidence_sequence,
    compute_mean_interval,
)

RUNS = 1000
FIRST = MIN_SEQUENCE  # looks, after every value from here on
LAST = 600

Draw = np.ndarray


def draw(name: str, rng: np.random.Generator) -> tuple[Draw, float, tuple[float, float]]:
    """Return values of many runs, their true mean and bounds."""
    shape = (RUNS, LAST)
    if name == "exponential":  # cut at 10
        return np.minimum(rng.exponential(1, shape), 10), 1 - math.exp(-10), (0, 10)
    if name == "beta":
        return rng.beta(0.3, 3, shape), 0.3 / 3.3, (0, 1)
    if name == "rare":  # 0, or rarely 1 to 20
        is_hit = rng.random(shape) < 0.05
        return is_hit * rng.integers(1, 21, shape), 0.05 * 10.5, (0, 20)
    rate = float(name)
    return (rng.random(shape) < rate).astype(float), rate, (0, 1)


def follow_values(
    values_N: Draw, bounds: tuple[float, float], alpha: float = ALPHA, narrowest: int = 100
) -> tuple[Draw, Draw]:
    """Return the interval after each value; axes before the last are runs of their own."""
    count_N = np.arange(1, values_N.shape[-1] + 1)
    sum_N = np.cumsum(values_N, axis=-1)
    square_sum_N = np.cumsum(values_N**2, axis=-1)
    return compute_confidence_sequence(
        count_N, sum_N, square_sum_N, bounds, alpha=alpha, narrowest=narrowest
    )


def find_excluded(low: np.ndarray, high: np.ndarray, mean: float) -> np.ndarray:
    """Return for each look whether the interval excludes `mean`."""
    return ((low > mean) | (high < mean))[:, FIRST - 1 :]


SOURCES = ("0.5", "0.8", "0.9", "0.95", "0.97", "0.99", "0.03", "exponential", "beta", "rare")


@pytest.mark.parametrize("name", SOURCES)
def test_peeking_at_every_value_excludes_the_truth_in_at_most_5_percent(name: str) -> None:
    values, mean, bounds = draw(name, np.random.default_rng(SOURCES.index(name)))
    low, high = follow_values(values, bounds)
    # 2.6% of 10,000 runs at most (a rate of 0.8); with PADDING 1, 5.05% at a rate of 0.9
    assert find_excluded(low, high, mean).any(axis=1).mean() <= 0.04


@pytest.mark.parametrize("name", ["0.8", "0.97", "0.03"])
def test_a_smaller_alpha_is_met_too(name: str) -> None:
    values, mean, bounds = draw(name, np.random.default_rng(7))
    low, high = follow_values(values, bounds, alpha=0.01)
    assert find_excluded(low, high, mean).any(axis=1).mean() <= 0.01
    wide_low, wide_high = follow_values(values, bounds, alpha=0.001)
    assert (wide_high - wide_low >= high - low).all()


def test_an_interval_for_one_look_does_not_survive_peeking() -> None:
    values, mean, _ = draw("0.8", np.random.default_rng(0))
    num_excluded = 0
    for row in values[:100]:
        for count in range(FIRST, LAST, 10):
            part = row[:count]
            low, high = compute_mean_interval(part, np.ones(count), [np.arange(count)])
            if not low <= mean <= high:
                num_excluded += 1
                break
    assert num_excluded > 15  # of 100; a single look excludes the truth in 5


@pytest.mark.parametrize(
    ("rate", "limit", "power", "median"),
    [(0.85, 0.97, 0.99, 90), (0.8, 0.9, 0.99, 150), (0.93, 0.97, 0.8, 350)],
)
def test_a_stated_difference_is_found(rate: float, limit: float, power: float, median: int) -> None:
    values, _, bounds = draw(str(rate), np.random.default_rng(1))
    _, high = follow_values(values, bounds)
    is_found = high[:, FIRST - 1 :] < limit
    assert is_found.any(axis=1).mean() >= power
    found_at = np.where(is_found.any(axis=1), is_found.argmax(axis=1) + FIRST, LAST)
    assert np.median(found_at) <= median


def test_the_interval_follows_the_formula() -> None:
    values = np.array([0.0, 1, 1, 0, 1])
    low, high = follow_values(values, (0, 1), narrowest=50)
    padded = [*values, 0, 0, 1, 1]
    rho2 = (-2 * math.log(0.05) + math.log(-2 * math.log(0.05) + 1)) / 50
    spread = 5 * rho2 + 1
    half = math.sqrt(2 * spread / (25 * rho2) * math.log(math.sqrt(spread) / 0.05))
    half *= float(np.std(padded, ddof=1))
    assert low[-1] == pytest.approx(max(0, np.mean(padded) - half))
    assert high[-1] == pytest.approx(min(1, np.mean(padded) + half))


def test_runs_are_independent_and_only_the_past_counts() -> None:
    values = np.random.default_rng(0).random((3, 50))
    low, high = follow_values(values, (0, 1))
    alone = follow_values(values[1, :40], (0, 1))
    np.testing.assert_allclose((low[1, :40], high[1, :40]), alone)


def test_equal_values_are_not_certain() -> None:
    low, high = follow_values(np.ones(LAST), (0, 1))
    assert low[FIRST - 1] < 0.9
    assert low[-1] < 1 == high[-1]
