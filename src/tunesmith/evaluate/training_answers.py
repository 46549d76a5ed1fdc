"""What the training rows answer: how often each value occurs.

In: the rows of `data`. Out: TrainingValues, for errors by rarity (error_analysis.py) and constant
answers (shortcuts.py). At most MAX_ROWS rows are read, drawn at random. Left out: rows with a bad
answer, and plain texts, which answer nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tunesmith.core.evidence import TrainingValues
from tunesmith.data.answer_values import ValueCounts
from tunesmith.data.checks.context import get_answer
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import permute_rows

MAX_ROWS = 20_000
MAX_CATEGORIES = 50  # values of a field that counts as categorical
MAX_STORED_FIELDS = 40


def read_training_values(dataset: Dataset) -> TrainingValues:
    """Read the answers of a role; of many rows, a sample."""
    return build_training_values(_iter_answers(dataset), len(dataset))


def _iter_answers(dataset: Dataset) -> Iterator[str]:
    for row in permute_rows(0, 0, len(dataset))[:MAX_ROWS].tolist():
        example = dataset.read_example(row)
        if not example.negative and (example.messages or example.prompt):
            yield get_answer(example)


def build_training_values(answers: Iterable[str], total_rows: int) -> TrainingValues:
    """Return the counts of the fields with few values, the first MAX_STORED_FIELDS of them."""
    values = ValueCounts()
    for answer in answers:
        values.add_answer(answer)
    names = [name for name in values.counts if values.has_few_values(name, MAX_CATEGORIES)]
    selected = {name: dict(values.counts[name]) for name in names[:MAX_STORED_FIELDS]}
    return TrainingValues(values.num_answers, total_rows, selected)


def merge_values(parts: Iterable[TrainingValues]) -> TrainingValues:
    """Return the sums of the counts of several sets of rows."""
    rows = total_rows = 0
    counts: dict[str, dict[str, int]] = {}
    for part in parts:
        rows += part.rows
        total_rows += part.total_rows
        for name, values in part.counts.items():
            merged = counts.setdefault(name, {})
            for value, count in values.items():
                merged[value] = merged.get(value, 0) + count
    return TrainingValues(rows, total_rows, counts)
