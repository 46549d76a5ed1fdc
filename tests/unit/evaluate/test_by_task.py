"""Scores divided by task: what trains and what does not are never averaged together, and no task
counts by its size."""

import pytest

from tunesmith.evaluate.by_task import split_by_task
from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score

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
