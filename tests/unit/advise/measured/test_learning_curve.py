"""The fit recovers the curve behind the points, and refuses to extrapolate too far."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tunesmith.advise.measured.learning_curve import (
    MAX_EXTRAPOLATION,
    LearningCurve,
    fit_curve,
    solve_examples,
)
from tunesmith.cli.views.measured_advice import _format_learning_curve

SIZES = (25, 50, 100, 200, 400)


def make_points(
    error: Callable[[int], float], sizes: tuple[int, ...] = SIZES, items: int = 400, seeds: int = 1
):
    """Return scores by size: an item is correct if its difficulty is above the error."""
    difficulties = (np.arange(items) + 0.5) / items
    return {n: [(difficulties > error(n)).astype(float).tolist()] * seeds for n in sizes}


def fit(error: Callable[[int], float], target: float | None = None, **shape) -> LearningCurve:
    curve = fit_curve(make_points(error, **shape), target)
    assert curve is not None
    return curve


def test_the_fit_recovers_the_curve_and_the_examples_to_the_target() -> None:
    curve = fit(lambda n: 0.05 + 3 * n**-0.7, 0.9)
    assert curve.b_low < 0.7 < curve.b_high
    assert (curve.a, curve.b, curve.c) == (
        pytest.approx(3, rel=0.35),
        pytest.approx(0.7, abs=0.1),
        pytest.approx(0.05, abs=0.03),
    )
    expected = (3 / 0.05) ** (1 / 0.7)
    assert curve.refusal == ""
    assert curve.needed_examples == pytest.approx(expected, rel=0.35)
    assert curve.needed_examples_low is not None
    assert curve.needed_examples_low < expected
    at_100 = curve.c + curve.a * 100**-curve.b
    assert at_100 == pytest.approx(
        1 - np.mean(make_points(lambda n: 0.05 + 3 * n**-0.7)[100]), abs=0.02
    )


def test_a_flat_and_a_rising_curve_are_refused() -> None:
    for error in (lambda n: 0.4 + 0 * n, lambda n: 0.2 + n / 1000):
        curve = fit(error, 0.9)
        assert curve.needed_examples is None
        assert curve.refusal.startswith("it may not fall: b is")
    noisy = {n: [np.random.default_rng(n).choice([0.0, 1.0], 30).tolist()] for n in SIZES}
    curve = fit_curve(noisy, 0.9)
    assert curve is not None
    assert curve.refusal.startswith("it may not fall")


def test_the_extrapolation_has_a_limit() -> None:
    far = fit(lambda n: 2 * n**-0.3, 0.9)
    assert far.needed_examples is None
    assert f"the limit is {MAX_EXTRAPOLATION * 400:,}" in far.refusal
    never = fit(lambda n: 0.3 + 3 * n**-0.8, 0.9)
    assert "never reaches the target" in never.refusal
    near = fit(lambda n: 3 * n**-0.7, 0.97)
    assert near.needed_examples is not None
    assert 400 < near.needed_examples < MAX_EXTRAPOLATION * 400


def test_a_curve_needs_four_sizes() -> None:
    assert fit_curve(make_points(lambda n: n**-0.5, sizes=(25,))) is None
    assert (
        fit(lambda n: n**-0.5, 0.99, sizes=(25, 50, 100)).refusal
        == "3 sizes were trained, a curve needs 4"
    )


def test_several_trainings_widen_the_interval_by_their_spread() -> None:
    single = fit(lambda n: 3 * n**-0.7)
    scores = make_points(lambda n: 3 * n**-0.7)
    spread = {}
    for size, (values,) in scores.items():
        spread[size] = [values, [max(0.0, value - 0.3) for value in values]]
    several = fit_curve(spread)
    assert several is not None
    assert several.b_high - several.b_low > single.b_high - single.b_low


def test_examples_to_a_target() -> None:
    assert solve_examples(0.9, 1, 0.5, 0) == pytest.approx(100)
    assert solve_examples(0.9, 1, 0.5, 0.1) == float("inf")
    assert solve_examples(0.5, 0, 0, 0.4) == 1


def test_a_rising_curve_is_reported_as_not_falling() -> None:
    curve = fit_curve({25: [[1.0] * 8 + [0.0] * 8], 50: [[1.0] * 4 + [0.0] * 12]})
    assert curve is not None
    assert curve.b < 0
    assert "examples: it does not fall;" in _format_learning_curve(curve, "contains")


def test_the_interval_is_that_of_other_items_and_of_other_trainings() -> None:
    """Few items make it wide; so do trainings that differ on the same items."""
    curves = {items: fit(lambda n: 3 * n**-0.7, items=items) for items in (40, 4000)}
    widths = {items: curve.b_high - curve.b_low for items, curve in curves.items()}
    assert widths[4000] > 0.01
    assert widths[40] > 4 * widths[4000]
    scores = make_points(lambda n: 3 * n**-0.7, items=4000)
    spread: dict[int, list[list[float]]] = {}
    for size, (values,) in scores.items():
        spread[size] = [values, [max(0.0, value - 0.3) for value in values]]
    different = fit_curve(spread)
    same = fit_curve({size: [np.mean(pair, axis=0).tolist()] * 2 for size, pair in spread.items()})
    assert different is not None
    assert same is not None
    assert different.b_high - different.b_low > 2 * (same.b_high - same.b_low)
