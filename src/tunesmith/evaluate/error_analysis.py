"""What is still wrong: errors by label, form and field.

    analyze_errors(before, after, training) -> ErrorAnalysis

One metric decides what is wrong: the strictest that was measured (STRICTNESS). Every group has its
n and a 95% CI, and the ids of its first wrong rows. Tables hold the worst groups only, so that an
analysis stays small whatever the answers are.

In: EvalResults of a model, and of the model before training on the same items. Out: ErrorAnalysis,
or None where no answer was graded. Left out: what to conclude (run_verdict.py), constants
(shortcuts.py), floors (floors.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.core.evidence import (
    MAX_GROUP_ROWS,
    MAX_GROUPS,
    Confusion,
    ErrorAnalysis,
    ErrorGroup,
    ErrorTable,
    TrainingValues,
)
from tunesmith.core.types import Comparison, Plan
from tunesmith.data.answer_values import ANSWER, MAX_NAME_CHARS, shorten
from tunesmith.data.training_rows import TrainingRow, read_training_rows
from tunesmith.evaluate.custom_metric import format_metric_name
from tunesmith.evaluate.floors import measure_floors
from tunesmith.evaluate.goals import HELD_OUT_TASK
from tunesmith.evaluate.label_table import LabelItem, measure_labels
from tunesmith.evaluate.metrics import (
    FORM_METRICS,
    MACRO_F1,
    METRICS,
    MULTIPLE_CHOICE,
    split_metric,
)
from tunesmith.evaluate.pairing import map_shared_samples
from tunesmith.evaluate.results import EvalResults, MetricValues, compare_results, compute_score
from tunesmith.evaluate.shortcuts import AnswerItem, build_answer_items, find_constants
from tunesmith.evaluate.statistics import compute_wilson_interval
from tunesmith.evaluate.training_answers import MAX_CATEGORIES, build_training_values

if TYPE_CHECKING:
    from tunesmith.session.inputs import RunInputs

# The first of these that was measured decides what is wrong; another metric with values from 0 to 1
# does if none of them was.
STRICTNESS = (
    "accuracy",
    "exact_match",
    "normalized_match",
    "numeric",
    "multiple_choice",
    "field_f1",
    "regex",
    "contains",
    "token_f1",
    "rouge_l",
    "chrf",
    "schema_valid",
    "json_valid",
)
ITEMS_PER_CATEGORY = 8  # expected of a field with few values, on average at least
NOT_AN_OBJECT = "not a JSON object"


@dataclass(frozen=True, eq=False)
class _Item:
    """An item with its values of the metric; `answers` is None where no answer was stored."""

    id: str
    value: float
    value_before: float | None
    group: str
    answers: AnswerItem | None
    answers_before: AnswerItem | None

    def is_right_before(self, name: str, value: str | None) -> float | None:
        """Return whether the model before answered a field so; None without its answer."""
        if self.answers_before is None:
            return None
        answered = self.answers_before.answered_values
        return float(answered is not None and answered.get(name) == value)


@dataclass(frozen=True)
class Evaluation:
    """Two models on the same items, and what is wrong with the answers of the second."""

    comparisons: tuple[Comparison, ...]
    errors: ErrorAnalysis | None


def evaluate_results(
    before: EvalResults, after: EvalResults, plan: Plan, inputs: RunInputs
) -> Evaluation:
    """Compare the results of a run's model with those before training, and analyze its errors."""
    comparisons = compare_results(before, after, step=plan.steps)
    return Evaluation(comparisons, analyze_run_errors(before, after, plan, inputs))


def analyze_run_errors(
    before: EvalResults | None, after: EvalResults, plan: Plan, inputs: RunInputs
) -> ErrorAnalysis | None:
    """Analyze the answers of a run's model with what its training rows answer."""
    rows: tuple[TrainingRow, ...] = ()
    if after.samples and "data" in inputs.datasets:
        rows = read_training_rows([inputs.datasets["data"]])
    return analyze_errors(before, after, rows=rows, graded_metrics=plan.config.metrics)


def analyze_errors(
    before: EvalResults | None,
    after: EvalResults,
    training: TrainingValues | None = None,
    *,
    rows: Sequence[TrainingRow] = (),
    graded_metrics: Iterable[str] = (),
) -> ErrorAnalysis | None:
    """Return what is wrong in `after`; `before` is matched by the content of the items, else by id.

    training: the counts of a stored analysis. rows: the training rows, which replace them and are
    what floors need. graded_metrics: the metrics of the recipe, such as functions in a file. None
    if there is no graded item."""
    measured = _select_metric(after, map(format_metric_name, graded_metrics))
    if measured is None:
        return None
    metric, parts = measured
    items = _build_items(metric, parts, before, after)
    answer_items = [item.answers for item in items if item.answers is not None]
    if rows:
        training = build_training_values((row.answer for row in rows), len(rows))
    floors, floors_note = measure_floors(metric, parts, answer_items, rows)
    values_before = [item.value_before for item in items]
    pairs = [(item.value_before, item.value) for item in items if item.value_before is not None]
    has_before = bool(items) and None not in values_before
    groups = tuple(group for part in parts for group in part.groups)
    mean, low, high = _summarize_values([item.value for item in items], groups)
    tables = _build_field_tables(items, training)
    confusions = _count_confusions(answer_items, training)
    other_answers: dict[str, int] = {}
    if labels := _build_label_items(metric, items, after, training):
        trained = training.counts.get(ANSWER, {}) if training else {}
        table, confusions, other_answers = measure_labels(labels, trained)
        tables = [table]
    return ErrorAnalysis(
        metric=metric,
        is_binary={item.value for item in items} <= {0.0, 1.0},
        n=len(items),
        right=sum(item.value >= 1 for item in items),
        right_before=sum(value >= 1 for value, _ in pairs) if has_before else None,
        fixed=sum(value < 1 <= now for value, now in pairs) if has_before else None,
        broken=sum(now < 1 <= value for value, now in pairs) if has_before else None,
        mean=mean,
        low=low,
        high=high,
        mean_before=sum(value for value, _ in pairs) / len(pairs) if has_before else None,
        tables=tuple(table for table in tables if table.groups),
        confusions=confusions,
        other_answers=other_answers,
        shortcuts=find_constants(answer_items, training),
        floors=floors,
        floors_note=floors_note,
        training=training,
    )


def _select_metric(
    results: EvalResults, graded_metrics: Iterable[str]
) -> tuple[str, list[MetricValues]] | None:
    """Return the strictest metric of the answers to test rows, with its values by task."""
    by_metric: dict[str, list[MetricValues]] = {}
    for measurement in results.measurements:
        # A mean of tasks has the items of the tasks again.
        if measurement.ids and not measurement.strata and _is_test(measurement.task):
            by_metric.setdefault(measurement.metric, []).append(measurement)
    for metric, parts in by_metric.items():  # what transfers is no part of the score
        by_metric[metric] = [p for p in parts if not HELD_OUT_TASK.search(p.task)] or parts
    for name in STRICTNESS:
        for metric, parts in by_metric.items():
            if split_metric(metric)[0] == name:
                return metric, parts
    for metric in graded_metrics:
        if metric in by_metric and split_metric(metric)[0] not in METRICS:
            values = [value for part in by_metric[metric] for value in part.values]
            if all(0 <= value <= 1 for value in values):
                return metric, by_metric[metric]
    return None


def _is_test(task: str) -> bool:
    """Return whether a task is that of test rows; a stage's name comes before, a task's after."""
    head = task.partition(":")[0]
    return head == "test" or head.endswith(" test")


def _build_items(
    metric: str, parts: Sequence[MetricValues], before: EvalResults | None, after: EvalResults
) -> list[_Item]:
    ids_before = map_shared_samples(before, after) if before else {}
    values_before: dict[str, float] = {}
    for measurement in before.measurements if before else ():
        if measurement.metric == metric and not measurement.strata and _is_test(measurement.task):
            values_before |= dict(zip(measurement.ids, measurement.values, strict=True))
    answers = {item.sample.id: item for item in build_answer_items(after.samples)}
    answers_before: dict[str, AnswerItem] = {}
    if before is not None:
        answers_before = {item.sample.id: item for item in build_answer_items(before.samples)}
    items: list[_Item] = []
    for part in parts:
        groups = part.groups or ("",) * len(part.ids)
        for row, value, group in zip(part.ids, part.values, groups, strict=True):
            row_before = ids_before.get(row, "")
            value_before = values_before.get(row_before)
            answer_before = answers_before.get(row_before)
            answer = answers.get(row)
            items.append(_Item(row, value, value_before, group, answer, answer_before))
    return items


# ---------------------------------------------------------------- groups


@dataclass(frozen=True)
class _Member:
    """One item in one group: it may be right there although its answer is wrong."""

    id: str
    value: float
    value_before: float | None = None
    is_only_error: bool = False


def _summarize_values(
    values: Sequence[float], groups: tuple[str, ...] = ()
) -> tuple[float, float, float]:
    """Return the mean with its 95% interval; of a single item, all of 0 to 1 or Wilson's."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        is_rate = mean in (0.0, 1.0)
        return mean, *(compute_wilson_interval(mean, 1) if is_rate else (0.0, 1.0))
    ids = tuple(map(str, range(len(values))))
    score = compute_score(MetricValues("", "", ids, tuple(values), groups=groups))
    return mean, score.low, score.high


def _build_group(
    name: str, members: Sequence[_Member], training_rows: int | None = None
) -> ErrorGroup:
    mean, low, high = _summarize_values([member.value for member in members])
    wrong_rows = [member.id for member in members if member.value < 1]
    values_before = [member.value_before for member in members]
    wrong_before = None
    if None not in values_before:
        wrong_before = sum(value is not None and value < 1 for value in values_before)
    return ErrorGroup(
        name=shorten(name, 2 * MAX_NAME_CHARS),
        n=len(members),
        wrong=len(wrong_rows),
        error=1 - mean,
        low=1 - high,
        high=1 - low,
        wrong_before=wrong_before,
        only_here=sum(member.is_only_error for member in members),
        training_rows=training_rows,
        rows=tuple(wrong_rows[:MAX_GROUP_ROWS]),
    )


def _build_table(by: str, groups: Iterable[ErrorGroup]) -> ErrorTable:
    """Return a table, the most errors first."""
    rows = sorted(groups, key=lambda group: (-group.wrong, -group.error, group.name))
    return ErrorTable(by, tuple(rows[:MAX_GROUPS]), max(0, len(rows) - MAX_GROUPS))


def _build_label_items(
    metric: str, items: Sequence[_Item], after: EvalResults, training: TrainingValues | None
) -> list[LabelItem]:
    """Return the labels of the answers; none where they are no labels. What the metric finds right
    counts as the expected label, however it is written."""
    labels: list[LabelItem] = []
    for item in items:
        if item.answers is None or item.answers.is_structured:
            return []
        sample = item.answers.sample
        expected = sample.expected.strip()
        answered = expected if item.value >= 1 else sample.answer.strip()
        was_right = None if item.value_before is None else item.value_before >= 1
        labels.append(LabelItem(item.id, expected, answered, item.group, was_right))
    answers = [_require_answers(item) for item in items]
    is_macro = any(measurement.metric == MACRO_F1 for measurement in after.measurements)
    if split_metric(metric)[0] in (*FORM_METRICS, MULTIPLE_CHOICE) or not (
        is_macro or ANSWER in _list_categories(answers, training)
    ):
        return []
    return labels


def _build_field_tables(
    items: Sequence[_Item], training: TrainingValues | None
) -> list[ErrorTable]:
    answered = [item for item in items if item.answers is not None]
    if not any(_require_answers(item).is_structured for item in answered):
        return []
    by_value = _group_by_value(answered, training)
    return [_group_by_format(answered), _group_by_field(answered), by_value]


def _require_answers(item: _Item) -> AnswerItem:
    assert item.answers is not None, "only items with an answer are analyzed by it"
    return item.answers


def _group_by_format(items: Sequence[_Item]) -> ErrorTable:
    members: list[_Member] = []
    for item in items:
        is_object = _require_answers(item).answered_values is not None
        before = item.answers_before
        was_object = None if before is None else float(before.answered_values is not None)
        members.append(_Member(item.id, float(is_object), was_object))
    group = _build_group(NOT_AN_OBJECT, members)
    return _build_table("format", [group] if group.wrong else [])


def _group_by_field(items: Sequence[_Item]) -> ErrorTable:
    """Errors by field, of the answers that are JSON objects."""
    members: dict[str, list[_Member]] = {}
    for item in items:
        answers = _require_answers(item)
        answered = answers.answered_values
        if answered is None:
            continue
        expected = answers.expected_values
        names = list(dict.fromkeys((*expected, *answered)))
        wrong = [name for name in names if expected.get(name) != answered.get(name)]
        for name in names:
            is_wrong = expected.get(name) != answered.get(name)
            is_alone = is_wrong and len(wrong) == 1
            before = item.is_right_before(name, expected.get(name))
            member = _Member(item.id, float(not is_wrong), before, is_alone)
            members.setdefault(name, []).append(member)
    return _build_table("field", [_build_group(name, group) for name, group in members.items()])


def _list_categories(items: Iterable[AnswerItem], training: TrainingValues | None) -> set[str]:
    """Return the fields with few values, such as enums and flags, and ANSWER if it is a label: in
    the training rows, or in the expected answers if those are unknown."""
    counts: dict[str, Counter[str]] = {}
    for item in items:
        for name, value in item.expected_values.items():
            counts.setdefault(name, Counter())[value] += 1
    if training is not None:
        return counts.keys() & training.counts.keys()
    categories: set[str] = set()
    for name, values in counts.items():
        max_values = max(2, values.total() // ITEMS_PER_CATEGORY)
        if len(values) <= min(MAX_CATEGORIES, max_values) and values.most_common(1)[0][1] > 1:
            categories.add(name)
    return categories


def _group_by_value(items: Sequence[_Item], training: TrainingValues | None) -> ErrorTable:
    """Errors by expected value, of fields with few values."""
    answers = [_require_answers(item) for item in items]
    members: dict[tuple[str, str], list[_Member]] = {}
    for name in sorted(_list_categories(answers, training) - {ANSWER}):
        for item, answer in zip(items, answers, strict=True):
            if (value := answer.expected_values.get(name)) is not None:
                is_right = (answer.answered_values or {}).get(name) == value
                member = _Member(item.id, float(is_right), item.is_right_before(name, value))
                members.setdefault((name, value), []).append(member)
    groups: list[ErrorGroup] = []
    for (name, value), group in members.items():
        counts = training.counts.get(name) if training else None
        trained = None if counts is None else counts.get(value, 0)
        groups.append(_build_group(f"{name} = {value}", group, trained))
    return _build_table("expected_value", groups)


def _count_confusions(
    items: Sequence[AnswerItem], training: TrainingValues | None
) -> tuple[Confusion, ...]:
    """Return the most frequent wrong values of fields with few values."""
    categories = _list_categories(items, training) - {ANSWER}
    counts: Counter[tuple[str, str, str]] = Counter()
    for item in items:
        answered = item.answered_values
        if answered is None:
            continue
        for name, value in item.expected_values.items():
            if name in categories and answered.get(name) != value:
                counts[name, value, answered.get(name, "(missing)")] += 1
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return tuple(Confusion(*key, count) for key, count in ordered[:MAX_GROUPS])
