"""Refuse rows that are both trained and evaluated: a score on them would measure memorization.

Checked are rehearsal rows that are held out elsewhere, rows of a held-out task that train under
another name, and rows of test_data that train. All rows are compared, by digests that ignore white
space. Left out: rows of eval_data of a trained task, which the data check reports, and partial
copies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import Dataset

MAX_SHOWN_PAIRS = 5


def refuse_rehearsal_leakage(rehearsal: Dataset, held_out: Mapping[str, Dataset]) -> None:
    """Raise InputError if rehearsal rows are also in a held-out role."""
    for role, dataset in held_out.items():
        if overlap := _describe_overlap(rehearsal, dataset, role):
            fix = f"remove them from the rehearsal file, so that {role} stays held-out"
            raise InputError(overlap, where=f"rehearsal: {rehearsal.path}", fix=fix)


def refuse_task_leakage(data: Dataset, held_out: Mapping[str, Dataset]) -> None:
    """Raise InputError if rows of a task that is not trained are also in the training data."""
    for role, dataset in held_out.items():
        for part_index, part in enumerate(dataset.parts):
            if not part.task or part.task in data.tasks:
                continue
            task_rows = dataset.select_rows(np.flatnonzero(dataset.part_N == part_index))
            if overlap := _describe_overlap(task_rows, data, "data", f"held-out '{part.task}' "):
                fix = "remove them from one side, or use the name of the task that trains them"
                raise InputError(overlap, where=f"{role}: {part.source.path}", fix=fix)


def refuse_test_leakage(datasets: Mapping[str, Dataset]) -> None:
    """Raise InputError if rows of test_data are also in the training data.

    Rows of eval_data only select; the data check reports them."""
    test = datasets.get("test_data")
    if test is not None and (overlap := _describe_overlap(test, datasets["data"], "data")):
        fix = "remove them from one side; `tunesmith data split` writes files without shared rows"
        raise InputError(overlap, where=f"test_data: {test.path}", fix=fix)


def _describe_overlap(dataset: Dataset, other: Dataset, other_role: str, kind: str = "") -> str:
    """Return how many rows are also in the other data set, and which; "" if none."""
    shared_K = np.flatnonzero(np.isin(dataset.contents_N, other.contents_N)).tolist()
    if not shared_K:
        return ""
    index_by_content = {content: i for i, content in enumerate(other.contents_N.tolist())}
    pairs: list[str] = []
    for i in shared_K[:MAX_SHOWN_PAIRS]:
        other_index = index_by_content[int(dataset.contents_N[i])]
        pairs.append(f"{dataset.get_id(i)} is {other.get_id(other_index)}")
    if len(shared_K) > MAX_SHOWN_PAIRS:
        pairs.append(f"and {len(shared_K) - MAX_SHOWN_PAIRS:,} more")
    verb = "is" if len(shared_K) == 1 else "are"
    return (
        f"{len(shared_K):,} of {len(dataset):,} {kind}rows {verb} also in {other_role}: "
        f"{', '.join(pairs)}"
    )
