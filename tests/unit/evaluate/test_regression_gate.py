"""Gates: a metric passes only if a loss beyond the margin is excluded."""

from __future__ import annotations

import pytest

from tunesmith.evaluate.regression_gate import Gate, build_gates
from tunesmith.evaluate.results import MetricValues, compare_measurements


def gate(before: list[float], after: list[float], **changed: bool) -> Gate:
    ids = tuple(f"test:{i}" for i in range(len(before)))
    first = MetricValues("test", "exact_match", ids, tuple(map(float, before)), **changed)
    second = MetricValues("test", "exact_match", ids, tuple(map(float, after)), **changed)
    return build_gates([compare_measurements(first, second)], 0.02)[0]


@pytest.mark.parametrize(
    ("lost", "n", "message"),
    [
        (5, 5, "worse"),
        (4, 8, "too few items to tell"),
        (1, 8, "too few items to tell"),
        (0, 8, "too few items to tell"),
        (4, 4, "too few items to tell"),
        (3, 30, "too few items to tell"),
        (60, 500, "worse"),
        (20, 500, "worse"),
    ],
)
def test_lost_items_fail(lost: int, n: int, message: str) -> None:
    result = gate([1] * n, [0] * lost + [1] * (n - lost))
    assert not result.passed
    assert result.message.endswith(f": {message}")
    assert result.margin == 0.1


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 60), (2, 2, 120), (30, 2, 60)])
def test_a_model_that_is_no_worse_passes(gained: int, lost: int, n: int) -> None:
    before = [0] * gained + [1] * (n - gained)
    after = [1] * gained + [0] * lost + [1] * (n - gained - lost)
    assert gate(before, after).passed


def test_where_less_is_better_a_rise_fails() -> None:
    assert not gate([0] * 100, [1] * 30 + [0] * 70, higher_is_better=False).passed
    assert gate([1] * 30 + [0] * 70, [0] * 100, higher_is_better=False).passed


def test_losses_have_a_margin_relative_to_the_value_before() -> None:
    before = [2.0 + 0.1 * (i % 5) for i in range(40)]
    slightly = [value + 0.01 * (-1) ** i for i, value in enumerate(before)]
    result = gate(before, slightly, higher_is_better=False)
    assert result.passed
    assert result.margin == pytest.approx(0.22)
    wide = [value + 3 * (-1) ** i for i, value in enumerate(before)]
    failed = gate(before, wide, higher_is_better=False)
    assert not failed.passed
    assert failed.message.endswith("too few items to tell")
