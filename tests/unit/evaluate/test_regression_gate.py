"""Gates: a metric passes only if a loss beyond the margin is excluded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fake_runs import PLAN, make_comparison, write_run
from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK, Score
from tunesmith.core.types import Comparison
from tunesmith.evaluate.error_analysis import Evaluation
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.regression_gate import (
    EvalReport,
    Gate,
    build_gates,
    build_limit_gates,
    parse_metrics,
)
from tunesmith.evaluate.results import MetricValues, compare_measurements
from tunesmith.recipe.metric_limits import parse_limits


def gate(before: list[float], after: list[float], **changed: bool) -> Gate:
    ids = tuple(f"test:{i}" for i in range(len(before)))
    first = MetricValues("test", "exact_match", ids, tuple(map(float, before)), **changed)
    second = MetricValues("test", "exact_match", ids, tuple(map(float, after)), **changed)
    return build_gates([compare_measurements(first, second)], 0.02)[0]


@pytest.mark.parametrize(
    ("lost", "n", "message"),
    [
        (5, 5, "too few items to tell"),
        (8, 8, "worse"),
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
    halved = gate(before, [value / 2 for value in before], higher_is_better=False)
    assert halved.margin == pytest.approx(0.22)
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


# ---------------------------------------------------------------- which margin, which limits


def judge(comparison: Comparison, margin: float | None = 0.02) -> Gate:
    (result,) = build_gates([comparison], margin)
    return result


def make_bits(low: float, high: float) -> Comparison:
    """Compare bits per byte of general text that change by the middle of an interval."""
    middle = (low + high) / 2
    comparison = make_comparison(
        BITS_PER_BYTE, 1.0, 1.0 + middle, 0.0, task=GENERAL_TASK, higher_is_better=False
    )
    return dataclasses.replace(comparison, difference=middle, low=low, high=high)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.125, 0.25, "worse, within the margin"),
        (-0.125, 0.25, "no difference shown"),
        (-0.5, -0.25, "better"),
        (0.125, 0.2501, "too few items to tell"),
        (0.25, 0.5, "too few items to tell"),
        (0.2501, 0.5, "worse"),
    ],
)
def test_a_loss_up_to_the_margin_is_allowed_in_general_text(
    low: float, high: float, verdict: str
) -> None:
    result = judge(make_bits(low, high), margin=0.25)
    assert result.message.endswith(f": {verdict}")
    assert result.passed == (high <= 0.25)
    assert (result.bound, result.margin) == (high, 0.25)
    assert result.message.startswith(f"{(low + high) / 2:+.4f} [{low:+.4f}, {high:+.4f}], n = 80, ")


@pytest.mark.parametrize(("n", "is_enough"), [(5, False), (6, True)])
def test_a_gate_needs_six_items(n: int, is_enough: bool) -> None:
    comparison = make_bits(-0.01, 0.01)
    after = dataclasses.replace(comparison.after, n=n)
    assert judge(dataclasses.replace(comparison, after=after)).passed == is_enough


@pytest.mark.parametrize(
    ("low", "high", "before", "higher_is_better", "improved", "margin"),
    [
        (0.0, 1.0, 0.5, True, None, 0.1),  # a grade
        (-0.01, 1.0, 0.5, True, None, 0.05),
        (0.0, 1.01, 0.5, True, None, 0.05),
        (0.0, 1.0, 0.5, False, None, 0.05),  # a loss, or an error
        (0.0, 1.0, 0.5, False, 3, 0.1),  # a rate
        (-4.0, 1.0, -3.0, True, None, 0.3),
    ],
)
def test_grades_have_ten_points_and_other_values_a_tenth(
    low: float,
    high: float,
    before: float,
    higher_is_better: bool,
    improved: int | None,
    margin: float,
) -> None:
    comparison = make_comparison(
        "score", before, before + 7, 0.0, higher_is_better=higher_is_better, improved=improved
    )
    for side in ("before", "after"):
        score = dataclasses.replace(comparison.before, low=low, high=high)
        inner = dataclasses.replace(comparison.before, low=0.2, high=0.3)
        sides = {"before": inner, "after": dataclasses.replace(inner, value=before + 7)}
        changed = dataclasses.replace(comparison, **sides | {side: score})
        changed = dataclasses.replace(
            changed, before=dataclasses.replace(changed.before, value=before)
        )
        assert judge(changed).margin == pytest.approx(margin)


def test_without_a_margin_general_text_has_that_of_other_metrics() -> None:
    result = judge(make_bits(-0.01, 0.0625), margin=None)
    assert (result.passed, result.margin) == (True, 0.1)
    assert not judge(make_bits(0.01, 0.0625), margin=None).passed  # significantly worse
    assert not judge(make_bits(-0.01, 0.125), margin=None).passed


@pytest.mark.parametrize("task", ["eval", "test"])  # before and after "general text"
def test_a_metric_of_any_task_is_gated_and_described_as_one(task: str) -> None:
    result = judge(make_comparison("chrf", 0.5, 0.51, 0.02, task=task), margin=0.25)
    assert (result.name, result.margin) == (f"{task} chrf", 0.1)
    assert ", at most 0.1 worse: " in result.message
    bits = make_bits(-0.01, 0.01)
    assert ", bits per byte, at most +0.25: " in judge(bits, margin=0.25).message


@pytest.mark.parametrize(
    ("n", "passed", "verdict"),
    [(5, False, "too few items to tell"), (6, True, "held")],
)
def test_a_limit_needs_six_items(n: int, passed: bool, verdict: str) -> None:
    score = Score("test", "chrf", 0.9, 0.85, 0.95, n, 3)
    (result,) = build_limit_gates([score], parse_limits({"chrf": ">= 0.8"}))
    assert (result.passed, result.bound) == (passed, 0.85)
    assert result.message.endswith(f": {verdict}")


def test_the_margin_is_that_of_the_run(tmp_path: Path) -> None:
    config = dataclasses.replace(PLAN.config, forgetting_margin=0.0625)
    run = write_run(tmp_path / "run", plan=dataclasses.replace(PLAN, config=config))
    evaluation = Evaluation((make_bits(0.05, 0.06),), None)
    report = EvalReport.from_evaluation(evaluation, run)
    assert (report.margin, report.comparisons) == (0.0625, evaluation.comparisons)
    assert report.scores == (evaluation.comparisons[0].after,)
    assert report.check_gates()[0].passed
    assert EvalReport.from_evaluation(evaluation, None).margin is None
    with pytest.raises(InputError, match="neither test_data nor retention_data"):
        EvalReport.from_evaluation(Evaluation((), None), run)


def test_kl_is_not_gated_and_something_has_to_be() -> None:
    kl = dataclasses.replace(make_bits(0.5, 1.0), metric="kl")
    bits = make_bits(-0.01, 0.01)
    task_kl = dataclasses.replace(kl, task="test")
    names = [result.name for result in build_gates([kl, bits, task_kl], 0.02)]
    assert names == [f"{GENERAL_TASK} {BITS_PER_BYTE}", "test kl"]
    with pytest.raises(InputError, match="there is no metric to gate"):
        build_gates([kl], 0.02)
    with pytest.raises(InputError, match="a base model has no before/after to gate"):
        EvalReport((bits.after,)).check_gates()
    assert [result.name for result in EvalReport((), (bits,), 0.02).check_gates()] == names[:1]
    assert EvalReport((), (make_bits(0.03, 0.04),), 0.05).check_gates()[0].passed
    assert not EvalReport((), (make_bits(0.03, 0.04),), 0.02).check_gates()[0].passed


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, ()),
        ("chrf", ("chrf",)),
        ("chrf, exact_match", ("chrf", "exact_match")),
        ("[chrf, exact_match]", ("chrf", "exact_match")),
        (["chrf"], ("chrf",)),
    ],
)
def test_metrics_are_written_as_in_a_recipe(
    text: str | list[str] | None, names: tuple[str, ...]
) -> None:
    assert parse_metrics(text) == names


@pytest.mark.parametrize("text", ["chrf: {}", [3], [None]])
def test_what_is_no_metric_is_refused(text: str | list[str]) -> None:
    with pytest.raises(InputError, match="invalid list of metrics"):
        parse_metrics(text)
