"""How often each value occurs in the answers of training rows (data/training_rows.py)."""

from __future__ import annotations

from collections.abc import Iterable

from tunesmith.core.evidence import TrainingValues
from tunesmith.data.answer_values import ValueCounts

MAX_CATEGORIES = 50  # values of a field that counts as categorical
MAX_STORED_FIELDS = 40


def build_training_values(answers: Iterable[str], total_rows: int) -> TrainingValues:
    """Return the counts of the fields with few values, the first MAX_STORED_FIELDS of them."""
    values = ValueCounts()
    for answer in answers:
        values.add_answer(answer)
    names = [name for name in values.counts if values.has_few_values(name, MAX_CATEGORIES)]
    selected = {name: dict(values.counts[name]) for name in names[:MAX_STORED_FIELDS]}
    return TrainingValues(values.num_answers, total_rows, selected)
