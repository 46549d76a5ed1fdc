"""Which rows make up which step, and rendering ahead of the step.

    rows, batch_size, epochs, seed -> Schedule; schedule.rows_of(step) -> row indices
    tokens of each item, seed -> Passes; passes.taken(tokens) -> how many items that takes

Pure functions of their arguments, so a run can go on at any step, on any machine, with the same
rows. A step is a set of rows; how their documents share packs is decided in `pack.py` and changes
nothing here."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from tunesmith.data.mixture import TaskMixture

RatioChanges = Sequence[
    tuple[int, float]
]  # of the rehearsal ratio: (steps done when it changed, ratio from then on)
Item = TypeVar("Item")
Result = TypeVar("Result")


@lru_cache(maxsize=4)  # of two streams: the epoch at hand, and the next one at its border
def permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """A permutation of n rows. Sorts raw Philox numbers, whose stream is fixed for all versions of
    numpy."""
    raw = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    permutation_N = np.argsort(raw, kind="stable")
    permutation_N.setflags(write=False)
    return permutation_N


@dataclass(frozen=True)
class StepSampler:
    """The rows of every optimizer step, counted from 1.

    The epochs are one stream of rows: a batch may take the last rows of one epoch and the first of
    the next, so all steps have `batch_size` rows but the very last one. `epochs` may be a fraction;
    `max_steps` cuts."""

    num_rows: int
    batch_size: int
    epochs: float
    seed: int
    max_steps: int | None = None
    mixture: TaskMixture | None = None  # of tasks; its epochs have `rows` places

    @property
    def total_rows(self) -> int:
        return max(1, round(self.num_rows * self.epochs))

    @property
    def total_steps(self) -> int:
        total_steps = math.ceil(self.total_rows / self.batch_size)
        return total_steps if self.max_steps is None else min(total_steps, self.max_steps)

    def get_rows(self, step: int) -> tuple[int, ...]:
        """Row indices of step 1 .. steps."""
        if not 1 <= step <= self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        first = (step - 1) * self.batch_size
        positions = range(first, min(first + self.batch_size, self.total_rows))
        return tuple(
            int(self._get_epoch(position // self.num_rows)[position % self.num_rows])
            for position in positions
        )

    def _get_epoch(self, epoch: int) -> np.ndarray:
        if self.mixture is not None:
            return self.mixture.build_epoch(self.seed, epoch)
        return permutation(self.seed, epoch, self.num_rows)

    def iter_steps(self, completed_steps: int = 0) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(step, row indices) of every step after `done`."""
        for step in range(completed_steps + 1, self.total_steps + 1):
            yield step, self.get_rows(step)


@dataclass(frozen=True, eq=False)
class CyclicSampler:
    """M items in endless passes, each of which takes every item once, in an order of its own. A
    place counts items over all passes."""

    tokens_M: np.ndarray
    seed: int
    first_pass: int = 0  # number of the first pass, which its order depends on

    def get_item(self, position: int) -> tuple[int, int]:
        """(pass, item) at a place."""
        pass_index, offset = divmod(position, len(self.tokens_M))
        return pass_index, int(self._get_order(pass_index)[offset])

    def count_due_items(self, tokens: float) -> int:
        """How many items are taken when so many tokens are due: those of which at least half was
        due."""
        full_passes, due_tokens = divmod(tokens, float(self.tokens_M.sum()))
        tokens_M = self.tokens_M[self._get_order(int(full_passes))]
        middles_M = np.cumsum(tokens_M) - tokens_M / 2
        return int(full_passes) * len(tokens_M) + bisect_left(middles_M, due_tokens)

    def _get_order(self, pass_index: int) -> np.ndarray:
        return permutation(self.seed, self.first_pass + pass_index, len(self.tokens_M))


def iter_ratio_segments(
    steps: int, ratio: float, ratio_changes: RatioChanges
) -> Iterator[tuple[int, float]]:
    """(how many of the first steps, their ratio), one after the other; `ratio` is that of the first
    one."""
    bounds = [*(min(step, steps) for step, _ in ratio_changes), steps]
    ratios = [ratio, *(new_ratio for _, new_ratio in ratio_changes)]
    for begin, end, segment_ratio in zip([0, *bounds], bounds, ratios, strict=False):
        yield end - begin, segment_ratio


def prefetch(
    items: Iterable[Item], compute: Callable[[Item], Result], *, max_ahead: int = 2
) -> Iterator[Result]:
    """work(item) for each item, in order, computed by one thread at most `ahead` results before
    they are asked for.

    An error of `work` is raised where its result would have come. Close the iterator to stop early.
    """
    futures: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        try:
            for item in items:
                futures.append(pool.submit(compute, item))
                if len(futures) > max_ahead:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
