import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.sampler import StepSampler, TaskMixture, permute_rows, prefetch


def test_order_is_a_fixed_permutation_of_seed_and_epoch():
    assert permute_rows(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert sorted(permute_rows(3, 1, 1000).tolist()) == list(range(1000))
    orders = [tuple(permute_rows(seed, epoch, 50)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    with pytest.raises(ValueError, match="read-only"):
        permute_rows(0, 0, 8)[0] = 1


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3))
def test_every_epoch_sees_every_row_once(rows, batch_size, epochs):
    schedule = StepSampler(rows, batch_size, epochs, seed=1)
    stream = [row for _, batch in schedule.iter_steps() for row in batch]
    assert len(stream) == rows * epochs
    for epoch in range(epochs):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    sizes = [len(batch) for _, batch in schedule.iter_steps()]
    assert sizes[:-1] == [batch_size] * (schedule.total_steps - 1)
    assert 1 <= sizes[-1] <= batch_size


def test_a_run_can_go_on_after_any_step():
    schedule = StepSampler(10, 3, 2.0, seed=5)
    steps = list(schedule.iter_steps())
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert list(schedule.iter_steps(4)) == steps[4:]
    assert schedule.get_rows(6) == steps[5][1]


def test_epochs_may_be_fractions_and_max_steps_cuts():
    assert StepSampler(10, 4, 0.5, seed=0).total_rows == 5
    assert StepSampler(10, 4, 1.5, seed=0).total_steps == 4
    assert StepSampler(10, 4, 1.5, seed=0, max_steps=2).total_steps == 2
    assert StepSampler(10, 4, 0.001, seed=0).get_rows(1) == (permute_rows(0, 0, 10)[0],)
    for step in (0, 5):
        with pytest.raises(IndexError):
            StepSampler(10, 4, 1.5, seed=0).get_rows(step)


def test_prefetch_works_ahead_but_not_far_and_keeps_the_order():
    done: list[int] = []
    threads = set()

    def work(item):
        threads.add(threading.current_thread())
        done.append(item)
        return item * item

    results = prefetch(range(10), work, max_ahead=2)
    assert next(results) == 0
    deadline = time.monotonic() + 60
    while len(done) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)  # for what it should not do
    assert done == [0, 1, 2]
    assert list(results) == [n * n for n in range(1, 10)]
    assert threading.current_thread() not in threads


def test_prefetch_raises_where_the_result_would_have_come():
    def work(item):
        if item == 2:
            raise KeyError("row 2")
        return item

    results = prefetch(range(5), work)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="row 2"):
        next(results)


def test_prefetch_can_be_closed_early():
    done: list[int] = []
    results = prefetch(range(1000), done.append, max_ahead=3)
    next(results)
    results.close()
    assert len(done) <= 4


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
