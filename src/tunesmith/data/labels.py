"""Whether the answers of a data set are labels: up to MAX_LABELS short answers that repeat.

    ["net", "games", "net", ...] -> {"net": 2, "games": 1, ...}, empty if they are no labels

Not labels: an answer of several lines or over MAX_LABEL_CHARS, JSON, rows with several trained
turns, more than RARE_SHARE of answers that occur fewer than MIN_LABEL_ROWS times (free text that
repeats a bit), and over MAX_NUMBERS different numbers, also with a unit (arithmetic). Names of
classes with a number, such as "class 1" to "class 9", are taken for such numbers: only their
metrics differ (session/auto_metrics.py). Reading ends with the first row that decides. The data
check, which looks for wrong rows, allows more of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import permute_rows

MAX_LABELS = 50
MAX_LABEL_CHARS = 80
MAX_ROWS = 20_000  # that are read, drawn at random
MIN_ROWS = 20
MIN_LABEL_ROWS = 3
RARE_SHARE = 0.05
MAX_NUMBERS = 5  # such as stars; more need LABELS_PER_SHAPE labels of each shape to be numbers
LABELS_PER_SHAPE = 4
NUMBER_PATTERN = re.compile(r"[-+\u2212]?\d[\d.,:/]*")


def read_labels(dataset: Dataset, odd_share: float = 0) -> dict[str, int]:
    """Return label -> its rows, most frequent first; empty if the answers are no labels."""
    if dataset.tasks or dataset.has_pairs or dataset.has_labels:
        return {}
    return count_labels((answer for _, answer in iter_answers(dataset)), odd_share)


def iter_answers(dataset: Dataset) -> Iterator[tuple[int, str]]:
    """Yield (row, its answer) in random order; an empty answer for a row that has several."""
    for row in permute_rows(0, 0, len(dataset))[:MAX_ROWS].tolist():
        example = dataset.read_example(row)
        if example.is_bad:
            continue
        trained = [i for i, weight in enumerate(example.turn_weights) if weight > 0]
        if example.messages:
            yield row, example.messages[trained[0]]["content"] if len(trained) == 1 else ""
        else:
            yield row, (example.text or "") if example.prompt is not None else ""


def count_labels(answers: Iterable[str], odd_share: float = 0) -> dict[str, int]:
    """Return label -> count, most frequent first; empty if the answers are no labels.

    Labels are told apart as they are graded, up to white space at the ends. `odd_share` of the
    answers may be something else, which is left out, or rare."""
    counts: Counter[str] = Counter()
    num_odd = 0
    for seen, answer in enumerate(answers, 1):
        label = answer.strip()
        if _can_be_label(label):
            counts[label] += 1
        else:
            num_odd += 1
        allowed = odd_share * max(seen, MIN_ROWS)
        if num_odd > allowed or len(counts) > MAX_LABELS + allowed:
            return {}
    frequent = {label: count for label, count in counts.items() if count >= MIN_LABEL_ROWS}
    total = counts.total() + num_odd
    if len(counts) < 2 or total < MIN_ROWS or len(frequent) > MAX_LABELS:
        return {}
    if total - sum(frequent.values()) > max(odd_share, RARE_SHARE) * total:
        return {}
    return {} if _are_numbers(frequent) else dict(counts.most_common())


def _can_be_label(text: str) -> bool:
    is_short = 0 < len(text) <= MAX_LABEL_CHARS and len(text.splitlines()) == 1
    return is_short and not text.startswith(("{", "["))


def _are_numbers(labels: Iterable[str]) -> bool:
    numbers = [label for label in labels if NUMBER_PATTERN.search(label)]
    shapes = {NUMBER_PATTERN.sub("0", label) for label in numbers}
    return len(numbers) > MAX_NUMBERS and LABELS_PER_SHAPE * len(shapes) <= len(numbers)
