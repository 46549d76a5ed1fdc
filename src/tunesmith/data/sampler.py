"""The rows of every step, and rendering ahead of the step.

    rows, batch_size, epochs, seed -> StepSampler -> row indices of a step
    rows of each task, rows per epoch -> TaskMixture -> row indices of an epoch
    tokens of each item, seed -> CyclicSampler -> number of items that make up a number of tokens

All samplers are pure functions of their arguments, so a run can resume at any step, on any machine,
with the same rows. A step is a set of rows. Left out: how their documents share packs (packing.py),
and how many rows of a task an epoch has (plan/mixture.py)."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document
from tunesmith.data.dataset import Dataset

# Changes of the rehearsal ratio: (completed steps at the change, new ratio).
RatioChanges = Sequence[tuple[int, float]]
# Offset of a task's pass numbers, times the task number from 1: no two tasks share an order.
PASS_OFFSET = 2**40
LABELLED_SIDES = ("desirable", "undesirable")

Item = TypeVar("Item")
Result = TypeVar("Result")


@lru_cache(maxsize=4)  # for each of two streams, the current epoch and the next
def permute_rows(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return a read-only permutation of `num_rows` rows.

    It sorts raw Philox numbers, whose stream is the same in all versions of numpy."""
    raw = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    permutation_N = np.argsort(raw, kind="stable")
    permutation_N.setflags(write=False)
    return permutation_N


@dataclass(frozen=True)
class StepSampler:
    """The rows of every optimizer step, counted from 1.

    The epochs are one stream of rows: a batch may take the last rows of one epoch and the first of
    the next, so all steps but the last have `batch_size` rows. `epochs` may be a fraction."""

    num_rows: int  # per epoch
    batch_size: int
    epochs: float
    seed: int
    max_steps: int | None = None
    mixture: TaskMixture | None = None  # its epochs have `num_rows` rows

    @property
    def total_rows(self) -> int:
        return max(1, round(self.num_rows * self.epochs))

    @property
    def total_steps(self) -> int:
        total_steps = math.ceil(self.total_rows / self.batch_size)
        return total_steps if self.max_steps is None else min(total_steps, self.max_steps)

    def get_rows(self, step: int) -> tuple[int, ...]:
        """Return the row indices of step 1 .. total_steps. Raises IndexError."""
        if not 1 <= step <= self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        first = (step - 1) * self.batch_size
        rows: list[int] = []
        for position in range(first, min(first + self.batch_size, self.total_rows)):
            epoch, offset = divmod(position, self.num_rows)
            rows.append(int(self._get_epoch(epoch)[offset]))
        return tuple(rows)

    def _get_epoch(self, epoch: int) -> np.ndarray:
        if self.mixture is not None:
            return self.mixture.build_epoch(self.seed, epoch)
        return permute_rows(self.seed, epoch, self.num_rows)

    def iter_steps(self, completed_steps: int = 0) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield (step, row indices) of every step after `completed_steps`."""
        for step in range(completed_steps + 1, self.total_steps + 1):
            yield step, self.get_rows(step)


@dataclass(frozen=True, eq=False)
class TaskMixture:
    """The rows of each task, and how many of them an epoch takes.

    Each task cycles through its rows in its own passes: no row repeats before all have been taken,
    and rows that one epoch does not reach come in the next."""

    rows: tuple[np.ndarray, ...]  # per task: indices of its K rows in the data set
    epoch_rows: tuple[int, ...]  # per task: rows per epoch

    @classmethod
    def from_dataset(cls, dataset: Dataset, epoch_rows: Mapping[str, int]) -> TaskMixture:
        """Build the mixture from the rows per epoch by task.

        Raises InputError for a task without rows."""
        part_indices = {part.task: index for index, part in enumerate(dataset.parts)}
        rows: list[np.ndarray] = []
        for task in epoch_rows:
            if task not in dataset.tasks:
                message = f"the task '{task}' has no rows"
                fix = "restore them, or make a new plan"
                raise InputError(message, where=dataset.path, fix=fix)
            rows.append(np.flatnonzero(dataset.part_N == part_indices[task]))
        return cls(tuple(rows), tuple(epoch_rows.values()))

    def __len__(self) -> int:
        return sum(self.epoch_rows)

    def build_epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in their order; read-only."""
        return _build_epoch(self, seed, epoch)

    def select_rows(self, task: int, seed: int, epoch: int) -> np.ndarray:
        """Return the rows of a task that an epoch takes."""
        rows_K = self.rows[task]
        count = self.epoch_rows[task]
        passes, offsets = np.divmod(np.arange(epoch * count, (epoch + 1) * count), len(rows_K))
        selected = np.empty(count, dtype=rows_K.dtype)
        for pass_index in np.unique(passes).tolist():
            order_K = permute_rows(seed, PASS_OFFSET * (task + 1) + pass_index, len(rows_K))
            is_in_pass = passes == pass_index
            selected[is_in_pass] = rows_K[order_K[offsets[is_in_pass]]]
        return selected


@lru_cache(maxsize=2)  # the current epoch and the next
def _build_epoch(mixture: TaskMixture, seed: int, epoch: int) -> np.ndarray:
    selected = [mixture.select_rows(task, seed, epoch) for task in range(len(mixture.rows))]
    rows_N = np.concatenate(selected)[permute_rows(seed, epoch, len(mixture))]
    rows_N.setflags(write=False)
    return rows_N


@dataclass(frozen=True, eq=False)
class CyclicSampler:
    """M items in endless passes; each pass takes every item once, in its own order.

    A position counts items over all passes."""

    tokens_M: np.ndarray
    seed: int
    first_pass: int = 0  # number of the first pass; the orders depend on it

    def get_item(self, position: int) -> tuple[int, int]:
        """Return (pass, item) at a position."""
        pass_index, offset = divmod(position, len(self.tokens_M))
        return pass_index, int(self._get_order(pass_index)[offset])

    def count_due_items(self, tokens: float) -> int:
        """Return how many items have at least half of their tokens within the first `tokens`."""
        full_passes, due_tokens = divmod(tokens, float(self.tokens_M.sum()))
        tokens_M = self.tokens_M[self._get_order(int(full_passes))]
        middles_M = np.cumsum(tokens_M) - tokens_M / 2
        return int(full_passes) * len(tokens_M) + bisect_left(middles_M, due_tokens)

    def _get_order(self, pass_index: int) -> np.ndarray:
        return permute_rows(self.seed, self.first_pass + pass_index, len(self.tokens_M))


def iter_ratio_segments(
    steps: int, ratio: float, ratio_changes: RatioChanges
) -> Iterator[tuple[int, float]]:
    """Split the first `steps` steps at the changes; yield (number of steps, their ratio).

    `ratio` applies up to the first change."""
    begin = 0
    for changed_step, new_ratio in ratio_changes:
        end = min(changed_step, steps)
        yield end - begin, ratio
        begin = end
        ratio = new_ratio
    yield steps - begin, ratio


def prefetch(
    items: Iterable[Item], compute: Callable[[Item], Result], *, max_ahead: int = 2
) -> Iterator[Result]:
    """Yield compute(item) for each item, in order, computed by one thread up to `max_ahead` ahead.

    An error of `compute` is raised in the place of its result. Close the iterator to stop early."""
    futures: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        for item in items:
            futures.append(pool.submit(compute, item))
            if len(futures) > max_ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a slow row delays no Ctrl-C


# ---------------------------------------------------------------- KTO


def build_mismatched(documents: Sequence[Document], max_length: int) -> list[Document]:
    """Return the prompts of a step with answers to other prompts, up to `max_length` tokens each.
    KTO's KL term is measured on them.

    Documents are ordered by prompt, and each gets the answer `shift` documents before it, the first
    ones those of the last. `shift` is the largest number of answers to a prompt, so every answer
    is used once, as in the loss. A prompt with more than half of the answers leaves some of them
    without another prompt; these are left out."""
    by_prompt: dict[bytes, list[Document]] = {}
    for document in documents:
        if document.side in LABELLED_SIDES:
            prompt_L = document.tokens_L[: _find_answer_start(document)]
            by_prompt.setdefault(prompt_L.tobytes(), []).append(document)
    labelled = [(prompt, document) for prompt, group in by_prompt.items() for document in group]
    shift = max(map(len, by_prompt.values()), default=0)
    mismatched: list[Document] = []
    for index, (prompt, document) in enumerate(labelled):
        other_prompt, other = labelled[(index - shift) % len(labelled)]
        if prompt != other_prompt:
            mismatched.append(_replace_answer(document, other, max_length))
    return mismatched


def _find_answer_start(document: Document) -> int:
    return int(np.flatnonzero(document.weights_L)[0])


def _replace_answer(document: Document, other: Document, max_length: int) -> Document:
    prompt_end = _find_answer_start(document)
    answer_start = _find_answer_start(other)
    no_weights_L = np.zeros(prompt_end, np.float32)
    weights_L = np.concatenate([no_weights_L, other.weights_L[answer_start:]])
    tokens_L = np.concatenate([document.tokens_L[:prompt_end], other.tokens_L[answer_start:]])
    return dataclasses.replace(
        document,
        tokens_L=tokens_L[:max_length],
        weights_L=weights_L[:max_length],
        side="mismatched",
        reference_logp=None,
    )
