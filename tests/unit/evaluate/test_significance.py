"""p, Holm and what could have been shown, against published and worked-out values."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.evaluate.intervals import bootstrap_interval
from tunesmith.evaluate.results import MetricValues, compare_measurements
from tunesmith.evaluate.significance import (
    compute_detectable_difference,
    compute_mcnemar_p,
    compute_p_value,
    compute_robust_sd,
    describe_evidence,
    holm_adjust,
    judge_comparison,
    judge_comparisons,
)


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
    assert holm_adjust([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        (0.03, 0.06, 0.06, 0.02)
    )  # R: p.adjust(p, "holm")
    assert holm_adjust([0.7, 0.6]) == (1.0, 1.0)
    assert holm_adjust([0.03]) == (0.03,)
    assert holm_adjust([]) == ()


def test_500_items_with_45_losses_and_20_gains() -> None:
    """The worked example of paired against unpaired: [-.081, -.019]."""
    found = compare_measurements(*rates(20, 45, 500))
    assert (found.difference, found.improved, found.worsened) == (pytest.approx(-0.05), 20, 45)
    assert (found.low, found.high) == pytest.approx((-0.081, -0.019), abs=1.5e-3)
    change = np.array([1.0] * 20 + [-1.0] * 45 + [0.0] * 435)
    drawn = bootstrap_interval(change, np.ones(500), [np.arange(500)], seed=0)
    assert drawn == pytest.approx((-0.081, -0.019), abs=1.5e-3)
    assert judge_comparison(found) == "worse"


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
    assert describe_evidence(few) == f"+10 -10 items, p 1; {few.min_detectable:.2g} would show"
    assert describe_evidence(compare_measurements(*rates(40, 0, 50))) == "+40 -0 items, p 1.8e-12"


def test_where_less_is_better_a_gain_is_a_fall() -> None:
    before, after = (
        measured(values, higher_is_better=False) for values in ([1] * 9 + [0], [0] * 10)
    )
    found = compare_measurements(before, after)
    assert (found.improved, found.worsened, judge_comparison(found)) == (9, 0, "better")


def test_values_that_are_no_rate_have_no_counts() -> None:
    found = compare_measurements(measured([0.5, 0.25, 0.1, 0.9]), measured([0.6, 0.3, 0.1, 0.9]))
    assert (found.improved, found.worsened, found.p_value) == (None, None, None)
    assert 0 < compute_p_value(found) < 1
    assert describe_evidence(found).endswith("would show")


def test_an_interval_without_zero_is_no_difference_where_the_exact_p_says_so() -> None:
    found = compare_measurements(*rates(5, 0, 5))
    assert (found.low > 0, found.p_value) == (True, 0.0625)
    assert judge_comparison(found) == "no difference shown"


def test_what_chance_may_show_among_many_claims_is_marked() -> None:
    clear, faint, none = (
        compare_measurements(*rates(gains, losses, 100))
        for gains, losses in ((40, 2), (9, 1), (3, 2))
    )
    assert judge_comparisons([faint]) == ("better",)
    assert judge_comparisons([clear, faint, none, none]) == (
        "better",
        "better alone, not as one of 4 claims",
        "no difference shown",
        "no difference shown",
    )
