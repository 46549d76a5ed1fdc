"""Precision, recall and F1 of each label, and which labels are confused with which.

Labels are what test rows expect, and the labels of training rows; any other answer is none of them.
F1 is 2J / (1 + J), where J is the share of right rows among those that expect the label or are
answered with it: a mean of rows, whose interval is carried over. Fewer than MIN_ITEMS independent
rows have no value.

In: the expected and the answered text of each row. Out: an ErrorTable, Confusions. Left out:
macro-F1, which is one number of all labels (class_scores.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.core.evidence import MAX_GROUP_ROWS, Confusion, ErrorGroup, ErrorTable, Rate
from tunesmith.data.answer_values import MAX_NAME_CHARS, normalize_answer, shorten
from tunesmith.data.labels import MAX_LABELS
from tunesmith.evaluate.results import MetricValues, compute_score
from tunesmith.evaluate.statistics import MIN_ITEMS

MAX_OTHER_ANSWERS = 5


@dataclass(frozen=True)
class LabelItem:
    """A row with both labels, without white space at the ends; `group` as in MetricValues."""

    id: str
    expected: str
    answered: str
    group: str = ""
    was_right: bool | None = None  # of the model before


def measure_labels(
    items: Sequence[LabelItem], training: Mapping[str, int]
) -> tuple[ErrorTable, tuple[Confusion, ...], dict[str, int]]:
    """Return errors by label, lowest F1 first; all pairs of a wrong answer; what is no label.

    training: label -> rows, empty if unknown."""
    labels = {item.expected for item in items}
    labels |= {item.answered for item in items if _is_trained(item.answered, training)}
    seen = Counter(text for item in items for text in {item.expected, item.answered})
    chosen = [label for label, _ in seen.most_common() if label in labels][:MAX_LABELS]
    groups = [_measure_label(label, items, labels, training) for label in chosen]
    groups.sort(key=lambda each: (each.f1 or (2.0,), -each.wrong, each.name))
    pairs = Counter(
        (_shorten(item.expected), _shorten(item.answered) if item.answered in labels else None)
        for item in items
        if item.expected != item.answered
    )
    confusions = [Confusion("", *pair, n) for pair, n in pairs.most_common(MAX_LABELS**2)]
    others = Counter(_shorten(item.answered) for item in items if item.answered not in labels)
    table = ErrorTable("label", tuple(groups), len(labels) - len(chosen))
    return table, tuple(confusions), dict(others.most_common(MAX_OTHER_ANSWERS))


def _measure_label(
    label: str, items: Sequence[LabelItem], labels: set[str], training: Mapping[str, int]
) -> ErrorGroup:
    expecting = [item for item in items if item.expected == label]
    wrong = [item for item in expecting if item.answered != label]
    has_before = all(item.was_right is not None for item in expecting)
    answered = [item for item in items if item.answered == label]
    recall = _measure_rate(expecting)
    overlap = _measure_rate([*wrong, *answered])
    return ErrorGroup(
        name=_shorten(label),
        n=len(expecting),
        wrong=len(wrong),
        error=len(wrong) / max(1, len(expecting)),
        low=1 - recall[2] if recall else 0.0,
        high=1 - recall[1] if recall else 1.0,
        wrong_before=sum(not item.was_right for item in expecting) if has_before else None,
        training_rows=training.get(normalize_answer(label), 0) if training else None,
        rows=tuple(item.id for item in wrong[:MAX_GROUP_ROWS]),
        answered=len(answered),
        no_label=sum(item.answered not in labels for item in wrong),
        precision=_measure_rate(answered),
        recall=recall,
        f1=_to_f1(overlap),
    )


def _measure_rate(items: Sequence[LabelItem]) -> Rate | None:
    """Return the share of right answers with its 95% CI; None if too few rows or groups tell."""
    if len(items) < MIN_ITEMS:
        return None
    ids = tuple(item.id for item in items)
    values = tuple(float(item.expected == item.answered) for item in items)
    groups = tuple(item.group for item in items) if all(item.group for item in items) else ()
    score = compute_score(MetricValues("", "", ids, values, groups=groups))
    return (score.value, score.low, score.high) if score.independent >= MIN_ITEMS else None


def _is_trained(answer: str, training: Mapping[str, int]) -> bool:
    """Return whether an answer is a label of training rows, whose white space is not stored."""
    return normalize_answer(answer) in training and answer == " ".join(answer.split())


def _to_f1(overlap: Rate | None) -> Rate | None:
    if overlap is None:
        return None
    value, low, high = (2 * each / (1 + each) for each in overlap)
    return value, low, high


def _shorten(label: str) -> str:
    return shorten(label, 2 * MAX_NAME_CHARS)
