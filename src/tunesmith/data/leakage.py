"""Rows that are trained and measured: with them a score would show memory, so the run is refused.

Rehearsal rows that are held out elsewhere, and rows of a held-out task that train under another
name. Rows are compared by their digests, white space evened out, all of them. Left out: what
training rows share with held-out ones of their own task, which the data check reports (audit.py),
and texts of which only a part is the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import Dataset

MAX_SHOWN_PAIRS = 5


def refuse_rehearsal_leakage(rehearsal: Dataset, held_out: Mapping[str, Dataset]) -> None:
    """`held_out`: role -> rows that are measured. Raises InputError that names the rows of both
    sides."""
    for role, dataset in held_out.items():
        if overlap := _find_overlap(rehearsal, dataset):
            raise InputError(
                f"{overlap[0]:,} of {len(rehearsal):,} rows are also in {role}: {overlap[1]}",
                where=f"rehearsal: {rehearsal.path}",
                fix=f"take them out of the rehearsal file: what is trained cannot be measured in {role}",
            )


def refuse_task_leakage(data: Dataset, held_out: Mapping[str, Dataset]) -> None:
    """Raises InputError for a task without training rows of its own some of whose rows train
    nevertheless."""
    for role, dataset in held_out.items():
        for part_index, part in enumerate(dataset.parts):
            if not part.task or part.task in data.tasks:
                continue
            task_rows = dataset.select_rows(np.flatnonzero(dataset.part_N == part_index))
            if overlap := _find_overlap(task_rows, data):
                raise InputError(
                    f"{overlap[0]:,} of {len(task_rows):,} rows of the held-out task '{part.task}' are also in data: {overlap[1]}",
                    where=f"{role}: {part.source.path}",
                    fix="take them out of one of the two, or give the source the name of the task that trains them",
                )


def refuse_test_leakage(datasets: Mapping[str, Dataset]) -> None:
    """Raises InputError for rows of test_data that train: the last measure would show memory. Rows
    of eval_data are reported by the data check, and only select."""
    test = datasets.get("test_data")
    if test is not None and (overlap := _find_overlap(test, datasets["data"])):
        raise InputError(
            f"{overlap[0]:,} of {len(test):,} rows are also in data: {overlap[1]}",
            where=f"test_data: {test.path}",
            fix="take them out of one of the two; `tunesmith data split` makes files that have no row in common",
        )


def _find_overlap(dataset: Dataset, other: Dataset) -> tuple[int, str] | None:
    """How many rows are in the other data set too, and which; nothing if none is."""
    shared_N = np.flatnonzero(np.isin(dataset.contents_N, other.contents_N))
    index_by_content = {
        int(content): index for index, content in enumerate(other.contents_N.tolist())
    }
    pairs = [
        f"{dataset.get_id(i)} is {other.get_id(index_by_content[int(dataset.contents_N[i])])}"
        for i in shared_N[:MAX_SHOWN_PAIRS].tolist()
    ]
    more = (
        f", and {len(shared_N) - MAX_SHOWN_PAIRS:,} more" if len(shared_N) > MAX_SHOWN_PAIRS else ""
    )
    return (len(shared_N), ", ".join(pairs) + more) if len(shared_N) else None
