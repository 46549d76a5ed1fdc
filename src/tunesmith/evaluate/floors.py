"""Floors: what rules without a language model reach on the same test rows, by the same metric.

    measure_floors(metric, parts, items, rows) -> Floors, and why some are missing

A floor is beaten if the paired 95% interval of the model's lead is above 0. The rules: the most
frequent answer, or value of each field; the copied input; the bag of words; for fields and texts,
the answer of a random and of the nearest training row. Words need scikit-learn, the extra `audit`.

In: the metric's values, AnswerItems with the answers, the training rows. Out: Floors. Left out:
what follows for the verdict (run_verdict.py), what the model before training has (results.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any, cast

import numpy as np

from tunesmith.core.evidence import Floor
from tunesmith.data.answer_values import split_fields
from tunesmith.data.checks.duplicates import INSTALL_HINT
from tunesmith.data.training_rows import TrainingRow
from tunesmith.data.word_rules import WordRules
from tunesmith.evaluate.goals import MOST_FREQUENT
from tunesmith.evaluate.metrics import (
    FORM_METRICS,
    METRICS,
    MULTIPLE_CHOICE,
    grade_answer,
    parse_metric_arg,
    split_metric,
)
from tunesmith.evaluate.results import MetricValues, compare_measurements
from tunesmith.evaluate.shortcuts import AnswerItem
from tunesmith.evaluate.statistics import judge_comparison
from tunesmith.evaluate.training_answers import MAX_CATEGORIES

MAX_ROWS = 5_000  # training rows that words are learned from: seconds
MIN_KEY_SHARE = 0.5  # of the training rows' objects, for a field of the floor's object
NO_WORDS = f"no bag of words and no nearest row: scikit-learn is missing, {INSTALL_HINT}"


def measure_floors(
    metric: str,
    parts: Sequence[MetricValues],
    items: Sequence[AnswerItem],
    rows: Sequence[TrainingRow],
) -> tuple[tuple[Floor, ...], str]:
    """Return the floors, and a note on those that cannot be had; neither without training rows.

    parts: the values of the metric, by task. items: the answers, at least those of all values."""
    name = split_metric(metric)[0]
    ids = [row for part in parts for row in part.ids]
    item_by_id = {item.sample.id: item for item in items}
    if not rows or len(ids) < 2 or not item_by_id.keys() >= set(ids) or name in FORM_METRICS:
        return (), ""
    if name not in (*METRICS, MULTIPLE_CHOICE):
        return (), f"no floors: {metric} is a function of yours, which grades the model only"
    groups = tuple(group for part in parts for group in part.groups)
    values = tuple(value for part in parts for value in part.values)
    measured = MetricValues("test", metric, tuple(ids), values, groups=groups)
    tests = [item_by_id[row] for row in ids]
    floors = [
        _compare(title, measured, _grade(metric, answers, tests))
        for title, answers in _Rules(tests, rows[:MAX_ROWS]).iter_answers()
    ]
    return tuple(floors), "" if find_spec("sklearn") else NO_WORDS


def _grade(metric: str, answers: Sequence[str], tests: Sequence[AnswerItem]) -> list[float]:
    """Grade answers; objects by their content, since a floor does not know how they are written."""
    name = "exact_match" if metric == MULTIPLE_CHOICE else metric
    arg = parse_metric_arg(name, None)
    is_object = tests[0].is_structured
    edit: Callable[[str], str] = _canonicalize if is_object else str
    return [
        grade_answer(name, edit(answer), edit(test.sample.expected), arg)
        for answer, test in zip(answers, tests, strict=True)
    ]


def _compare(title: str, measured: MetricValues, grades: Sequence[float]) -> Floor:
    lead = compare_measurements(replace(measured, values=tuple(grades)), measured)
    is_beaten = judge_comparison(lead) == "better"
    values = (lead.before.value, lead.after.n, lead.difference, lead.low, lead.high)
    return Floor(title, *values, is_beaten)


# ---------------------------------------------------------------- rules


@dataclass(frozen=True, eq=False)
class _Rules:
    """The rules, learned from training rows and applied to test rows."""

    tests: Sequence[AnswerItem]
    rows: Sequence[TrainingRow]

    def iter_answers(self) -> Iterator[tuple[str, list[str]]]:
        """Yield (name of the rule, its answer to each test row)."""
        has_words = find_spec("sklearn") is not None and any(
            row.prompt.strip() for row in self.rows
        )
        yield "copied input", [test.sample.prompt for test in self.tests]
        if self.tests[0].is_structured:
            yield "most frequent value of each field", self._compose(_repeat_most_frequent)
            if has_words:
                yield "bag of words by field", self._compose(self._classify)
        else:
            answers = [row.answer.strip() for row in self.rows]
            yield MOST_FREQUENT, _repeat_most_frequent(answers, len(self.tests))
            if _has_few_values(answers):
                if has_words:
                    yield "bag of words", self._classify(answers, len(self.tests))
                return
        chosen = np.random.default_rng(0).integers(len(self.rows), size=len(self.tests))
        yield "a random training answer", [self.rows[row].answer for row in chosen.tolist()]
        if has_words:
            nearest = self._words.find_nearest()
            yield "answer of the nearest row", [self.rows[row].answer for row in nearest]

    @cached_property
    def _words(self) -> WordRules:
        prompts = [row.prompt for row in self.rows]
        return WordRules(prompts, [test.sample.prompt for test in self.tests])

    def _classify(self, targets: Sequence[str], count: int) -> list[str]:
        if len(set(targets)) < 2 or not _has_few_values(targets):
            return _repeat_most_frequent(targets, count)
        return self._words.classify(targets)

    def _compose(self, predict: Callable[[Sequence[str], int], list[str]]) -> list[str]:
        """Return an object for each test row, of a prediction for each usual field."""
        objects = [_read_object(row.answer) or {} for row in self.rows]
        keys = Counter(key for each in objects for key in each)
        composed: list[dict[str, Any]] = [{} for _ in self.tests]
        for key in (key for key, n in keys.items() if n >= MIN_KEY_SHARE * len(objects)):
            targets = [json.dumps(each.get(key), sort_keys=True) for each in objects]
            predicted = predict(targets, len(composed))
            for value, answer in zip(predicted, composed, strict=True):
                answer[key] = json.loads(value)
        return [json.dumps(answer) for answer in composed]


def _has_few_values(answers: Sequence[str]) -> bool:
    return len(set(answers)) <= min(MAX_CATEGORIES, len(answers) // 4)


def _repeat_most_frequent(targets: Sequence[str], count: int) -> list[str]:
    return [Counter(targets).most_common(1)[0][0]] * count


def _read_object(text: str) -> dict[str, Any] | None:
    if split_fields(text) is None:  # no object, or too deep or large to be read
        return None
    return cast("dict[str, Any]", json.loads(text))


def _canonicalize(text: str) -> str:
    value = _read_object(text)
    return text if value is None else json.dumps(value, sort_keys=True)
