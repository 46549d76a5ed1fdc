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

import numpy as np
from pydantic import model_validator

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import GenerationSample, Score
from tunesmith.core.formatting import format_count
from tunesmith.core.types import Comparison
from tunesmith.evaluate.statistics import (
    compute_constant_interval,
    compute_detectable_difference,
    compute_mcnemar_p,
    compute_mean_interval,
    compute_padded_interval,
    compute_wilson_interval,
    judge_comparison,
)

RETENTION_DATA = "retention_data"
UNBOUNDED = (-math.inf, math.inf)
MAX_NAMED_ITEMS = 3
DISTANCE_METRICS = {  # metrics that compare a model with its base, in words
    "kl": "KL(base ‖ tuned), nats/token",
    "top1_agreement": "top-1 agreement with base",
}


@dataclass(frozen=True)
class MetricValues:
    """One metric on the items of one task.

    weights: weights of the mean, such as tokens per document; empty for equal weights.
    groups: the group of each item; the result is the mean of the group means. Empty for one group.
    truncated: whether each item's answer reached the limit of new tokens; empty without answers.
    """

    task: str
    metric: str
    ids: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...] = ()
    groups: tuple[str, ...] = ()
    higher_is_better: bool = True
    truncated: tuple[bool, ...] = ()

    @model_validator(mode="after")
    def _check_lengths(self) -> MetricValues:
        """Refuse a stored measurement whose lists are not of the same items."""
        if len(self.ids) != len(self.values):
            raise ValueError(f"ids: {len(self.ids)}, values: {len(self.values)}")
        for name in ("weights", "groups", "truncated"):
            count = len(getattr(self, name))
            if count not in (0, len(self.ids)):
                raise ValueError(f"ids: {len(self.ids)}, {name}: {count}")
        return self

    @property
    def is_binary(self) -> bool:
        return not self.weights and not self.groups and set(self.values) <= {0.0, 1.0}


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
    if measurement.is_binary:
        low, high = compute_wilson_interval(sum(measurement.values), len(measurement.values))
    else:
        low, high = _compute_interval(measurement, _find_bounds(measurement))
    value = _compute_mean(measurement)
    n = len(measurement.values)
    truncated = sum(measurement.truncated)
    return Score(measurement.task, measurement.metric, value, low, high, n, step, truncated)


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
        p_value = compute_mcnemar_p(gains, losses)
    _refuse_single_item(change)
    is_graded = _find_bounds(before)[1] == _find_bounds(after)[1] == 1
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


def average_measurements(measurements: Sequence[MetricValues]) -> MetricValues:
    """Average measurements of one metric on the same items, item by item."""
    values = np.mean([measurement.values for measurement in measurements], axis=0)
    return replace(measurements[0], values=tuple(values.tolist()))


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
    change = f"difference {c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]"
    return f"{values}, {change}, n = {c.after.n}: {judge_comparison(c)}"


def select_items(measurement: MetricValues, indices: Sequence[int]) -> MetricValues:
    """Return the measurement of the items with these indices, in this order."""
    weights = measurement.weights
    groups = measurement.groups
    truncated = measurement.truncated
    return replace(
        measurement,
        ids=tuple(measurement.ids[index] for index in indices),
        values=tuple(measurement.values[index] for index in indices),
        weights=tuple(weights[index] for index in indices) if weights else (),
        groups=tuple(groups[index] for index in indices) if groups else (),
        truncated=tuple(truncated[index] for index in indices) if truncated else (),
    )


def split_by_task(
    measurement: MetricValues, tasks: Mapping[str, str], trained_tasks: Collection[str]
) -> Iterator[MetricValues]:
    """Yield the values per task and their means over tasks; without tasks, the measurement itself.

    tasks: item id -> task. trained_tasks: the tasks with training rows. They are never averaged
    with the other tasks: what was learned and what transfers are two results. Tasks have equal
    weight whatever their number of rows (macro average).
    """
    if not tasks:
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
        groups = tuple(tasks[item] for item in part.ids)
        yield replace(part, task=f"{measurement.task}: {mean_label}", groups=groups)


def _compute_mean(measurement: MetricValues) -> float:
    values, weights, groups = _to_arrays(measurement)
    return float(np.mean([np.average(values[rows], weights=weights[rows]) for rows in groups]))


def _find_bounds(measurement: MetricValues) -> tuple[float, float]:
    """Return the range of a metric with such values: grades, losses or other numbers.

    A loss may lie between 0 and 1 too: only what is better higher, or 0 or 1, is a grade."""
    values = set(measurement.values)
    if not values or min(values) < 0:
        return UNBOUNDED
    is_grade = max(values) <= 1 and (measurement.higher_is_better or values <= {0.0, 1.0})
    return 0.0, 1.0 if is_grade else math.inf


def _compute_interval(
    measurement: MetricValues, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Return the interval of the mean, within the bounds of the values.

    Unweighted grades that are all right or wrong, or all equal, are treated as rates.
    """
    values, weights, groups = _to_arrays(measurement)
    if bounds[1] == 1 and not measurement.weights:
        is_constant = all(np.ptp(values[rows]) == 0 for rows in groups)
        if is_constant or set(measurement.values) <= {-1.0, 0.0, 1.0}:
            return compute_padded_interval(values, groups, bounds)
    low, high = compute_mean_interval(values, weights, groups)
    return max(bounds[0], low), min(bounds[1], high)


def _to_arrays(measurement: MetricValues) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return the values, the weights, and the item indices of each group."""
    n = len(measurement.values)
    names = np.array(measurement.groups or ("",) * n)
    groups = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    return np.array(measurement.values), np.array(measurement.weights or (1.0,) * n), groups


def _refuse_single_item(measurement: MetricValues) -> None:
    group_sizes = Counter(measurement.groups or ("",) * len(measurement.values))
    for group, count in group_sizes.items():
        if count < 2:
            subject = f"{measurement.task} has only 1 item"
            if group:
                subject += f" in the group {group!r}"
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
    if (before.weights, before.groups) != (aligned.weights, aligned.groups):
        message = "the items have different weights or groups before and after"
        raise InputError(message, where=before.task)
    return aligned
