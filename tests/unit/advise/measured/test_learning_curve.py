"""The learning curve finds the curve that made the points, and says nothing where it knows
nothing."""

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


def points(
    error: Callable[[int], float], sizes: tuple[int, ...] = SIZES, items: int = 400, seeds: int = 1
):
    """Items are right or wrong by a difficulty of their own."""
    hard = (np.arange(items) + 0.5) / items
    return {n: [[float(one > error(n)) for one in hard] for _ in range(seeds)] for n in sizes}


def fitted(error: Callable[[int], float], target: float | None = None, **shape) -> LearningCurve:
    found = fit_curve(points(error, **shape), target)
    assert found is not None
    return found


def test_it_finds_the_curve_and_the_examples_to_the_target() -> None:
    found = fitted(lambda n: 0.05 + 3 * n**-0.7, 0.9)
    assert found.b_low < 0.7 < found.b_high
    assert (found.a, found.b, found.c) == (
        pytest.approx(3, rel=0.35),
        pytest.approx(0.7, abs=0.1),
        pytest.approx(0.05, abs=0.03),
    )
    right = (3 / 0.05) ** (1 / 0.7)
    assert found.refusal == ""
    assert found.needed_examples == pytest.approx(right, rel=0.35)
    assert found.needed_examples_low is not None
    assert found.needed_examples_low < right
    at_100 = found.c + found.a * 100**-found.b
    assert at_100 == pytest.approx(1 - np.mean(points(lambda n: 0.05 + 3 * n**-0.7)[100]), abs=0.02)


def test_a_flat_and_a_rising_curve_are_refused() -> None:
    for error in (lambda n: 0.4 + 0 * n, lambda n: 0.2 + n / 1000):
        found = fitted(error, 0.9)
        assert found.needed_examples is None
        assert found.refusal.startswith("it may not fall: b is")
    noisy = {n: [np.random.default_rng(n).choice([0.0, 1.0], 30).tolist()] for n in SIZES}
    found = fit_curve(noisy, 0.9)
    assert found is not None
    assert found.refusal.startswith("it may not fall")


def test_nothing_is_said_far_beyond_the_largest_size() -> None:
    far = fitted(lambda n: 2 * n**-0.3, 0.9)
    assert far.needed_examples is None
    assert f"nothing is said beyond {MAX_EXTRAPOLATION * 400:,}" in far.refusal
    never = fitted(lambda n: 0.3 + 3 * n**-0.8, 0.9)
    assert "more than any number of examples" in never.refusal
    near = fitted(lambda n: 3 * n**-0.7, 0.97)
    assert near.needed_examples is not None
    assert 400 < near.needed_examples < MAX_EXTRAPOLATION * 400


def test_it_takes_four_sizes() -> None:
    assert fit_curve(points(lambda n: n**-0.5, sizes=(25,))) is None
    assert (
        fitted(lambda n: n**-0.5, 0.99, sizes=(25, 50, 100)).refusal
        == "3 sizes were trained: a curve takes 4"
    )


def test_several_trainings_widen_the_interval_by_their_spread() -> None:
    one = fitted(lambda n: 3 * n**-0.7)
    scores = points(lambda n: 3 * n**-0.7)
    spread = {
        n: [values[0], [max(0.0, value - 0.3) for value in values[0]]]
        for n, values in scores.items()
    }
    two = fit_curve(spread)
    assert two is not None
    assert two.b_high - two.b_low > one.b_high - one.b_low


def test_examples_to_a_target() -> None:
    assert solve_examples(0.9, 1, 0.5, 0) == pytest.approx(100)
    assert solve_examples(0.9, 1, 0.5, 0.1) == float("inf")
    assert solve_examples(0.5, 0, 0, 0.4) == 1


def test_a_curve_that_rises_is_said_not_to_fall() -> None:
    """Fitted with an exponent below 0, which no one should read as a law."""
    curve = fit_curve({25: [[1.0] * 8 + [0.0] * 8], 50: [[1.0] * 4 + [0.0] * 12]})
    assert curve is not None
    assert curve.b < 0
    assert "examples: it does not fall;" in _format_learning_curve(curve, "contains")
