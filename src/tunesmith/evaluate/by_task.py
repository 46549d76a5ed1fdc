"""Scores by task: what was measured on all held-out rows, divided by the tasks that the rows are of.

    Measurement -> a Measurement a task, and the mean over tasks

Tasks that train and tasks that do not are never averaged together: what a model learnt and what it took over to
something else are two results. A task counts as much as any other, whatever its number of rows (the macro average).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from tunesmith.evaluate.results import Measurement


def by_task(whole: Measurement, tasks: Mapping[str, str], trained: Collection[str]) -> Iterator[Measurement]:
    """`tasks`: the task of each item; `trained`: those that have training rows. Without tasks: `whole` as it is."""
    if not tasks:
        yield whole
        return
    names = list(dict.fromkeys(tasks[item] for item in whole.ids))
    for label, mean, members in (
        ("{}", "mean of tasks", [name for name in names if name in trained]),
        ("{} (held out)", "mean of held-out tasks", [name for name in names if name not in trained]),
    ):
        for name in members:
            yield _part(whole, tasks, [name], label.format(name))
        if len(members) > 1:
            found = _part(whole, tasks, members, mean)
            yield replace(found, groups=tuple(tasks[item] for item in found.ids))


def _part(whole: Measurement, tasks: Mapping[str, str], names: Collection[str], label: str) -> Measurement:
    """The items of these tasks."""
    kept = [i for i, item in enumerate(whole.ids) if tasks[item] in names]
    ids, values, weights = (
        tuple(found[i] for i in kept) if found else () for found in (whole.ids, whole.values, whole.weights)
    )
    return replace(whole, task=f"{whole.task}: {label}", ids=ids, values=values, weights=weights)
