"""Rows that are trained and measured: with them a score would show memory, so the run is refused.

Rehearsal rows that are held out elsewhere, and rows of a held-out task that train under another name. Rows are compared
by their digests, white space evened out, all of them. Left out: what training rows share with held-out ones of their
own task, which the data check reports (audit.py), and texts of which only a part is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import Dataset

SHOWN = 5


def refuse_overlap(rehearsal: Dataset, held_out: Mapping[str, Dataset]) -> None:
    """`held_out`: role -> rows that are measured. Raises InputError that names the rows of both sides."""
    for role, rows in held_out.items():
        if same := _same(rehearsal, rows):
            raise InputError(
                f"{same[0]:,} of {len(rehearsal):,} rows are also in {role}: {same[1]}",
                where=f"rehearsal: {rehearsal.path}",
                fix=f"take them out of the rehearsal file: what is trained cannot be measured in {role}",
            )


def refuse_trained(data: Dataset, held_out: Mapping[str, Dataset]) -> None:
    """Raises InputError for a task without training rows of its own some of whose rows train nevertheless."""
    for role, rows in held_out.items():
        for number, part in enumerate(rows.parts):
            if not part.task or part.task in data.tasks:
                continue
            own = rows.take(np.flatnonzero(rows.part_N == number))
            if same := _same(own, data):
                raise InputError(
                    f"{same[0]:,} of {len(own):,} rows of the held-out task '{part.task}' are also in data: {same[1]}",
                    where=f"{role}: {part.source.path}",
                    fix="take them out of one of the two, or give the source the name of the task that trains them",
                )


def refuse_tested(datasets: Mapping[str, Dataset]) -> None:
    """Raises InputError for rows of test_data that train: the last measure would show memory. Rows of eval_data are
    reported by the data check, and only select."""
    test = datasets.get("test_data")
    if test is not None and (same := _same(test, datasets["data"])):
        raise InputError(
            f"{same[0]:,} of {len(test):,} rows are also in data: {same[1]}",
            where=f"test_data: {test.path}",
            fix="take them out of one of the two; `tunesmith data split` makes files that have no row in common",
        )


def _same(own: Dataset, other: Dataset) -> tuple[int, str] | None:
    """How many rows are in the other data set too, and which; nothing if none is."""
    same_N = np.flatnonzero(np.isin(own.contents_N, other.contents_N))
    of = {int(content): index for index, content in enumerate(other.contents_N.tolist())}
    pairs = [f"{own.id(i)} is {other.id(of[int(own.contents_N[i])])}" for i in same_N[:SHOWN].tolist()]
    more = f", and {len(same_N) - SHOWN:,} more" if len(same_N) > SHOWN else ""
    return (len(same_N), ", ".join(pairs) + more) if len(same_N) else None
