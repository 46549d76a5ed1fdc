"""Which rows make up which step, and rendering ahead of the step.

    rows, batch_size, epochs, seed -> Schedule; schedule.rows_of(step) -> row indices
    tokens of each item, seed -> Passes; passes.taken(tokens) -> how many items that takes

Pure functions of their arguments, so a run can go on at any step, on any machine, with the same rows. A step is a set
of rows; how their documents share packs is decided in `pack.py` and changes nothing here.
"""

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
    from tunesmith.data.mixture import Mixture

Changes = Sequence[tuple[int, float]]  # of the rehearsal ratio: (steps done when it changed, ratio from then on)
Item = TypeVar("Item")
Result = TypeVar("Result")


@lru_cache(maxsize=4)  # of two streams: the epoch at hand, and the next one at its border
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of n rows. Sorts raw Philox numbers, whose stream is fixed for all versions of numpy."""
    raw = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    permutation_N = np.argsort(raw, kind="stable")
    permutation_N.setflags(write=False)
    return permutation_N


@dataclass(frozen=True)
class Schedule:
    """The rows of every optimizer step, counted from 1.

    The epochs are one stream of rows: a batch may take the last rows of one epoch and the first of the next, so all
    steps have `batch_size` rows but the very last one. `epochs` may be a fraction; `max_steps` cuts.
    """

    rows: int
    batch_size: int
    epochs: float
    seed: int
    max_steps: int | None = None
    mixture: Mixture | None = None  # of tasks; its epochs have `rows` places

    @property
    def total_rows(self) -> int:
        return max(1, round(self.rows * self.epochs))

    @property
    def steps(self) -> int:
        steps = math.ceil(self.total_rows / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rows_of(self, step: int) -> tuple[int, ...]:
        """Row indices of step 1 .. steps."""
        if not 1 <= step <= self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        first = (step - 1) * self.batch_size
        places = range(first, min(first + self.batch_size, self.total_rows))
        return tuple(int(self._epoch(place // self.rows)[place % self.rows]) for place in places)

    def _epoch(self, number: int) -> np.ndarray:
        if self.mixture is not None:
            return self.mixture.epoch(self.seed, number)
        return order(self.seed, number, self.rows)

    def after(self, done: int = 0) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(step, row indices) of every step after `done`."""
        for step in range(done + 1, self.steps + 1):
            yield step, self.rows_of(step)


@dataclass(frozen=True, eq=False)
class Passes:
    """M items in endless passes, each of which takes every item once, in an order of its own. A place counts items over
    all passes."""

    tokens_M: np.ndarray
    seed: int
    first: int = 0  # number of the first pass, which its order depends on

    def item(self, place: int) -> tuple[int, int]:
        """(pass, item) at a place."""
        number, at = divmod(place, len(self.tokens_M))
        return number, int(self._order(number)[at])

    def taken(self, tokens: float) -> int:
        """How many items are taken when so many tokens are due: those of which at least half was due."""
        number, due = divmod(tokens, float(self.tokens_M.sum()))
        tokens_M = self.tokens_M[self._order(int(number))]
        middles_M = np.cumsum(tokens_M) - tokens_M / 2
        return int(number) * len(tokens_M) + bisect_left(middles_M, due)

    def _order(self, number: int) -> np.ndarray:
        return order(self.seed, self.first + number, len(self.tokens_M))


def spans(steps: int, ratio: float, changes: Changes) -> Iterator[tuple[int, float]]:
    """(how many of the first steps, their ratio), one after the other; `ratio` is that of the first one."""
    bounds = [*(min(at, steps) for at, _ in changes), steps]
    ratios = [ratio, *(changed for _, changed in changes)]
    for begin, end, one in zip([0, *bounds], bounds, ratios, strict=False):
        yield end - begin, one


def prefetch(items: Iterable[Item], work: Callable[[Item], Result], *, ahead: int = 2) -> Iterator[Result]:
    """work(item) for each item, in order, computed by one thread at most `ahead` results before they are asked for.

    An error of `work` is raised where its result would have come. Close the iterator to stop early.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
