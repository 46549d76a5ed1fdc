"""Detect answers that follow something else than the question: constant answers.

    find_shortcuts(items, training) -> Shortcuts
    find_suspects(items, training) -> Shortcuts that too few rows can show

An item has an expected and an answered value for each field (of JSON) or for the answer. A detector
compares how often answers have a property with how often the expected answers have it, item by item
(exact one-sided McNemar test, Holm-corrected over the fields): what expected answers do as well is
no shortcut, whatever the task. All thresholds are in SHORTCUT_LIMITS.

In: AnswerItems, TrainingValues. Out: Shortcuts. Left out: why an answer is wrong otherwise
(error_analysis.py), when to look (error_analysis.py, train/guard/detectors.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tunesmith.core.events import GenerationSample
from tunesmith.core.evidence import MAX_GROUP_ROWS, Shortcut, ShortcutKind, TrainingValues
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


def find_shortcuts(
    items: Sequence[AnswerItem], training: TrainingValues | None
) -> tuple[tuple[Shortcut, ...], tuple[ShortcutKind, ...]]:
    """Return the shortcuts, and the kinds that were looked for."""
    if not items:
        return (), ()
    constants = find_constants(items)
    if training is not None:
        constants = [_add_training_rows(shortcut, training) for shortcut in constants]
    return tuple(constants[:MAX_SHORTCUTS]), ("constant",)


# ---------------------------------------------------------------- constants


def find_constants(items: Sequence[AnswerItem]) -> list[Shortcut]:
    """Return the fields whose answer hardly varies although the expected one does."""
    return _select_significant(_list_candidates(items))


def has_suspect(items: Sequence[AnswerItem]) -> bool:
    """Return whether a field may be constant, so that more answers could show it."""
    return any(p_value <= SUSPECT_P for _, p_value in _list_candidates(items))


def find_suspects(
    items: Sequence[AnswerItem], training: TrainingValues | None
) -> tuple[Shortcut, ...]:
    """Return what may be a constant, where too few rows expect another value to show it.

    Answers that are no objects may be one even if all rows expect it: those rows show no more."""
    if not items:
        return ()
    shown = {shortcut.field for shortcut in find_constants(items)}
    suspects = _find_constant_answer(items)
    if items[0].is_structured:
        suspects = [each for each, p_value in _list_candidates(items) if p_value <= SUSPECT_P]
    suspects = [suspect for suspect in suspects if suspect.field not in shown]
    if training is not None:
        suspects = [_add_training_rows(suspect, training) for suspect in suspects]
    return tuple(suspects[:MAX_SHORTCUTS])


def _find_constant_answer(items: Sequence[AnswerItem]) -> list[Shortcut]:
    """Return the most frequent answer, if it hardly varies and a constant is right as often."""
    expected = [normalize_answer(item.sample.expected) for item in items]
    answered = [normalize_answer(item.sample.answer) for item in items]
    value, count = Counter(answered).most_common(1)[0]
    right = sum(map(str.__eq__, expected, answered))
    has_few_values = count >= SHORTCUT_LIMITS["constant: answered share"] * len(items)
    if not has_few_values or not right or right > Counter(expected).most_common(1)[0][1]:
        return []
    num_expected = expected.count(value)
    return [Shortcut("constant", ANSWER, value, len(items), count, num_expected, 1.0)]


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
    shortcut = Shortcut("constant", name, value, len(pairs), count, num_expected, 1.0, rows=rows)
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
