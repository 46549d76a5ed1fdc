"""Intervals, tests and verdicts, compared with published values, scipy, and simulated coverage."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score
from tunesmith.evaluate.statistics import (
    adjust_p_values,
    compute_constant_interval,
    compute_detectable_difference,
    compute_mcnemar_p,
    compute_mean_interval,
    compute_p_value,
    compute_padded_interval,
    compute_robust_sd,
    compute_sign_flip_p,
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


def compute_paired_rate_interval(gains: int, losses: int, n: int) -> tuple[float, float]:
    changes = np.repeat([1.0, -1.0, 0.0], [gains, losses, n - gains - losses])
    return clip(compute_padded_interval(*everything(changes), (-1.0, 1.0)))


def clip(ends: tuple[float, float]) -> tuple[float, float]:
    return max(-1.0, ends[0]), min(1.0, ends[1])


def test_paired_rates_follow_the_formula() -> None:
    low, high = compute_paired_rate_interval(gains=20, losses=45, n=500)
    gain, loss = 21 / 502, 46 / 502
    half = stats.t.ppf(0.975, 501) * math.sqrt((gain + loss - (gain - loss) ** 2) / 502)
    assert (low, high) == pytest.approx((gain - loss - half, gain - loss + half))
    assert high < 0, "25 lost answers of 500 are a loss, paired"


def test_paired_rates_are_never_certain() -> None:
    for gains, losses in ((0, 0), (30, 0), (0, 30)):
        low, high = compute_paired_rate_interval(gains, losses, 30)
        assert -1 <= low < (gains - losses) / 30 + 1e-9
        assert (gains - losses) / 30 - 1e-9 < high <= 1
        assert high - low > 0.05


def test_symmetric_values_get_the_t_interval() -> None:
    for n in (51, 200):
        half = np.random.default_rng(n).random(n // 2)
        values = np.concatenate([half, -half, np.zeros(n % 2)]) + 3
        expected = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
        assert compute_mean_interval(*everything(values)) == pytest.approx(expected, abs=1e-5)


def test_few_symmetric_values_get_a_wider_interval() -> None:
    """A smaller variance by chance is likelier where there is a long tail that they do not show."""
    for n, factor in ((5, 1.2), (8, 1.001)):
        values = np.arange(n, dtype=float)
        low, high = compute_mean_interval(*everything(values))
        t_low, t_high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
        assert (high - low) / (t_high - t_low) > factor
        assert low + high == pytest.approx(2 * values.mean())


def test_a_long_tail_moves_the_interval_to_its_side() -> None:
    values = np.random.default_rng(1).exponential(size=12)
    low, high = compute_mean_interval(*everything(values))
    assert high - values.mean() > 1.2 * (values.mean() - low)
    mirrored = compute_mean_interval(*everything(-values))
    assert mirrored == pytest.approx((-high, -low))
    scaled = compute_mean_interval(*everything(values * 1e6 + 5))
    assert scaled == pytest.approx((low * 1e6 + 5, high * 1e6 + 5))


def test_weights_make_a_ratio_of_sums() -> None:
    random = np.random.default_rng(0)
    weights = random.integers(1, 50, 300).astype(float)
    values = random.normal(1.0, 0.2, 300) + weights / 50
    low, high = compute_mean_interval(values, weights, [np.arange(300)])
    assert low < np.average(values, weights=weights) < high
    assert low > values.mean(), "the unweighted mean lies far below"
    equal = compute_mean_interval(values, np.full(300, 7.0), [np.arange(300)])
    assert equal == pytest.approx(compute_mean_interval(*everything(values)))


def test_means_over_tokens_of_texts_of_many_lengths_are_covered() -> None:
    """With as many degrees of freedom as texts of equal weight, 92% of these were."""
    random = np.random.default_rng(0)
    hits = 0
    for lengths in random.lognormal(0, 0.8, (500, 10)):
        low, high = compute_mean_interval(random.normal(size=10), lengths, [np.arange(10)])
        hits += low <= 0 <= high
    assert 475 <= hits <= 492


def test_the_variance_is_that_within_groups() -> None:
    values = np.concatenate([np.full(10, 1.0), np.full(90, 5.0)])
    groups = [np.arange(10), np.arange(10, 100)]
    assert compute_mean_interval(values, np.ones(100), groups) == pytest.approx((3.0, 3.0))


def test_many_small_tasks_of_rates_are_not_pulled_to_the_middle() -> None:
    tasks = [np.arange(5 * i, 5 * i + 5) for i in range(20)]
    low, high = clip(compute_padded_interval(np.ones(100), np.ones(100), tasks, (-1.0, 1.0)))
    assert low > 0.9
    assert high == 1


DRAWS = {
    "normal": (lambda random, size: random.normal(size=size), 0.0),
    "exponential": (lambda random, size: random.exponential(size=size), 1.0),
    "left": (lambda random, size: -random.gamma(2.0, size=size), -2.0),
    "differences": (lambda random, size: random.lognormal(0, 0.5, size) - 1, math.exp(0.125) - 1),
    "long tail": (lambda random, size: random.lognormal(0, 1, size), math.exp(0.5)),
}


@pytest.mark.parametrize("n", [5, 7, 10, 50])
@pytest.mark.parametrize("name", DRAWS)
def test_intervals_hold_the_truth_in_95_percent(name: str, n: int) -> None:
    """1.5 points, and three standard errors of 2,500 trials. docs/results/coverage.md has more."""
    draw, truth = DRAWS[name]
    hits = 0
    for values in draw(np.random.default_rng(n), (2500, n)):
        low, high = compute_mean_interval(*everything(values))
        hits += low <= truth <= high
    assert 0.935 - 0.013 <= hits / 2500 <= 0.965 + 0.013


@pytest.mark.parametrize("n", [5, 6, 8, 11, 16, 30])
def test_paired_rates_hold_the_truth_in_95_percent(n: int) -> None:
    """Exact, over a grid of rates; a discrete interval may hold it more often."""
    factorials = [math.factorial(k) for k in range(n + 1)]
    counts = [(gains, losses) for gains in range(n + 1) for losses in range(n + 1 - gains)]
    intervals = [compute_paired_rate_interval(*pair, n) for pair in counts]
    for gain, loss in ((0.5, 0.5), (0.55, 0.45), (0.7, 0.3), (0.45, 0.45), (0.2, 0), (0.3, 0.1)):
        coverage = 0.0
        for (gains, losses), (low, high) in zip(counts, intervals, strict=True):
            same = n - gains - losses
            if low - 1e-9 <= gain - loss <= high + 1e-9:
                ways = factorials[n] / factorials[gains] / factorials[losses] / factorials[same]
                coverage += ways * gain**gains * loss**losses * max(0.0, 1 - gain - loss) ** same
        assert coverage >= 0.929, (gain, loss)


@pytest.mark.parametrize("n", [6, 12, 40])
def test_null_cases_get_no_verdict(n: int) -> None:
    random = np.random.default_rng(n)
    false_verdicts = 0
    for gains, losses, _ in random.multinomial(n, [0.25, 0.25, 0.5], size=1000).tolist():
        verdict = judge_comparison(compare_measurements(*rates(gains, losses, n)))
        false_verdicts += verdict != "no difference shown"
    assert false_verdicts / 1000 <= 0.065


@pytest.mark.parametrize("n", [2, 4, 5])
def test_fewer_than_six_items_get_no_verdict(n: int) -> None:
    values = [0.2 + 0.001 * i for i in range(n)]
    for shift in (10.0, -10.0):
        before = measured(values)
        result = compare_measurements(before, measured([value + shift for value in values]))
        assert judge_comparison(result) == "too few items to tell"
        assert judge_comparisons([result]) == ("too few items to tell",)
        assert describe_evidence(result) == f"{n} of at least 6"
    clear = compare_measurements(measured([*range(6)]), measured([i + 9 + i / 9 for i in range(6)]))
    assert judge_comparisons([clear]) == ("better",)


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
    by_t = compute_mean_interval(*everything(change))
    assert by_t == pytest.approx((-0.081, -0.019), abs=1.5e-3)
    assert judge_comparison(result) == "worse"


@pytest.mark.parametrize(("n", "smallest"), [(969, 0.03), (150, 0.0763)])
def test_three_points_take_969_items(n: int, smallest: float) -> None:
    """Where a ninth of the items changes: n = (1.96 + 0.84)^2 * variance / difference^2."""
    half = 1.96 * (1 / 9 / n) ** 0.5
    assert compute_detectable_difference(-half, half) == pytest.approx(smallest, abs=1e-4)


def test_a_comparison_says_what_it_would_have_shown() -> None:
    few, many = (compare_measurements(*rates(n // 18, n // 18, n)) for n in (180, 9000))
    assert few.min_detectable == pytest.approx(2.80 * (few.high - few.low) / 3.92, rel=1e-3)
    assert few.min_detectable is not None
    assert many.min_detectable == pytest.approx(few.min_detectable / 50**0.5, rel=0.05)
    assert describe_evidence(few) == (
        "10 fixed, 10 broken; McNemar p = 1; "
        f"minimum detectable difference {few.min_detectable:.2g}"
    )
    clear = compare_measurements(*rates(40, 0, 50))
    assert describe_evidence(clear) == "40 fixed, 0 broken; McNemar p < 0.001"
    assert clear.p_value == pytest.approx(1.8e-12, rel=0.02)


def test_where_less_is_better_a_gain_is_a_fall() -> None:
    before, after = (
        measured(values, higher_is_better=False) for values in ([1] * 9 + [0], [0] * 10)
    )
    result = compare_measurements(before, after)
    assert (result.improved, result.worsened, judge_comparison(result)) == (9, 0, "better")


def test_values_that_are_no_rate_have_no_counts() -> None:
    result = compare_measurements(
        measured([0.5, 0.25, 0.1, 0.9, 0.2]), measured([0.6, 0.3, 0.1, 0.9, 0.2])
    )
    assert (result.improved, result.worsened, result.p_value) == (None, None, 0.5)
    assert describe_evidence(result) == "sign-flip p = 0.5; 5 of at least 6"
    losses = compare_measurements(measured([2, 3, 4, 3, 5, 2]), measured([1, 3, 5, 2, 3, 2]))
    assert losses.p_value is None
    assert 0 < compute_p_value(losses) < 1
    assert describe_evidence(losses).startswith("minimum detectable difference ")


def test_three_fields_of_sixty_rows_show_no_difference() -> None:
    before = measured([1 / 3] * 60)
    result = compare_measurements(before, measured([2 / 3] * 3 + [1 / 3] * 57))
    assert result.p_value == pytest.approx(0.25)
    assert result.low < 0 < result.high
    assert judge_comparison(result) == "no difference shown"


@pytest.mark.parametrize("num_changes", [7, 40])
def test_the_sign_flip_p_is_that_of_all_signs(num_changes: int) -> None:
    """Enumerated, or counted by sums: of sevenths, by random signs."""
    random = np.random.default_rng(num_changes)
    changes = random.integers(-3, 5, num_changes) / 7
    signs = random.choice([-1, 1], (200_000, num_changes))
    reached = np.abs(signs @ changes) >= abs(changes.sum()) - 1e-9
    assert compute_sign_flip_p(changes) == pytest.approx(reached.mean(), abs=0.005)
    uneven = changes * (1 + random.random(num_changes) / 1e3)
    assert (compute_sign_flip_p(uneven) is None) == (num_changes == 40)


GROUPS = tuple(f"package {i // 4}" for i in range(80))


def test_items_of_one_group_count_once() -> None:
    """Twenty packages whose four rows change together are twenty pairs, not eighty."""
    signs = np.random.default_rng(0).choice([0, 1], 20)
    before, after = measured([0] * 80, groups=GROUPS), measured(np.repeat(signs, 4), groups=GROUPS)
    result = compare_measurements(before, after)
    alone = compare_measurements(measured([0] * 20), measured(signs))
    assert (result.low, result.high) == pytest.approx((alone.low, alone.high))
    assert (result.p_value, result.improved) == (alone.p_value, 4 * sum(signs))
    assert (result.after.n, result.after.groups, result.after.independent) == (80, 20, 20)
    losses = np.random.default_rng(1).normal(5, 1, 20)
    score = compute_score(measured(np.repeat(losses, 4), groups=GROUPS))
    single = compute_score(measured(losses))
    assert (score.low, score.high) == pytest.approx((single.low, single.high))


@pytest.mark.parametrize("values", [[0, 1, 1, 1, 0, 1, 1, 1], [0.5, 2, 3, 9, 4, 1, 7, 3]])
def test_groups_of_single_items_are_no_groups(values: list[float]) -> None:
    names = tuple("abcdefgh")
    assert compute_score(measured(values, groups=names)) == compute_score(measured(values))
    changed = [1, *values[1:]]
    pairs = [(measured(values, **g), measured(changed, **g)) for g in ({"groups": names}, {})]
    assert compare_measurements(*pairs[0]) == compare_measurements(*pairs[1])


@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_few_groups_get_no_verdict(num_groups: int) -> None:
    groups = tuple(f"author {i % num_groups}" for i in range(60))
    before, after = measured([0] * 60, groups=groups), measured([1] * 60, groups=groups)
    result = compare_measurements(before, after)
    assert judge_comparison(result) == "too few items to tell"
    assert f"{num_groups} of at least 6 groups" in describe_evidence(result)


def test_an_interval_without_zero_is_no_difference_where_the_exact_p_says_so() -> None:
    result = compare_measurements(*rates(5, 0, 6))
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


def test_holm_is_a_maximum_of_scipys_bonferroni_steps() -> None:
    """scipy has no Holm; its step-up FDR shares the ordering, and Bonferroni the first step."""
    p_values = np.random.default_rng(0).random(12) ** 3
    adjusted = np.array(adjust_p_values(p_values.tolist()))
    order = np.argsort(p_values)
    steps = np.minimum(1, p_values[order] * np.arange(12, 0, -1))
    assert adjusted[order] == pytest.approx(np.maximum.accumulate(steps))
    assert (adjusted >= stats.false_discovery_control(p_values, method="bh") - 1e-12).all()


def test_the_interval_agrees_with_scipys_bca_bootstrap_for_many_items() -> None:
    values = np.random.default_rng(5).exponential(size=400)
    scipys = stats.bootstrap((values,), np.mean, n_resamples=5000, rng=1).confidence_interval
    low, high = compute_mean_interval(*everything(values))
    assert (low, high) == pytest.approx(tuple(scipys), abs=(high - low) * 0.06)


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


@pytest.mark.parametrize("n", [2, 5, 6, 20, 500])
@pytest.mark.parametrize("shift", [1.0, -3.0])
def test_equal_differences_are_as_certain_as_their_signs(shift: float, n: int) -> None:
    """A score in whole numbers that moves by the same on every item shows no spread."""
    ids = tuple(map(str, range(n)))
    before = MetricValues("test", "m", ids, (4.0,) * n)
    comparison = compare_measurements(before, replace(before, values=(4.0 + shift,) * n))
    assert compute_p_value(comparison) == pytest.approx(2 / 2**n, rel=1e-9)
    verdict = "better" if shift > 0 else "worse"
    expected = verdict if n > 5 else "too few items to tell"
    assert judge_comparison(comparison) == expected
    assert comparison.low < shift < comparison.high
    assert comparison.low + comparison.high == pytest.approx(2 * shift)


def test_no_difference_at_all_has_no_width() -> None:
    assert compute_constant_interval(0.0, 5) == (0.0, 0.0)
    assert compute_constant_interval(1.0, 10**6) == (1.0, 1.0)


def test_few_changed_items_do_not_show_that_groups_change_little() -> None:
    """Two of 56 answers changed, in groups of eight: other groups may change as a whole. Without
    that, true differences of such metrics lie inside in 90%."""
    before = [0.5] * 56
    after = [0.5 + 1 / 3 * (n == 0) - 1 / 3 * (n == 20) for n in range(56)]
    ids = tuple(map(str, range(56)))
    groups = tuple(str(n // 8) for n in range(56))
    sides = [MetricValues("test", "f1", ids, tuple(x), groups=groups) for x in (before, after)]
    comparison = compare_measurements(*sides)
    assert comparison.high - comparison.low > 0.08
