"""Which rows may be shown as examples: the training rows of a task, for its questions in any role.

    data sets by role -> the same, their few-shot forms complete

Held-out rows are never shown, or a score on them would show memory. So are rows that are trained
away from: their answers are bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import Dataset, DataSourceReader
from tunesmith.data.formats.prompt_templates import FewShotExamples


def add_shots(roles: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Raises InputError for a task with few-shot forms that has too few training rows to show."""
    datasets: dict[str, Dataset] = {}
    for role, dataset in roles.items():
        parts = tuple(_add_examples(part, roles["data"], role) for part in dataset.parts)
        datasets[role] = dataclasses.replace(dataset, parts=parts)
    return datasets


def remove_shots(roles: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The rows alone, as whoever looks for what they have in common wants them: examples are other
    rows."""
    return {
        role: dataclasses.replace(dataset, parts=tuple(map(_remove_examples, dataset.parts)))
        for role, dataset in roles.items()
    }


def _remove_examples(part: DataSourceReader) -> DataSourceReader:
    return (
        part
        if part.prompt_formatter is None
        else dataclasses.replace(part, prompt_formatter=part.prompt_formatter.with_examples(None))
    )


def _add_examples(part: DataSourceReader, training: Dataset, role: str) -> DataSourceReader:
    if part.prompt_formatter is None or part.prompt_formatter.max_shots == 0:
        return part
    where, shots = f"{role}: {part.source.path}", part.prompt_formatter.max_shots
    examples = collect_examples(training, part.task)
    if examples is None:
        message = f"a form shows {shots} examples, and the task '{part.task}' has no training rows to take them from"
        fix = (
            "give it prompts of its own without shots, or the name of the task that trains its rows"
        )
        raise InputError(message, where=where, fix=fix)
    if len(examples.rows_P) <= shots:
        message = f"a form shows {shots} examples, and '{part.task}' has {len(examples.rows_P)} different training rows"
        raise InputError(
            message, where=where, fix=f"lower shots, or give at least {shots + 1} rows"
        )
    return dataclasses.replace(part, prompt_formatter=part.prompt_formatter.with_examples(examples))


def collect_examples(training: Dataset, task: str) -> FewShotExamples | None:
    """The training rows of a task, equal ones once; nothing if it has none."""
    for number, part in enumerate(training.parts):
        if part.task != task or task not in training.tasks:
            continue
        task_rows_K = np.flatnonzero(training.part_N == number)
        if training.constraint_counts.banned:
            task_rows_K = task_rows_K[
                [not training.read_example(row).banned_spans for row in task_rows_K.tolist()]
            ]
        contents_P, first_P = np.unique(training.contents_N[task_rows_K], return_index=True)
        return FewShotExamples(
            part.read_mapped_row, training.row_N[task_rows_K[first_P]], contents_P
        )
    return None
