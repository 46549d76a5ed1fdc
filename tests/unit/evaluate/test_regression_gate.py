"""Gates: a metric passes only if a loss beyond the margin is excluded."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.core.events import GENERAL_TASK
from tunesmith.evaluate.metrics import BITS_PER_BYTE
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


# ---------------------------------------------------------------- general text


def gate_general_text(
    loss: float, *, noise: float = 0.002, count: int = 40, margin: float = 0.02
) -> Gate:
    """Judge texts that get `loss` bits per byte worse, each by a little more or less."""
    random = np.random.default_rng(0)
    before = 0.7 + 0.2 * random.random(count)
    change = random.standard_normal(count)
    after = before + loss + noise * (change - change.mean())
    ids = tuple(f"general:{i}" for i in range(count))
    first, second = (
        MetricValues(
            GENERAL_TASK, BITS_PER_BYTE, ids, tuple(values.tolist()), higher_is_better=False
        )
        for values in (before, after)
    )
    return build_gates([compare_measurements(first, second)], margin)[0]


def test_general_text_may_get_significantly_worse_within_the_margin() -> None:
    result = gate_general_text(0.0039)
    assert result.passed
    assert result.message.startswith("+0.0039 [+0.00")
    assert result.message.endswith("at most +0.02: worse, within the margin")
    assert 0.0039 < result.bound < result.margin == 0.02


@pytest.mark.parametrize(
    ("loss", "noise", "count", "verdict"),
    [
        (0.03, 0.002, 40, "worse"),
        (0.0201, 0.0001, 40, "worse"),
        (0.0195, 0.01, 40, "too few items to tell"),
        (0.0, 0.2, 40, "too few items to tell"),
        (0.0039, 0.002, 4, "too few items to tell"),
    ],
)
def test_general_text_beyond_the_margin_fails(
    loss: float, noise: float, count: int, verdict: str
) -> None:
    result = gate_general_text(loss, noise=noise, count=count)
    assert not result.passed
    assert result.message.endswith(f": {verdict}")


def test_a_margin_of_zero_allows_no_loss() -> None:
    assert not gate_general_text(0.0039, margin=0).passed
    assert gate_general_text(-0.0039, margin=0).message.endswith(": better")


def test_other_metrics_may_not_get_significantly_worse_within_their_margin() -> None:
    before = [2.0 + 0.1 * (i % 5) for i in range(40)]
    after = [value + 0.01 + 0.001 * (-1) ** i for i, value in enumerate(before)]
    result = gate(before, after, higher_is_better=False)
    assert (result.passed, result.bound < result.margin) == (False, True)
    assert result.message.endswith(": worse")
