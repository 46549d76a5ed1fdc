"""Scores by task: what was measured on all held-out rows, divided by the tasks that the rows are
of.

    Measurement -> a Measurement a task, and the mean over tasks

Tasks that train and tasks that do not are never averaged together: what a model learnt and what it
took over to something else are two results. A task counts as much as any other, whatever its number
of rows (the macro average)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from tunesmith.evaluate.results import MetricValues


def split_by_task(
    measurement: MetricValues, tasks: Mapping[str, str], trained_tasks: Collection[str]
) -> Iterator[MetricValues]:
    """`tasks`: the task of each item; `trained`: those that have training rows. Without tasks:
    `whole` as it is."""
    if not tasks:
        yield measurement
        return
    task_names = list(dict.fromkeys(tasks[item] for item in measurement.ids))
    for label, mean, members in (
        ("{}", "mean of tasks", [name for name in task_names if name in trained_tasks]),
        (
            "{} (held out)",
            "mean of held-out tasks",
            [name for name in task_names if name not in trained_tasks],
        ),
    ):
        for name in members:
            yield _select_tasks(measurement, tasks, [name], label.format(name))
        if len(members) > 1:
            subset = _select_tasks(measurement, tasks, members, mean)
            yield replace(subset, groups=tuple(tasks[item] for item in subset.ids))


def _select_tasks(
    measurement: MetricValues, tasks: Mapping[str, str], task_names: Collection[str], label: str
) -> MetricValues:
    """The items of these tasks."""
    indices = [i for i, item in enumerate(measurement.ids) if tasks[item] in task_names]
    ids, values, weights = (
        tuple(column[i] for i in indices) if column else ()
        for column in (measurement.ids, measurement.values, measurement.weights)
    )
    return replace(
        measurement, task=f"{measurement.task}: {label}", ids=ids, values=values, weights=weights
    )
