"""From item values to claims: scores with an interval, and paired before/after comparisons.

In: MetricValues (one value per item). Out: Score, or Comparison of two models on the same items.
Left out: the formulas and verdicts (statistics.py), which items two models share (pairing.py), and
the variance between training seeds, which one run cannot show.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import model_validator

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import GenerationSample, Score
from tunesmith.core.formatting import format_count
from tunesmith.core.types import Comparison
from tunesmith.evaluate.class_scores import compute_macro_f1_values
from tunesmith.evaluate.statistics import (
    compute_constant_interval,
    compute_detectable_difference,
    compute_mean_interval,
    compute_padded_interval,
    compute_sign_flip_p,
    compute_wilson_interval,
    judge_comparison,
)

RETENTION_DATA = "retention_data"
UNBOUNDED = (-math.inf, math.inf)
MAX_NAMED_ITEMS = 3
ITEM_LISTS = ("ids", "values", "weights", "strata", "groups", "truncated", "classes")
DISTANCE_METRICS = {  # metrics that compare a model with its base, in words
    "kl": "KL(base ‖ tuned), nats/token",
    "top1_agreement": "top-1 agreement with base",
}


@dataclass(frozen=True)
class MetricValues:
    """One metric on the items of one task.

    weights: weights of the mean, such as tokens per document; empty for equal weights.
    strata: the task of each item; the result is the mean of the tasks' means. Empty for one task.
    groups: the group of each item; items of one are not independent. Empty if all items are.
    truncated: whether each item's answer reached the limit of new tokens; empty without answers.
    classes: (expected, answered) label of each item, from which the values follow (macro-F1).
    """

    task: str
    metric: str
    ids: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...] = ()
    strata: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    higher_is_better: bool = True
    truncated: tuple[bool, ...] = ()
    classes: tuple[tuple[str, str], ...] = ()

    @model_validator(mode="after")
    def _check_lengths(self) -> MetricValues:
        """Refuse a stored measurement whose lists are not of the same items."""
        if len(self.ids) != len(self.values):
            raise ValueError(f"ids: {len(self.ids)}, values: {len(self.values)}")
        for name in ITEM_LISTS[2:]:
            count = len(getattr(self, name))
            if count not in (0, len(self.ids)):
                raise ValueError(f"ids: {len(self.ids)}, {name}: {count}")
        return self

    @property
    def is_binary(self) -> bool:
        return not self.weights and not self.strata and set(self.values) <= {0.0, 1.0}


@dataclass(frozen=True)
class EvalResults:
    """All measurements of one model, as in a run's eval_before.json and eval_after.json.

    samples: every answer; shown_ids: the ids of the few that the record shows.
    digests: role -> row id -> digest of its content, which identifies items across runs.
    """

    measurements: tuple[MetricValues, ...]
    samples: tuple[GenerationSample, ...] = ()
    digests: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    shown_ids: tuple[str, ...] = ()

    def iter_scores(self, *, step: int) -> Iterator[Score]:
        for measurement in self.measurements:
            yield compute_score(measurement, step=step)


def compute_score(measurement: MetricValues, *, step: int = 0) -> Score:
    """Return the score with its 95% interval.

    Raises InputError for fewer than two items in total or in a group: one item has no interval.
    Raises GateError for a value that is not finite: such a model has no score.
    """
    _refuse_single_item(measurement)
    _refuse_nonfinite(measurement)
    if measurement.is_binary and not count_groups(measurement):
        low, high = compute_wilson_interval(sum(measurement.values), len(measurement.values))
    else:
        low, high = _compute_interval(measurement, _find_bounds(measurement))
    value = _compute_mean(measurement)
    n = len(measurement.values)
    truncated = sum(measurement.truncated)
    groups = count_groups(measurement)
    name = (measurement.task, measurement.metric)
    return Score(*name, value, low, high, n, step, truncated, groups)


def compare_measurements(before: MetricValues, after: MetricValues, *, step: int = 0) -> Comparison:
    """Return `after` minus `before`, paired by item; their order may differ.

    step: the training step of `after`. Raises InputError unless both have the same items with the
    same weights and groups.
    """
    after = _align_items(before, after)
    _refuse_nonfinite(before)
    _refuse_nonfinite(after)
    changes = tuple(b - a for a, b in zip(before.values, after.values, strict=True))
    change = replace(before, values=changes)
    improved = worsened = p_value = None
    if before.is_binary and after.is_binary:
        gains = changes.count(1.0)
        losses = changes.count(-1.0)
        improved, worsened = (gains, losses) if before.higher_is_better else (losses, gains)
    _refuse_single_item(change)
    is_graded = _find_bounds(before)[1] == _find_bounds(after)[1] == 1
    if is_graded and not before.weights:
        p_value = _compute_exact_p(change)
    low, high = _compute_interval(change, (-1.0, 1.0) if is_graded else UNBOUNDED)
    if low == high:
        low, high = compute_constant_interval(low, len(changes))
    return Comparison(
        task=before.task,
        metric=before.metric,
        before=compute_score(before),
        after=compute_score(after, step=step),
        difference=_compute_mean(change),
        low=low,
        high=high,
        higher_is_better=before.higher_is_better,
        improved=improved,
        worsened=worsened,
        p_value=p_value,
        min_detectable=compute_detectable_difference(low, high),
    )


def _compute_exact_p(change: MetricValues) -> float | None:
    """Return the p of all signs that the changes of the items, or groups, might have had."""
    values, weights, strata = _to_arrays(change)
    terms = np.concatenate([values[rows] * weights[rows] / weights[rows].sum() for rows in strata])
    return compute_sign_flip_p(terms)


def average_measurements(measurements: Sequence[MetricValues]) -> MetricValues:
    """Average measurements of one metric on the same items, item by item."""
    values = np.array([each.values for each in measurements]).mean(axis=0)
    return replace(measurements[0], values=tuple(values.tolist()), classes=())


def select_sample_pairs(
    before: EvalResults, after: EvalResults
) -> tuple[tuple[GenerationSample, GenerationSample], ...]:
    """Return the few answers that are shown, before and after."""
    pairs = zip(before.samples, after.samples, strict=True)
    return tuple(pair for pair in pairs if pair[0].id in before.shown_ids)


def compare_results(
    before: EvalResults, after: EvalResults, *, step: int
) -> tuple[Comparison, ...]:
    """Compare every metric of `before` with the same metric of `after`.

    KL to the base is measured only after training, and is not compared (compute_kl_scores). Raises
    InputError for a metric that `after` lacks: the results are of other items.
    """
    after_by_metric = {(m.task, m.metric): m for m in after.measurements}
    for m in before.measurements:
        if (m.task, m.metric) not in after_by_metric:
            message = f"{m.task}: {m.metric} was measured before training, and not after"
            raise InputError(message, fix="restore the recipe and the run folder as they were")
    return tuple(
        compare_measurements(m, after_by_metric[m.task, m.metric], step=step)
        for m in before.measurements
    )


def compute_kl_scores(before: EvalResults, after: EvalResults, *, step: int) -> tuple[Score, ...]:
    """Return the scores of the metrics that only `after` has: KL to the base, top-1 agreement."""
    before_metrics = {(m.task, m.metric) for m in before.measurements}
    return tuple(
        compute_score(m, step=step)
        for m in after.measurements
        if (m.task, m.metric) not in before_metrics
    )


def describe_truncation(
    comparisons: Sequence[Comparison], names: tuple[str, str] = ("before", "after")
) -> tuple[str, ...]:
    """Return a line per task with answers that reached the limit of new tokens."""
    lines: dict[str, None] = {}
    for comparison in comparisons:
        before = comparison.before
        after = comparison.after
        if before.truncated or after.truncated:
            first = f"{before.truncated} of {before.n} {names[0]}"
            second = f"{after.truncated} of {after.n} {names[1]}"
            lines[f"{comparison.task}: answers truncated at the limit: {first}, {second}"] = None
    return tuple(lines)


def format_comparison(comparison: Comparison) -> str:
    """Return one line with both values, the difference, its interval, n and the verdict."""
    c = comparison
    values = f"{c.task}, {c.metric}: {c.before.value:.3f} -> {c.after.value:.3f}"
    low, high = c.interval
    change = f"difference {c.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{values}, {change}, n = {c.after.size}: {judge_comparison(c)}"


def select_items(measurement: MetricValues, indices: Sequence[int]) -> MetricValues:
    """Return the measurement of the items with these indices, in this order."""
    lists: dict[str, Any] = {}
    for name in ITEM_LISTS:
        if values := getattr(measurement, name):
            lists[name] = tuple(values[index] for index in indices)
    return _compute_class_values(replace(measurement, **lists))


def _compute_class_values(measurement: MetricValues) -> MetricValues:
    """Return a measurement with the values that follow from the labels of these very items."""
    if not measurement.classes:
        return measurement
    values = compute_macro_f1_values(measurement.classes, measurement.strata)
    return replace(measurement, values=values)


def split_by_task(
    measurement: MetricValues, tasks: Mapping[str, str], trained_tasks: Collection[str]
) -> Iterator[MetricValues]:
    """Yield the values per task and their means over tasks; without tasks, the measurement itself.

    tasks: item id -> task. trained_tasks: the tasks with training rows. They are never averaged
    with the other tasks: what was learned and what transfers are two results. Tasks have equal
    weight whatever their number of rows (macro average).
    """
    if not tasks or measurement.strata:  # which may be too small in each task
        yield measurement
        return
    names = list(dict.fromkeys(tasks[item] for item in measurement.ids))
    trained = [name for name in names if name in trained_tasks]
    held_out = [name for name in names if name not in trained_tasks]
    yield from _split_tasks(measurement, tasks, trained, "", "mean of tasks")
    yield from _split_tasks(measurement, tasks, held_out, " (held out)", "mean of held-out tasks")


def _split_tasks(
    measurement: MetricValues,
    tasks: Mapping[str, str],
    names: Collection[str],
    suffix: str,
    mean_label: str,
) -> Iterator[MetricValues]:
    for name in names:
        indices = [i for i, item in enumerate(measurement.ids) if tasks[item] == name]
        part = select_items(measurement, indices)
        yield replace(part, task=f"{measurement.task}: {name}{suffix}")
    if len(names) > 1:
        indices = [i for i, item in enumerate(measurement.ids) if tasks[item] in names]
        part = select_items(measurement, indices)
        strata = tuple(tasks[item] for item in part.ids)
        mean = replace(part, task=f"{measurement.task}: {mean_label}", strata=strata)
        yield _compute_class_values(mean)


def _compute_mean(measurement: MetricValues) -> float:
    values, weights, strata = _to_arrays(replace(measurement, groups=()))
    return float(np.mean([np.average(values[rows], weights=weights[rows]) for rows in strata]))


def _find_bounds(measurement: MetricValues) -> tuple[float, float]:
    """Return the range of a metric with such values: grades, losses or other numbers.

    A loss may lie between 0 and 1 too: only what is better higher, or 0 or 1, is a grade."""
    values = set(measurement.values)
    if measurement.classes:
        return 0.0, 1.0
    if not values or min(values) < 0:
        return UNBOUNDED
    is_grade = max(values) <= 1 and (measurement.higher_is_better or values <= {0.0, 1.0})
    return 0.0, 1.0 if is_grade else math.inf


def _compute_interval(
    measurement: MetricValues, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Return the interval of the mean, within the bounds of the values.

    Rates, grades of groups, grades that are all equal and differences of which most are 0 get the
    interval that is padded with one more value at either bound; of differences, of their size.
    """
    values, weights, strata = _to_arrays(measurement)
    if bounds[1] == 1 and not measurement.weights:
        is_constant = all(np.ptp(values[rows]) == 0 for rows in strata)
        changed = np.flatnonzero(values)
        is_sparse = bounds[0] < 0 and 2 * len(changed) < len(values)
        is_rate = set(measurement.values) <= {-1.0, 0.0, 1.0}
        ends = bounds
        if bounds[0] < 0 and len(changed) and not is_constant:
            size = math.sqrt(np.average(values[changed] ** 2, weights=weights[changed]))
            items = np.array([change for change in measurement.values if change])
            # few groups that change in single items do not show that others change as a whole
            size = max(size, math.sqrt(np.mean(items**2)) / 3)
            ends = (-size, size)
        if is_constant or is_rate or is_sparse or count_groups(measurement):
            low, high = compute_padded_interval(values, weights, strata, ends)
            return max(bounds[0], low), min(bounds[1], high)
    low, high = compute_mean_interval(values, weights, strata)
    return max(bounds[0], low), min(bounds[1], high)


def _to_arrays(measurement: MetricValues) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return values, weights, and the indices of each stratum: of the items, or of the groups, with
    their means and summed weights (the ratio estimator, Cochran 1977)."""
    values = np.array(measurement.values)
    n = len(values)
    weights = np.array(measurement.weights or (1.0,) * n)
    names = measurement.strata or ("",) * n
    if count_groups(measurement) > 1:
        units = list(zip(names, measurement.groups, strict=True))
        index_by_unit = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
        unit_N = np.array([index_by_unit[unit] for unit in units])
        sums = np.bincount(unit_N, weights * values)
        weights = np.bincount(unit_N, weights)
        values = sums / np.maximum(weights, 1e-300)
        names = tuple(stratum for stratum, _ in index_by_unit)
    name_N = np.array(names)
    strata = [np.flatnonzero(name_N == stratum) for stratum in dict.fromkeys(names)]
    return values, weights, strata


def count_groups(measurement: MetricValues) -> int:
    """Return how many groups a measurement has: the fewest of a stratum, since one with a single
    group has no interval of groups. 0 if each item is alone."""
    if not measurement.groups:
        return 0
    names = measurement.strata or ("",) * len(measurement.groups)
    units = set(zip(names, measurement.groups, strict=True))
    sizes = Counter(stratum for stratum, _ in units)
    return min(sizes.values()) if len(units) < len(measurement.groups) else 0


def _refuse_single_item(measurement: MetricValues) -> None:
    sizes = Counter(measurement.strata or ("",) * len(measurement.values))
    for stratum, count in sizes.items():
        if count < 2:
            subject = f"{measurement.task} has only 1 item"
            if stratum:
                subject += f" of {stratum!r}"
            fix = "evaluate on at least two items, better a hundred"
            raise InputError(f"{subject}: an interval needs two", fix=fix)
    if not measurement.values:
        raise InputError(f"{measurement.task} has no items to evaluate")


def _refuse_nonfinite(measurement: MetricValues) -> None:
    pairs = zip(measurement.ids, measurement.values, strict=True)
    bad_ids = [item for item, value in pairs if not math.isfinite(value)]
    if bad_ids:
        name = f"{measurement.task} {measurement.metric}"
        count = f"{len(bad_ids):,} of {format_count(len(measurement.ids), 'item')}"
        raise GateError(
            f"{name} is not a finite number for {count}: {', '.join(bad_ids[:MAX_NAMED_ITEMS])}",
            fix="the model overflows there: use dtype bf16 or fp32, or a lower learning_rate",
        )


def _align_items(before: MetricValues, after: MetricValues) -> MetricValues:
    """Return `after` with its items in the order of `before`."""
    if (before.task, before.metric) != (after.task, after.metric):
        first = f"{before.task}, {before.metric}"
        raise InputError(f"{first} cannot be compared with {after.task}, {after.metric}")
    index_by_id = {item: i for i, item in enumerate(after.ids)}
    if sorted(before.ids) != sorted(after.ids) or len(index_by_id) < len(after.ids):
        mismatched_ids = sorted(set(before.ids) ^ set(index_by_id))
        # Equal sets: an item is there twice.
        mismatched_ids += [item for item, _ in Counter(before.ids + after.ids).most_common(1)]
        message = f"before and after were not evaluated on the same items: {mismatched_ids[0]}"
        raise InputError(message, where=before.task)
    aligned = select_items(after, [index_by_id[item] for item in before.ids])
    if (before.weights, before.strata) != (aligned.weights, aligned.strata):
        message = "the items have different weights or tasks before and after"
        raise InputError(message, where=before.task)
    return aligned
