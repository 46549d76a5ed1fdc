"""Rows of mixed tasks: shares to the row, passes by task, a pure function of seed, epoch and
place."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.sampler import TaskMixture
from tunesmith.data.sampler import StepSampler


def mixture(sizes: list[int], places: list[int]) -> TaskMixture:
    """Task i has the rows 1000 i and on."""
    return TaskMixture(
        tuple(1000 * i + np.arange(size) for i, size in enumerate(sizes)), tuple(places)
    )


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(0, 9),
)
def test_every_epoch_has_its_shares_and_every_task_its_passes(
    tasks: list[tuple[int, int]], seed: int
) -> None:
    sizes, places = [size for size, _ in tasks], [count for _, count in tasks]
    mixed = mixture(sizes, places)
    seen = [Counter[int]() for _ in tasks]
    for number in range(5):
        rows = mixed.build_epoch(seed, number).tolist()
        assert [sum(row // 1000 == i for row in rows) for i in range(len(tasks))] == places
        for i, counts in enumerate(seen):
            counts.update(row for row in rows if row // 1000 == i)
            taken = [counts[1000 * i + row] for row in range(sizes[i])]
            assert max(taken) - min(taken) <= 1, "none is taken again before all have been"


def test_a_run_can_go_on_after_any_step_of_a_mixture() -> None:
    mixed = mixture([7, 3, 20], [4, 4, 5])
    schedule = StepSampler(len(mixed), 4, 3.0, seed=5, mixture=mixed)
    steps = list(schedule.iter_steps())
    again = mixture([7, 3, 20], [4, 4, 5])
    assert list(StepSampler(len(again), 4, 3.0, seed=5, mixture=again).iter_steps(4)) == steps[4:]
    assert sum(len(rows) for _, rows in steps) == 39


def test_seeds_epochs_and_tasks_of_one_size_differ_in_order() -> None:
    mixed = mixture([50, 50], [50, 50])
    epochs = [mixed.build_epoch(seed, number).tolist() for seed in (0, 1) for number in (0, 1)]
    assert len({tuple(rows) for rows in epochs}) == 4
    orders = [(mixed.select_rows(task, 0, 0) % 1000).tolist() for task in (0, 1)]
    assert orders[0] != orders[1]
    with pytest.raises(ValueError, match="read-only"):
        mixed.build_epoch(0, 0)[0] = 1
