"""Which rows may be shown as examples: the training rows of a task, for its questions in any role.

    data sets by role -> the same, their few-shot forms complete

Held-out rows are never shown, or a score on them would show memory. So are rows that are trained away from: their
answers are bad.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import Dataset, Part
from tunesmith.data.formats.prompt_templates import Examples


def with_shots(roles: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Raises InputError for a task with few-shot forms that has too few training rows to show."""
    found: dict[str, Dataset] = {}
    for role, rows in roles.items():
        parts = tuple(_complete(part, roles["data"], role) for part in rows.parts)
        found[role] = dataclasses.replace(rows, parts=parts)
    return found


def without_shots(roles: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The rows alone, as whoever looks for what they have in common wants them: examples are other rows."""
    return {role: dataclasses.replace(rows, parts=tuple(map(_alone, rows.parts))) for role, rows in roles.items()}


def _alone(part: Part) -> Part:
    return part if part.asking is None else dataclasses.replace(part, asking=part.asking.showing(None))


def _complete(part: Part, training: Dataset, role: str) -> Part:
    if part.asking is None or part.asking.shots == 0:
        return part
    where, shots = f"{role}: {part.source.path}", part.asking.shots
    examples = examples_of(training, part.task)
    if examples is None:
        what = f"a form shows {shots} examples, and the task '{part.task}' has no training rows to take them from"
        fix = "give it prompts of its own without shots, or the name of the task that trains its rows"
        raise InputError(what, where=where, fix=fix)
    if len(examples.rows_P) <= shots:
        what = f"a form shows {shots} examples, and '{part.task}' has {len(examples.rows_P)} different training rows"
        raise InputError(what, where=where, fix=f"lower shots, or give at least {shots + 1} rows")
    return dataclasses.replace(part, asking=part.asking.showing(examples))


def examples_of(training: Dataset, task: str) -> Examples | None:
    """The training rows of a task, equal ones once; nothing if it has none."""
    for number, part in enumerate(training.parts):
        if part.task != task or task not in training.tasks:
            continue
        own_K = np.flatnonzero(training.part_N == number)
        if training.tally.banned:
            own_K = own_K[[not training.example(row).banned for row in own_K.tolist()]]
        contents_P, first_P = np.unique(training.contents_N[own_K], return_index=True)
        return Examples(part.plain, training.row_N[own_K[first_P]], contents_P)
    return None
