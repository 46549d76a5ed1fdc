"""What training rows ask last, and answer; rows with a bad answer and plain texts are left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tunesmith.data.checks.context import get_answer
from tunesmith.data.checks.text_stats import extract_row_texts
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import permute_rows

MAX_ROWS = 20_000  # of a data set, drawn at random


@dataclass(frozen=True)
class TrainingRow:
    """Hold what is asked last, and the answer."""

    prompt: str
    answer: str


def read_training_rows(datasets: Iterable[Dataset]) -> tuple[TrainingRow, ...]:
    """Read the rows of some data sets in random order; of many rows, a sample."""
    return tuple(row for dataset in datasets for row in _iter_rows(dataset))


def _iter_rows(dataset: Dataset) -> Iterator[TrainingRow]:
    for row in permute_rows(0, 0, len(dataset))[:MAX_ROWS].tolist():
        example = dataset.read_example(row)
        if not example.negative and (example.messages or example.prompt):
            yield TrainingRow(extract_row_texts(example).prompt, get_answer(example))
