"""Intervals, tests and verdicts, compared with published values, scipy, and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tunesmith.evaluate import statistics
from tunesmith.evaluate.results import MetricValues, compare_measurements
from tunesmith.evaluate.statistics import (
    NUM_RESAMPLES,
    Z,
    adjust_p_values,
    bootstrap_interval,
    compute_detectable_difference,
    compute_mcnemar_p,
    compute_p_value,
    compute_paired_rate_interval,
    compute_robust_sd,
    compute_wilson_interval,
    describe_evidence,
    format_p,
    judge_comparison,
    judge_comparisons,
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
    result = bootstrap_interval(*everything(values), seed=0)
    assert result == pytest.approx((values.mean() - half, values.mean() + half), abs=half * 0.05)


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
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", NUM_RESAMPLES // 10)
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


# ---------------------------------------------------------------- tests and verdicts


def measured(values, **changed) -> MetricValues:
    ids = tuple(f"test:{i}" for i in range(len(values)))
    return MetricValues("task", "exact_match", ids, tuple(float(v) for v in values), **changed)


def rates(gains: int, losses: int, n: int) -> tuple[MetricValues, MetricValues]:
    """`n` items, of which some were gained and some lost."""
    before, after = [0] * gains + [1] * losses, [1] * gains + [0] * losses
    return measured([*before, *[0] * (n - gains - losses)]), measured(
        [*after, *[0] * (n - gains - losses)]
    )


@pytest.mark.parametrize(
    ("gains", "losses", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (8, 1, 0.0390625),
        (0, 5, 0.0625),
        (20, 45, 0.0026),
        (4, 9, 0.266846),
        (1000, 0, 0.0),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(gains: int, losses: int, p: float) -> None:
    assert (
        compute_mcnemar_p(gains, losses)
        == compute_mcnemar_p(losses, gains)
        == pytest.approx(p, abs=5e-5)
    )


def test_holm_raises_each_p_by_those_that_are_left() -> None:
    assert adjust_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        (0.03, 0.06, 0.06, 0.02)
    )  # R: p.adjust(p, "holm")
    assert adjust_p_values([0.7, 0.6]) == (1.0, 1.0)
    assert adjust_p_values([0.03]) == (0.03,)
    assert adjust_p_values([]) == ()


def test_500_items_with_45_losses_and_20_gains() -> None:
    """The worked example of paired against unpaired: [-.081, -.019]."""
    result = compare_measurements(*rates(20, 45, 500))
    assert (result.difference, result.improved, result.worsened) == (pytest.approx(-0.05), 20, 45)
    assert (result.low, result.high) == pytest.approx((-0.081, -0.019), abs=1.5e-3)
    change = np.array([1.0] * 20 + [-1.0] * 45 + [0.0] * 435)
    drawn = bootstrap_interval(change, np.ones(500), [np.arange(500)], seed=0)
    assert drawn == pytest.approx((-0.081, -0.019), abs=1.5e-3)
    assert judge_comparison(result) == "worse"


@pytest.mark.parametrize(("n", "smallest"), [(969, 0.03), (150, 0.0763)])
def test_three_points_take_969_items(n: int, smallest: float) -> None:
    """Where a ninth of the items changes: n = (1.96 + 0.84)^2 * variance / difference^2."""
    half = 1.96 * (1 / 9 / n) ** 0.5
    assert compute_detectable_difference(-half, half) == pytest.approx(smallest, abs=1e-4)


def test_a_robust_spread_is_that_of_most() -> None:
    values = np.random.default_rng(0).normal(3, 2, 1000).tolist()
    assert compute_robust_sd(values) == pytest.approx(2, rel=0.05)
    assert compute_robust_sd([*values, *[1e6] * 20]) == pytest.approx(
        compute_robust_sd(values), rel=0.05
    )
    assert compute_robust_sd([5.0]) == 0


def test_a_comparison_says_what_it_would_have_shown() -> None:
    few, many = (compare_measurements(*rates(n // 18, n // 18, n)) for n in (180, 9000))
    assert few.min_detectable == pytest.approx(2.80 * (few.high - few.low) / 3.92, rel=1e-3)
    assert few.min_detectable is not None
    assert many.min_detectable == pytest.approx(few.min_detectable / 50**0.5, rel=0.05)
    assert describe_evidence(few) == (
        "10 improved, 10 worsened; McNemar p = 1; "
        f"minimum detectable difference {few.min_detectable:.2g}"
    )
    clear = compare_measurements(*rates(40, 0, 50))
    assert describe_evidence(clear) == "40 improved, 0 worsened; McNemar p < 0.001"
    assert clear.p_value == pytest.approx(1.8e-12, rel=0.02)


def test_where_less_is_better_a_gain_is_a_fall() -> None:
    before, after = (
        measured(values, higher_is_better=False) for values in ([1] * 9 + [0], [0] * 10)
    )
    result = compare_measurements(before, after)
    assert (result.improved, result.worsened, judge_comparison(result)) == (9, 0, "better")


def test_values_that_are_no_rate_have_no_counts() -> None:
    result = compare_measurements(measured([0.5, 0.25, 0.1, 0.9]), measured([0.6, 0.3, 0.1, 0.9]))
    assert (result.improved, result.worsened, result.p_value) == (None, None, None)
    assert 0 < compute_p_value(result) < 1
    assert describe_evidence(result).startswith("minimum detectable difference ")


def test_an_interval_without_zero_is_no_difference_where_the_exact_p_says_so() -> None:
    result = compare_measurements(*rates(5, 0, 5))
    assert (result.low > 0, result.p_value) == (True, 0.0625)
    assert judge_comparison(result) == "no difference shown"


def test_what_chance_may_show_among_many_claims_is_marked() -> None:
    clear, faint, none = (
        compare_measurements(*rates(gains, losses, 100))
        for gains, losses in ((40, 2), (9, 1), (3, 2))
    )
    assert judge_comparisons([faint]) == ("better",)
    assert judge_comparisons([clear, faint, none, none]) == (
        "better",
        "better, but not after Holm correction (4 comparisons)",
        "no difference shown",
        "no difference shown",
    )


# ---------------------------------------------------------------- scipy as an oracle


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 3), (81, 263), (40, 41), (150, 150)])
def test_wilson_equals_scipy(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert compute_wilson_interval(successes, n) == pytest.approx(tuple(expected), abs=1e-9)


@pytest.mark.parametrize(("gains", "losses"), [(1, 0), (8, 1), (20, 45), (5, 5), (300, 240)])
def test_mcnemar_equals_scipys_binomial_test(gains: int, losses: int) -> None:
    expected = stats.binomtest(gains, gains + losses, 0.5).pvalue
    assert compute_mcnemar_p(gains, losses) == pytest.approx(expected, rel=1e-9)


def test_holm_is_a_maximum_of_scipys_bonferroni_steps() -> None:
    """scipy has no Holm; its step-up FDR shares the ordering, and Bonferroni the first step."""
    p_values = np.random.default_rng(0).random(12) ** 3
    adjusted = np.array(adjust_p_values(p_values.tolist()))
    order = np.argsort(p_values)
    steps = np.minimum(1, p_values[order] * np.arange(12, 0, -1))
    assert adjusted[order] == pytest.approx(np.maximum.accumulate(steps))
    assert (adjusted >= stats.false_discovery_control(p_values, method="bh") - 1e-12).all()


def test_the_bootstrap_equals_scipys_widened_by_the_sample_correction() -> None:
    values = np.random.default_rng(3).beta(2.0, 0.7, 60)
    scipys = stats.bootstrap(
        (values,), np.mean, n_resamples=NUM_RESAMPLES, method="percentile", rng=1
    ).confidence_interval
    widen = math.sqrt(60 / 59)
    expected = [values.mean() + (bound - values.mean()) * widen for bound in scipys]
    half = (expected[1] - expected[0]) / 2
    assert bootstrap_interval(*everything(values), seed=0) == pytest.approx(
        expected, abs=half * 0.05
    )


def test_the_bootstrap_equals_the_t_interval_for_many_items() -> None:
    values = np.random.default_rng(5).normal(0.3, 1.0, 2000)
    low, high = stats.t.interval(0.95, 1999, loc=values.mean(), scale=stats.sem(values))
    assert bootstrap_interval(*everything(values), seed=0) == pytest.approx(
        (low, high), abs=(high - low) * 0.03
    )


def test_the_robust_sd_equals_scipys_scaled_mad() -> None:
    values = np.random.default_rng(2).standard_t(3, 101).tolist()
    expected = stats.median_abs_deviation(values, scale="normal")
    assert compute_robust_sd(values) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("p_value", "text"),
    [(0.31, "p = 0.31"), (0.0421, "p = 0.042"), (1.0, "p = 1"), (0.00099, "p < 0.001")],
)
def test_p_values_have_two_digits_down_to_a_thousandth(p_value: float, text: str) -> None:
    assert format_p(p_value) == text
