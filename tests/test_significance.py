"""p, Holm and what could have been shown, against published and worked-out values."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.evaluate.intervals import bootstrap
from tunesmith.evaluate.results import Measurement, compare
from tunesmith.evaluate.significance import (
    evidence,
    holm,
    mcnemar,
    p_of,
    robust_sd,
    smallest_difference,
    verdict,
    verdicts,
)


def measured(values, **changed) -> Measurement:
    ids = tuple(f"test:{i}" for i in range(len(values)))
    return Measurement("task", "exact_match", ids, tuple(float(v) for v in values), **changed)


def rates(gains: int, losses: int, n: int) -> tuple[Measurement, Measurement]:
    """`n` items, of which some were gained and some lost."""
    before, after = [0] * gains + [1] * losses, [1] * gains + [0] * losses
    return measured([*before, *[0] * (n - gains - losses)]), measured([*after, *[0] * (n - gains - losses)])


@pytest.mark.parametrize(
    ("gains", "losses", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (8, 1, 0.0390625), (0, 5, 0.0625), (20, 45, 0.0026), (4, 9, 0.266846), (1000, 0, 0.0)],
)
def test_mcnemar_is_the_exact_binomial_test(gains: int, losses: int, p: float) -> None:
    assert mcnemar(gains, losses) == mcnemar(losses, gains) == pytest.approx(p, abs=5e-5)


def test_holm_raises_each_p_by_those_that_are_left() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))  # R: p.adjust(p, "holm")
    assert holm([0.7, 0.6]) == (1.0, 1.0)
    assert holm([0.03]) == (0.03,)
    assert holm([]) == ()


def test_500_items_with_45_losses_and_20_gains() -> None:
    """The worked example of paired against unpaired: [-.081, -.019]."""
    found = compare(*rates(20, 45, 500))
    assert (found.difference, found.gains, found.losses) == (pytest.approx(-0.05), 20, 45)
    assert (found.low, found.high) == pytest.approx((-0.081, -0.019), abs=1.5e-3)
    change = np.array([1.0] * 20 + [-1.0] * 45 + [0.0] * 435)
    drawn = bootstrap(change, np.ones(500), [np.arange(500)], seed=0)
    assert drawn == pytest.approx((-0.081, -0.019), abs=1.5e-3)
    assert verdict(found) == "worse"


@pytest.mark.parametrize(("n", "smallest"), [(969, 0.03), (150, 0.0763)])
def test_three_points_take_969_items(n: int, smallest: float) -> None:
    """Where a ninth of the items changes: n = (1.96 + 0.84)^2 * variance / difference^2."""
    half = 1.96 * (1 / 9 / n) ** 0.5
    assert smallest_difference(-half, half) == pytest.approx(smallest, abs=1e-4)


def test_a_robust_spread_is_that_of_most() -> None:
    values = np.random.default_rng(0).normal(3, 2, 1000).tolist()
    assert robust_sd(values) == pytest.approx(2, rel=0.05)
    assert robust_sd([*values, *[1e6] * 20]) == pytest.approx(robust_sd(values), rel=0.05)
    assert robust_sd([5.0]) == 0


def test_a_comparison_says_what_it_would_have_shown() -> None:
    few, many = (compare(*rates(n // 18, n // 18, n)) for n in (180, 9000))
    assert few.smallest == pytest.approx(2.80 * (few.high - few.low) / 3.92, rel=1e-3)
    assert few.smallest is not None
    assert many.smallest == pytest.approx(few.smallest / 50**0.5, rel=0.05)
    assert evidence(few) == f"+10 -10 items, p 1; {few.smallest:.2g} would show"
    assert evidence(compare(*rates(40, 0, 50))) == "+40 -0 items, p 1.8e-12"


def test_where_less_is_better_a_gain_is_a_fall() -> None:
    before, after = (measured(values, higher_is_better=False) for values in ([1] * 9 + [0], [0] * 10))
    found = compare(before, after)
    assert (found.gains, found.losses, verdict(found)) == (9, 0, "better")


def test_values_that_are_no_rate_have_no_counts() -> None:
    found = compare(measured([0.5, 0.25, 0.1, 0.9]), measured([0.6, 0.3, 0.1, 0.9]))
    assert (found.gains, found.losses, found.p) == (None, None, None)
    assert 0 < p_of(found) < 1
    assert evidence(found).endswith("would show")


def test_an_interval_without_zero_is_no_difference_where_the_exact_p_says_so() -> None:
    found = compare(*rates(5, 0, 5))
    assert (found.low > 0, found.p) == (True, 0.0625)
    assert verdict(found) == "no difference shown"


def test_what_chance_may_show_among_many_claims_is_marked() -> None:
    clear, faint, none = (compare(*rates(gains, losses, 100)) for gains, losses in ((40, 2), (9, 1), (3, 2)))
    assert verdicts([faint]) == ("better",)
    assert verdicts([clear, faint, none, none]) == (
        "better",
        "better alone, not as one of 4 claims",
        "no difference shown",
        "no difference shown",
    )
