"""The few-shot examples of every role: training rows of the same task.

    data sets by role -> data sets by role, with complete few-shot prompts

Held-out rows are never shown, or a score on them would measure memorization. Rows with banned spans
are not shown either: their answers are bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import Dataset, DataSourceReader
from tunesmith.data.formats.prompt_templates import FewShotExamples


def add_shots(roles: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Return the data sets with few-shot examples from the training rows.

    Raises InputError for a task with few-shot forms and too few training rows."""
    datasets: dict[str, Dataset] = {}
    for role, dataset in roles.items():
        parts = tuple(_add_examples(part, roles["data"], role) for part in dataset.parts)
        datasets[role] = dataclasses.replace(dataset, parts=parts)
    return datasets


def remove_shots(roles: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Return the data sets without few-shot examples, to compare rows by their own content."""
    datasets: dict[str, Dataset] = {}
    for role, dataset in roles.items():
        parts = tuple(_replace_examples(part, None) for part in dataset.parts)
        datasets[role] = dataclasses.replace(dataset, parts=parts)
    return datasets


def _replace_examples(part: DataSourceReader, examples: FewShotExamples | None) -> DataSourceReader:
    if part.prompt_formatter is None:
        return part
    return dataclasses.replace(part, prompt_formatter=part.prompt_formatter.with_examples(examples))


def _add_examples(part: DataSourceReader, training: Dataset, role: str) -> DataSourceReader:
    if part.prompt_formatter is None or part.prompt_formatter.max_shots == 0:
        return part
    where = f"{role}: {part.source.path}"
    shots = part.prompt_formatter.max_shots
    examples = _collect_examples(training, part.task)
    if examples is None:
        message = f"the prompts use {shots} shots, but task '{part.task}' has no training rows"
        fix = "set prompts without shots for it, or use the name of the task that trains its rows"
        raise InputError(message, where=where, fix=fix)
    num_examples = len(examples.rows_P)
    if num_examples <= shots:
        message = (
            f"the prompts use {shots} shots, but '{part.task}' has only {num_examples} "
            f"different training row{'s' * (num_examples != 1)}"
        )
        fix = f"lower shots, or add rows: at least {shots + 1} are needed"
        raise InputError(message, where=where, fix=fix)
    return _replace_examples(part, examples)


def _collect_examples(training: Dataset, task: str) -> FewShotExamples | None:
    """Return the training rows of a task without duplicates, or None if it has none."""
    for number, part in enumerate(training.parts):
        if part.task != task or task not in training.tasks:
            continue
        task_rows_K = np.flatnonzero(training.part_N == number)
        if training.constraint_counts.banned:
            examples = [training.read_example(row) for row in task_rows_K.tolist()]
            task_rows_K = task_rows_K[[not example.banned_spans for example in examples]]
        contents_P, first_P = np.unique(training.contents_N[task_rows_K], return_index=True)
        rows_P = training.row_N[task_rows_K[first_P]]
        return FewShotExamples(part.read_mapped_row, rows_P, contents_P)
    return None
