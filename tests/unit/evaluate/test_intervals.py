"""The intervals, against values worked out by hand and by counting how often they hold the
truth."""

import math

import numpy as np
import pytest

from tunesmith.evaluate import intervals
from tunesmith.evaluate.intervals import (
    NUM_RESAMPLES,
    Z,
    bootstrap_interval,
    compute_paired_rate_interval,
    compute_wilson_interval,
)


def everything(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    return values, np.ones(len(values)), [np.arange(len(values))]


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
        (81, 263, 0.25528, 0.36621),
    ],
)
def test_wilson_gives_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert compute_wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_solves_its_equation() -> None:
    for successes, n in ((3, 17), (40, 41)):
        for bound in compute_wilson_interval(successes, n):
            assert abs(successes / n - bound) == pytest.approx(
                Z * math.sqrt(bound * (1 - bound) / n)
            )


def test_no_violation_in_150_means_less_than_3_percent() -> None:
    assert compute_wilson_interval(0, 150)[1] == pytest.approx(Z**2 / (150 + Z**2))


def test_paired_rates_follow_the_formula() -> None:
    low, high = compute_paired_rate_interval(gains=20, losses=45, n=500)
    gain, loss = 21 / 502, 46 / 502
    half = Z * math.sqrt((gain + loss - (gain - loss) ** 2) / 502)
    assert (low, high) == pytest.approx((gain - loss - half, gain - loss + half))
    assert high < 0, "25 lost answers of 500 are a loss, paired"


def test_paired_rates_are_never_certain() -> None:
    for gains, losses in ((0, 0), (30, 0), (0, 30)):
        low, high = compute_paired_rate_interval(gains, losses, 30)
        assert -1 <= low < (gains - losses) / 30 + 1e-9
        assert (gains - losses) / 30 - 1e-9 < high <= 1
        assert high - low > 0.05


def test_the_bootstrap_equals_the_normal_interval_for_many_items() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.5, 1000)
    half = Z * values.std(ddof=1) / math.sqrt(len(values))
    found = bootstrap_interval(*everything(values), seed=0)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=half * 0.05)


def test_the_bootstrap_is_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(3).random(30)
    assert bootstrap_interval(*everything(values), seed=1) == bootstrap_interval(
        *everything(values), seed=1
    )
    assert bootstrap_interval(*everything(values), seed=1) != bootstrap_interval(
        *everything(values), seed=2
    )


def test_weights_make_a_ratio_of_sums() -> None:
    random = np.random.default_rng(0)
    weights = random.integers(1, 50, 300).astype(float)
    values = random.normal(1.0, 0.2, 300) + weights / 50
    low, high = bootstrap_interval(values, weights, [np.arange(300)], seed=0)
    assert low < np.average(values, weights=weights) < high
    assert low > values.mean(), "the unweighted mean lies far below"


def test_items_are_drawn_within_their_group() -> None:
    values = np.concatenate([np.full(10, 1.0), np.full(90, 5.0)])
    groups = [np.arange(10), np.arange(10, 100)]
    assert bootstrap_interval(values, np.ones(100), groups, seed=0) == (3.0, 3.0)


@pytest.mark.parametrize("n", [12, 40])
def test_the_intervals_hold_the_truth_about_as_often_as_they_say(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", NUM_RESAMPLES // 10)
    random, trials = np.random.default_rng(0), 600
    values = random.beta(2.0, 0.7, (trials, n))
    truth = 2.0 / 2.7
    held = [
        low <= truth <= high
        for low, high in (bootstrap_interval(*everything(row), seed=0) for row in values)
    ]
    assert 0.9 <= np.mean(held) <= 0.985
    pairs = random.multinomial(n, [0.3, 0.1, 0.6], size=trials)
    held = [
        low <= 0.2 <= high
        for low, high in (compute_paired_rate_interval(int(g), int(x), n) for g, x, _ in pairs)
    ]
    assert 0.92 <= np.mean(held) <= 0.995
