"""What the training rows answer: how often each value occurs, and which answers and phrases do.

In: the rows of `data`. Out: TrainingAnswers, for errors by rarity (error_analysis.py) and for
answers that are copied from training rows (shortcuts.py). At most MAX_ROWS rows are read, drawn at
random. Left out: rows with a bad answer, and plain texts, which answer nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from tunesmith.core.evidence import TrainingValues
from tunesmith.data.answer_values import ValueCounts, normalize_answer
from tunesmith.data.checks.context import get_answer
from tunesmith.data.checks.ngrams import hash_unique_ngrams, hash_words, sort_unique
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import permute_rows

MAX_ROWS = 20_000
MAX_CATEGORIES = 50  # values of a field that counts as categorical
MAX_STORED_FIELDS = 40
PHRASE_WORDS = 8
MAX_PHRASES = 4_000_000  # 32 MB


@dataclass(frozen=True, eq=False)
class TrainingAnswers:
    """Values, answers and phrases of the training rows."""

    values: TrainingValues
    # normalized, of a single row each: what many rows answer is a value and no copy
    answers: frozenset[str] = frozenset()
    # uint64, ascending: hashes of phrases of PHRASE_WORDS words
    phrases: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    is_complete: bool = True  # False if only the values are stored


def read_training_answers(dataset: Dataset) -> TrainingAnswers:
    """Read the answers of a role; of many rows, a sample."""
    return build_training_answers(_iter_answers(dataset), len(dataset))


def _iter_answers(dataset: Dataset) -> Iterator[str]:
    for row in permute_rows(0, 0, len(dataset))[:MAX_ROWS].tolist():
        example = dataset.read_example(row)
        if not example.negative and (example.messages or example.prompt):
            yield get_answer(example)


def build_training_answers(answers: Iterable[str], total_rows: int) -> TrainingAnswers:
    counts = ValueCounts()
    rows_by_answer: Counter[str] = Counter()
    phrases: list[np.ndarray] = []
    num_phrases = 0
    for answer in answers:
        counts.add_answer(answer)
        rows_by_answer[normalize_answer(answer)] += 1
        if num_phrases < MAX_PHRASES:
            phrases.append(hash_unique_ngrams([hash_words(answer)], PHRASE_WORDS))
            num_phrases += len(phrases[-1])
    merged = sort_unique(np.concatenate(phrases)) if phrases else np.empty(0, dtype=np.uint64)
    values = summarize_values(counts, total_rows)
    unique = frozenset(answer for answer, rows in rows_by_answer.items() if rows == 1)
    return TrainingAnswers(values, unique, merged)


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


def summarize_values(counts: ValueCounts, total_rows: int) -> TrainingValues:
    """Return the counts of the fields with few values, the first MAX_STORED_FIELDS of them."""
    names = [name for name in counts.counts if counts.has_few_values(name, MAX_CATEGORIES)]
    selected = {name: dict(counts.counts[name]) for name in names[:MAX_STORED_FIELDS]}
    return TrainingValues(counts.num_answers, total_rows, selected)
