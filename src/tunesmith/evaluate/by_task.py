"""Split what is measured on all held-out rows by named task.

In: MetricValues, the task of each row. Out: MetricValues per task, and their means over tasks.
Tasks with training rows and tasks without are never averaged together: what was learned and what
transfers are two results. Tasks have equal weight whatever their number of rows (macro average).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from tunesmith.evaluate.results import MetricValues, select_items


def split_by_task(
    measurement: MetricValues, tasks: Mapping[str, str], trained_tasks: Collection[str]
) -> Iterator[MetricValues]:
    """Yield the parts of a measurement; without tasks, the measurement itself.

    tasks: item id -> task. trained_tasks: the tasks with training rows.
    """
    if not tasks:
        yield measurement
        return
    names = list(dict.fromkeys(tasks[item] for item in measurement.ids))
    trained = [name for name in names if name in trained_tasks]
    held_out = [name for name in names if name not in trained_tasks]
    yield from _split_tasks(measurement, tasks, trained, "", "mean of tasks")
    yield from _split_tasks(measurement, tasks, held_out, " (held out)", "mean of held-out tasks")


def _split_tasks(
    measurement: MetricValues,
    tasks: Mapping[str, str],
    names: Collection[str],
    suffix: str,
    mean_label: str,
) -> Iterator[MetricValues]:
    for name in names:
        indices = [i for i, item in enumerate(measurement.ids) if tasks[item] == name]
        part = select_items(measurement, indices)
        yield replace(part, task=f"{measurement.task}: {name}{suffix}")
    if len(names) > 1:
        indices = [i for i, item in enumerate(measurement.ids) if tasks[item] in names]
        part = select_items(measurement, indices)
        groups = tuple(tasks[item] for item in part.ids)
        yield replace(part, task=f"{measurement.task}: {mean_label}", groups=groups)
