"""Detect constants: answers, or fields of them, that hardly vary although the expected ones do.

    find_constants(items) -> Shortcuts

An item has an expected and an answered value for each field (of JSON) or for the answer. Wrong
answers with the constant value are compared with right ones that lack it, item by item (exact
one-sided McNemar test, Holm-corrected over the fields). All thresholds are in SHORTCUT_LIMITS. What
a constant or a copy would have right is a floor (floors.py).

In: AnswerItems, TrainingValues. Out: Shortcuts. Left out: why an answer is wrong otherwise
(error_analysis.py), when to look (error_analysis.py, train/guard/detectors.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tunesmith.core.events import GenerationSample
from tunesmith.core.evidence import MAX_GROUP_ROWS, Shortcut, TrainingValues
from tunesmith.data.answer_values import ANSWER, normalize_answer, split_fields
from tunesmith.evaluate.statistics import adjust_p_values, compute_excess_p

SHORTCUT_LIMITS: dict[str, float] = {
    # one-sided p of all detectors, after Holm correction
    "p-value": 0.01,
    # share of the answers that have the constant value: "hardly varies"
    "constant: answered share": 0.90,
    # share of the constant among answers to items that expect something else
    "constant: wrong share": 0.90,
}
SUSPECT_P = 0.25  # uncorrected: two rows that expect another value; more answers are worth it
MAX_SHORTCUTS = 20


@dataclass(frozen=True, eq=False)
class AnswerItem:
    """An item with its expected answer and the model's, as fields if both may have some."""

    sample: GenerationSample
    is_structured: bool  # the expected answers of the items are JSON objects

    @cached_property
    def expected_values(self) -> Mapping[str, str]:
        return self._get_values(self.sample.expected) or {}

    @cached_property
    def answered_values(self) -> Mapping[str, str] | None:
        """None if an object is expected and the answer is none."""
        return self._get_values(self.sample.answer)

    def _get_values(self, text: str) -> Mapping[str, str] | None:
        if self.is_structured:
            return split_fields(text)
        return {ANSWER: normalize_answer(text)}


def build_answer_items(samples: Sequence[GenerationSample]) -> list[AnswerItem]:
    """Return the samples with an expected answer. They are structured if all of those are JSON
    objects."""
    graded = [sample for sample in samples if sample.expected]
    is_structured = bool(graded) and all(split_fields(sample.expected) for sample in graded)
    return [AnswerItem(sample, is_structured) for sample in graded]


def find_constants(
    items: Sequence[AnswerItem], training: TrainingValues | None = None
) -> tuple[Shortcut, ...]:
    """Return the fields whose answer hardly varies although the expected one does, with the
    training rows that have another value."""
    constants = _select_significant(_list_candidates(items))[:MAX_SHORTCUTS]
    if training is not None:
        constants = [_add_training_rows(constant, training) for constant in constants]
    return tuple(constants)


def has_suspect(items: Sequence[AnswerItem]) -> bool:
    """Return whether a field may be constant, so that more answers could show it."""
    return any(p_value <= SUSPECT_P for _, p_value in _list_candidates(items))


def _list_candidates(items: Sequence[AnswerItem]) -> list[tuple[Shortcut, float]]:
    candidates = [_count_constant(items, name) for name in _list_fields(items)]
    return [candidate for candidate in candidates if candidate is not None]


def _count_constant(items: Sequence[AnswerItem], name: str) -> tuple[Shortcut, float] | None:
    """Return the most frequent answer as a constant with its p-value; None if the field cannot
    show one: its expected values do not vary."""
    pairs: list[tuple[str, str, str]] = []
    for item in items:
        answered = item.answered_values
        if answered is not None and name in item.expected_values and name in answered:
            pairs.append((item.sample.id, item.expected_values[name], answered[name]))
    if not pairs or len({expected for _, expected, _ in pairs}) < 2:
        return None
    (value, count), *_ = Counter(answer for _, _, answer in pairs).most_common(1)
    num_expected = sum(expected == value for _, expected, _ in pairs)
    wrong_rows = [row for row, expected, answer in pairs if answer == value != expected]
    missed = sum(expected == value != answer for _, expected, answer in pairs)
    num_others = len(pairs) - num_expected
    has_few_values = count >= SHORTCUT_LIMITS["constant: answered share"] * len(pairs)
    is_ignoring = len(wrong_rows) >= SHORTCUT_LIMITS["constant: wrong share"] * num_others
    p_value = compute_excess_p(len(wrong_rows), missed) if has_few_values and is_ignoring else 1.0
    rows = tuple(wrong_rows[:MAX_GROUP_ROWS])
    shortcut = Shortcut(name, value, len(pairs), count, num_expected, 1.0, rows=rows)
    return shortcut, p_value


def _add_training_rows(shortcut: Shortcut, training: TrainingValues) -> Shortcut:
    values = training.counts.get(shortcut.field)
    if values is None:
        return shortcut
    total = sum(values.values())
    others = total - values.get(shortcut.value, 0)
    return replace(shortcut, training_rows=others, total_rows=total)


def _list_fields(items: Sequence[AnswerItem]) -> list[str]:
    """Return the fields of the expected answers, in their order."""
    names: dict[str, None] = {}
    for item in items:
        names |= dict.fromkeys(item.expected_values)
    return list(names)


def _select_significant(candidates: Sequence[tuple[Shortcut, float]]) -> list[Shortcut]:
    adjusted = adjust_p_values([p_value for _, p_value in candidates])
    shortcuts: list[Shortcut] = []
    for (shortcut, _), p_value in zip(candidates, adjusted, strict=True):
        if p_value < SHORTCUT_LIMITS["p-value"]:
            shortcuts.append(replace(shortcut, p_value=p_value))
    return sorted(shortcuts, key=lambda shortcut: (shortcut.p_value, shortcut.field))
