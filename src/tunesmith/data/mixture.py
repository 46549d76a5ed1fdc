"""Which row stands at each place of an epoch, where tasks are mixed.

    rows of each task, places of each task in an epoch -> Mixture; mixture.epoch(seed, number) -> row indices

A pure function of its arguments, so a run can go on at any step. A task goes through its rows in passes of its own:
none is taken again before all have been, and what an epoch leaves out comes in the next one. Left out: how many places
a task has (plan/mixture.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import order

PASSES = 2**40  # a task's first pass, times its number from 1: its orders are none of the epochs', nor another task's


@dataclass(frozen=True, eq=False)
class Mixture:
    """K rows of each task, and how many of them an epoch takes."""

    rows: tuple[np.ndarray, ...]  # of each task, K indices into the data set
    places: tuple[int, ...]  # of each task, in an epoch

    @classmethod
    def of(cls, dataset: Dataset, places: Mapping[str, int]) -> Mixture:
        """`places`: by task. Raises InputError for a task without rows."""
        if missing := [task for task in places if task not in dataset.tasks]:
            what, fix = f"the task '{missing[0]}' has no rows", "put them back, or make a new plan"
            raise InputError(what, where=dataset.path, fix=fix)
        number = {part.task: number for number, part in enumerate(dataset.parts)}
        rows = tuple(np.flatnonzero(dataset.part_N == number[task]) for task in places)
        return cls(rows, tuple(places.values()))

    def __len__(self) -> int:
        return sum(self.places)

    def epoch(self, seed: int, number: int) -> np.ndarray:
        """The rows of an epoch in their order; read-only."""
        return _epoch(self, seed, number)

    def taken(self, task: int, seed: int, number: int) -> np.ndarray:
        """The rows of a task that an epoch takes."""
        rows_K, count = self.rows[task], self.places[task]
        passes, places = np.divmod(np.arange(number * count, (number + 1) * count), len(rows_K))
        taken = np.empty(count, dtype=rows_K.dtype)
        for one in np.unique(passes).tolist():
            own = passes == one
            taken[own] = rows_K[order(seed, PASSES * (task + 1) + one, len(rows_K))[places[own]]]
        return taken


@lru_cache(maxsize=2)  # an epoch and the next one, at their border
def _epoch(mixture: Mixture, seed: int, number: int) -> np.ndarray:
    taken = [mixture.taken(task, seed, number) for task in range(len(mixture.rows))]
    rows_N = np.concatenate(taken)[order(seed, number, len(mixture))]
    rows_N.setflags(write=False)
    return rows_N
