"""Which row stands at each place of an epoch, where tasks are mixed.

    rows of each task, places of each task in an epoch -> Mixture; mixture.epoch(seed, number) -> row indices

A pure function of its arguments, so a run can go on at any step. A task goes through its rows in
passes of its own: none is taken again before all have been, and what an epoch leaves out comes in
the next one. Left out: how many places a task has (plan/mixture.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import permutation

PASS_OFFSET = (
    2**40
    # a task's first pass, times its number from 1: its orders are none of the epochs', nor another
    # task's
)


@dataclass(frozen=True, eq=False)
class TaskMixture:
    """K rows of each task, and how many of them an epoch takes."""

    rows: tuple[np.ndarray, ...]  # of each task, K indices into the data set
    epoch_rows: tuple[int, ...]  # of each task, in an epoch

    @classmethod
    def from_dataset(cls, dataset: Dataset, epoch_rows: Mapping[str, int]) -> TaskMixture:
        """`places`: by task. Raises InputError for a task without rows."""
        if missing := [task for task in epoch_rows if task not in dataset.tasks]:
            message, fix = (
                f"the task '{missing[0]}' has no rows",
                "put them back, or make a new plan",
            )
            raise InputError(message, where=dataset.path, fix=fix)
        part_indices = {part.task: part_indices for part_indices, part in enumerate(dataset.parts)}
        rows = tuple(np.flatnonzero(dataset.part_N == part_indices[task]) for task in epoch_rows)
        return cls(rows, tuple(epoch_rows.values()))

    def __len__(self) -> int:
        return sum(self.epoch_rows)

    def build_epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch in their order; read-only."""
        return _build_epoch(self, seed, epoch)

    def select_rows(self, task: int, seed: int, epoch: int) -> np.ndarray:
        """The rows of a task that an epoch takes."""
        rows_K, count = self.rows[task], self.epoch_rows[task]
        passes, positions = np.divmod(np.arange(epoch * count, (epoch + 1) * count), len(rows_K))
        selected = np.empty(count, dtype=rows_K.dtype)
        for pass_index in np.unique(passes).tolist():
            is_in_pass = passes == pass_index
            selected[is_in_pass] = rows_K[
                permutation(seed, PASS_OFFSET * (task + 1) + pass_index, len(rows_K))[
                    positions[is_in_pass]
                ]
            ]
        return selected


@lru_cache(maxsize=2)  # an epoch and the next one, at their border
def _build_epoch(mixture: TaskMixture, seed: int, epoch: int) -> np.ndarray:
    selected = [mixture.select_rows(task, seed, epoch) for task in range(len(mixture.rows))]
    rows_N = np.concatenate(selected)[permutation(seed, epoch, len(mixture))]
    rows_N.setflags(write=False)
    return rows_N
