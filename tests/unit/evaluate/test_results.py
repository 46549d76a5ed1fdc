"""Scores and comparisons: paired by item, never without an interval, never a difference that is not
shown."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from tunesmith.core.errors import GateError, InputError
from tunesmith.evaluate.results import (
    MetricValues,
    compare_measurements,
    compute_score,
    format_comparison,
    split_by_task,
)
from tunesmith.evaluate.statistics import (
    compute_wilson_interval,
    judge_comparison,
)


def measured(values, **changed) -> MetricValues:
    ids = tuple(f"test:{i}" for i in range(len(values)))
    return MetricValues("task", "exact_match", ids, tuple(float(v) for v in values), **changed)


def test_a_rate_gets_wilsons_interval() -> None:
    result = compute_score(measured([1, 1, 0, 1]), step=7)
    assert (result.low, result.high) == compute_wilson_interval(3, 4)
    assert (result.task, result.metric, result.value, result.n, result.step) == (
        "task",
        "exact_match",
        0.75,
        4,
        7,
    )


def test_other_values_get_a_t_interval() -> None:
    result = compute_score(measured([0.5, 1, 0, 0.25] * 10))
    assert result.value == pytest.approx(0.4375)
    assert 0 < result.low < 0.4375 < result.high < 1
    assert (result.low, result.high) != compute_wilson_interval(17.5, 40)


def test_weights_count_within_the_mean_and_tasks_count_alike() -> None:
    assert compute_score(measured([1, 4], weights=(3.0, 1.0))).value == pytest.approx(1.75)
    grouped = measured([1, 1, 1, 1, 5, 5], strata=("web",) * 4 + ("code",) * 2)
    assert compute_score(grouped).value == pytest.approx(3.0)
    both = measured([1, 4, 5, 5], weights=(3.0, 1.0, 1.0, 1.0), strata=("a", "a", "b", "b"))
    assert compute_score(both).value == pytest.approx((1.75 + 5) / 2)


@pytest.mark.parametrize(
    "too_few",
    [measured([]), measured([0.5]), measured([1, 2, 3], strata=("a", "a", "b"))],
    ids=["none", "one", "group"],
)
def test_too_few_items_are_refused(too_few: MetricValues) -> None:
    with pytest.raises(InputError, match=r"interval|no items"):
        compute_score(too_few)


def test_the_difference_is_paired() -> None:
    random = np.random.default_rng(0)
    before = random.random(80)
    result = compare_measurements(
        measured(before), measured(before + 0.02 + 0.005 * random.random(80)), step=9
    )
    assert result.difference == pytest.approx(0.0225, abs=1e-3)
    assert result.low > 0.02, (
        "the items differ by far more than the change, which pairing takes out"
    )
    assert result.after.low < result.before.high, "unpaired intervals overlap"
    assert (result.before.step, result.after.step) == (0, 9)


def test_the_order_of_the_items_does_not_matter() -> None:
    before = measured(
        [0.1, 0.5, 0.9, 0.3], weights=(1.0, 2.0, 3.0, 4.0), strata=("a", "b", "a", "b")
    )
    after = replace(before, values=(0.2, 0.7, 0.9, 0.1))
    order = (2, 0, 3, 1)
    shuffled = replace(
        after,
        **{
            key: tuple(getattr(after, key)[i] for i in order)
            for key in ("ids", "values", "weights", "strata")
        },
    )
    assert compare_measurements(before, shuffled) == compare_measurements(before, after)


def test_rates_are_compared_by_gains_and_losses() -> None:
    result = compare_measurements(
        measured([0] * 30 + [1] * 10), measured([1] * 25 + [0] * 6 + [1] * 9)
    )
    assert result.difference == pytest.approx(24 / 40)
    gain, loss = 26 / 42, 2 / 42  # Bonett and Price
    half = stats.t.ppf(0.975, 41) * math.sqrt((gain + loss - (gain - loss) ** 2) / 42)
    assert (result.low, result.high) == pytest.approx((gain - loss - half, gain - loss + half))
    assert judge_comparison(result) == "better"


def test_equal_answers_show_no_difference() -> None:
    for values in ([1, 0, 1, 1, 0, 0], [0.5, 0.25, 0.1, 0.9, 0.3, 0.4]):
        result = compare_measurements(measured(values), measured(values))
        assert result.difference == 0
        assert judge_comparison(result) == "no difference shown"


def test_lower_can_be_better() -> None:
    random = np.random.default_rng(0)
    before = measured(2 + random.random(50), higher_is_better=False)
    for change, expected in ((-0.5, "better"), (0.5, "worse"), (0.0, "no difference shown")):
        noise = 0.1 * random.standard_normal(50)
        after = replace(
            before, values=tuple((np.array(before.values) + change + noise - noise.mean()).tolist())
        )
        assert judge_comparison(compare_measurements(before, after)) == expected


def test_losses_between_0_and_1_are_no_grades() -> None:
    bits = measured([0.8, 0.7, 0.9, 0.85, 0.75] * 8, higher_is_better=False)
    same = compare_measurements(bits, bits)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    assert judge_comparison(same) == "no difference shown"
    constant = compute_score(measured([0.8] * 5, higher_is_better=False))
    assert (constant.low, constant.high) == pytest.approx((0.8, 0.8))
    above = compute_score(measured([0.99] * 9 + [0.2], higher_is_better=False))
    assert above.high > 1, "a loss of 1 is no upper bound"


def test_equal_grades_stay_uncertain() -> None:
    grades = measured([0.8, 0.7, 0.9, 0.85, 0.75])
    same = compare_measurements(grades, grades)
    assert same.low < 0 < same.high
    breaks = compute_score(measured([0] * 8 + [1] * 2, higher_is_better=False))
    assert (breaks.low, breaks.high) == compute_wilson_interval(2, 10)
    tasks = ("a",) * 5 + ("b",) * 5
    right = compute_score(measured([0] * 10, strata=tasks, higher_is_better=False))
    assert right.low == 0 < right.high, "none of ten rows breaks it: the rate need not be 0"


def test_a_claim_says_all_that_it_needs() -> None:
    result = compare_measurements(measured([0] * 20), measured([1] * 20), step=5)
    assert (
        format_comparison(result)
        == "task, exact_match: 0.000 -> 1.000, difference +1.000 [+0.724, +1.000], n = 20: better"
    )
    assert format_comparison(compare_measurements(measured([0, 1]), measured([1, 1]))).endswith(
        "n = 2: too few items to tell"
    )


def test_different_items_are_not_compared() -> None:
    item = measured([0, 1, 1])
    others = [
        replace(item, ids=("test:0", "test:1", "test:9")),
        replace(item, ids=("test:0", "test:1", "test:1")),
        replace(item, ids=item.ids[:2], values=item.values[:2]),
        replace(item, metric="field_f1"),
        replace(item, weights=(1.0, 2.0, 3.0)),
    ]
    for other in others:
        with pytest.raises(InputError, match=r"same items|cannot be compared|different weights"):
            compare_measurements(item, other)


# ---------------------------------------------------------------- named tasks

TASKS = {
    "a:1": "dates",
    "b:1": "names",
    "a:2": "dates",
    "b:2": "names",
    "c:1": "new",
    "c:2": "new",
    "a:3": "dates",
}
FULL = MetricValues(
    "test", "loss", tuple(TASKS), (1.0, 10.0, 2.0, 30.0, 5.0, 7.0, 3.0), (1.0,) * 6 + (2.0,)
)


def test_each_task_has_its_own_items_and_the_mean_is_of_tasks() -> None:
    result = {part.task: part for part in split_by_task(FULL, TASKS, {"dates", "names"})}
    assert list(result) == [
        "test: dates",
        "test: names",
        "test: mean of tasks",
        "test: new (held out)",
    ]
    assert result["test: dates"].ids == ("a:1", "a:2", "a:3")
    assert result["test: dates"].weights == (1.0, 1.0, 2.0)
    values = {name: compute_score(part).value for name, part in result.items()}
    assert list(values.values()) == pytest.approx([9 / 4, 20, (9 / 4 + 20) / 2, 6])


def test_held_out_tasks_have_a_mean_of_their_own() -> None:
    result = [part.task for part in split_by_task(FULL, TASKS, {"dates"})]
    assert result[1:] == [
        "test: names (held out)",
        "test: new (held out)",
        "test: mean of held-out tasks",
    ]


def test_rates_of_tasks_are_averaged_with_an_interval_that_draws_within_tasks() -> None:
    rows = {
        f"{task}:{i}": task for task, count in (("big", 90), ("small", 10)) for i in range(count)
    }
    before = MetricValues("test", "exact_match", tuple(rows), (0.0,) * 100)
    after = MetricValues(
        "test", "exact_match", tuple(rows), (1.0,) * 45 + (0.0,) * 45 + (1.0,) * 9 + (0.0,)
    )
    means = [list(split_by_task(full, rows, set(rows.values())))[-1] for full in (before, after)]
    result = compare_measurements(*means)
    assert result.difference == pytest.approx((0.5 + 0.9) / 2)
    assert 0.55 < result.low < result.difference < result.high < 0.85


def test_without_tasks_the_whole_stays_as_it_is() -> None:
    assert list(split_by_task(FULL, {}, ())) == [FULL]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(value: float) -> None:
    """It has no interval, and no file of JSON can hold it."""
    finite = measured([0.5] * 9)
    broken = measured([0.5, value, *[0.5] * 7])
    message = "task exact_match is not a finite number for 1 of 9 items: test:1"
    with pytest.raises(GateError, match=message):
        compute_score(broken)
    for before, after in ((finite, broken), (broken, finite)):
        with pytest.raises(GateError, match=message):
            compare_measurements(before, after)
