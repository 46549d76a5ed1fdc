"""From values by item to claims: a score with its interval, and before against after on the same
items.

    Measurement (one value an item) -> Score; two Measurements -> Comparison -> a plain sentence

Intervals are 95%: for plain 0/1 values the score intervals of stats.py, which are right for few
items and near 0 and 1; otherwise a bootstrap over items, within each group where there are groups.
Before and after are always compared item by item. Left out: what may be concluded
(significance.py); spread between training seeds, which one run cannot know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.events import GenerationSample, Score
from tunesmith.core.types import Comparison
from tunesmith.evaluate.intervals import (
    bootstrap_interval,
    compute_paired_rate_interval,
    compute_wilson_interval,
)
from tunesmith.evaluate.significance import (
    compute_detectable_difference,
    compute_mcnemar_p,
    judge_comparison,
)

RETENTION_DATA = "retention_data"


@dataclass(frozen=True)
class MetricValues:
    """One metric on the items of one task. `weights` (empty: all equal) count within the mean, such
    as tokens of a document; with `groups` (empty: none) the result is the mean over groups of each
    group's mean."""

    task: str
    metric: str
    ids: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...] = ()
    groups: tuple[str, ...] = ()
    higher_is_better: bool = True

    @property
    def is_binary(self) -> bool:
        return not self.weights and not self.groups and set(self.values) <= {0.0, 1.0}


@dataclass(frozen=True)
class EvalResults:
    """All that was measured of one model; what before.json and after.json of a run hold. `samples`
    are all answers, `shown` the ids of a few that the record shows. `contents`: role -> row -> a
    digest of what it says, by which the items of two runs are known to be the same."""

    measurements: tuple[MetricValues, ...]
    samples: tuple[GenerationSample, ...] = ()
    digests: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    shown_ids: tuple[str, ...] = ()

    def iter_scores(self, *, step: int) -> Iterator[Score]:
        for measurement in self.measurements:
            yield compute_score(measurement, step=step)


def compute_score(measurement: MetricValues, *, step: int = 0, seed: int = 0) -> Score:
    """Raises InputError for fewer than two items, over all or in a group: one item has no
    interval."""
    _refuse_single_item(measurement)
    value = float(_compute_mean(measurement, np.array(measurement.values)))
    if measurement.is_binary:
        low, high = compute_wilson_interval(sum(measurement.values), len(measurement.values))
    else:
        low, high = bootstrap_interval(*_to_arrays(measurement), seed=seed)
    return Score(
        measurement.task, measurement.metric, value, low, high, len(measurement.values), step
    )


def compare_measurements(
    before: MetricValues, after: MetricValues, *, step: int = 0, seed: int = 0
) -> Comparison:
    """`after` minus `before`, item by item. Raises InputError unless both measured the same items
    with the same weights in the same groups; the order may differ. `step`: when `after` was
    measured."""
    after = _align_items(before, after)
    change = replace(
        before, values=tuple(b - a for a, b in zip(before.values, after.values, strict=True))
    )
    counts = None
    if before.is_binary and after.is_binary:
        counts = change.values.count(1.0), change.values.count(-1.0)
        low, high = compute_paired_rate_interval(*counts, len(change.values))
    else:
        _refuse_single_item(change)
        low, high = bootstrap_interval(*_to_arrays(change), seed=seed)
    return Comparison(
        task=before.task,
        metric=before.metric,
        before=compute_score(before, seed=seed),
        after=compute_score(after, step=step, seed=seed),
        difference=float(_compute_mean(change, np.array(change.values))),
        low=low,
        high=high,
        higher_is_better=before.higher_is_better,
        **_build_change_fields(counts, before.higher_is_better),
        min_detectable=compute_detectable_difference(low, high),
    )


def _build_change_fields(counts: tuple[int, int] | None, higher_is_better: bool) -> dict[str, Any]:
    """Of items that rose and fell: how many got better and worse, and how likely that is by
    chance."""
    if counts is None:
        return {}
    gains, losses = counts if higher_is_better else counts[::-1]
    return {"improved": gains, "worsened": losses, "p_value": compute_mcnemar_p(gains, losses)}


def select_sample_pairs(
    before: EvalResults, after: EvalResults
) -> tuple[tuple[GenerationSample, GenerationSample], ...]:
    """A few answers before and after."""
    pairs = zip(before.samples, after.samples, strict=True)
    return tuple(pair for pair in pairs if pair[0].id in before.shown_ids)


def compare_results(
    before: EvalResults, after: EvalResults, *, step: int
) -> tuple[Comparison, ...]:
    """Of two models on the same items: every measure of `before`. How far a model is from its base
    is measured after only: before, it has not moved."""
    after_by_metric = {
        (measurement.task, measurement.metric): measurement for measurement in after.measurements
    }
    pairs = (
        (measurement, after_by_metric[measurement.task, measurement.metric])
        for measurement in before.measurements
    )
    return tuple(compare_measurements(first, second, step=step) for first, second in pairs)


def compute_kl_scores(before: EvalResults, after: EvalResults, *, step: int) -> tuple[Score, ...]:
    """What was measured after only: how far the model is from its base."""
    before_metrics = {(measurement.task, measurement.metric) for measurement in before.measurements}
    return tuple(
        compute_score(measurement, step=step)
        for measurement in after.measurements
        if (measurement.task, measurement.metric) not in before_metrics
    )


def format_comparison(comparison: Comparison) -> str:
    """One line with all that a claim needs: both values, the difference, its interval, the number
    of items."""
    c = comparison
    return (
        f"{c.task}, {c.metric}: {c.before.value:.3f} -> {c.after.value:.3f},"
        f" difference {c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}], n = {c.after.n}: {judge_comparison(c)}"
    )


def _compute_mean(measurement: MetricValues, values: np.ndarray) -> float:
    weights, groups = _to_arrays(measurement)[1:]
    return float(np.mean([np.average(values[rows], weights=weights[rows]) for rows in groups]))


def _to_arrays(measurement: MetricValues) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Values, weights, and the places of each group's items."""
    n = len(measurement.values)
    names = np.array(measurement.groups or ("",) * n)
    groups = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    return np.array(measurement.values), np.array(measurement.weights or (1.0,) * n), groups


def _refuse_single_item(measurement: MetricValues) -> None:
    for group, count in Counter(measurement.groups or ("",) * len(measurement.values)).items():
        if count < 2:
            subject = f"{measurement.task} has one item" + (
                f" in the group {group!r}" if group else ""
            )
            raise InputError(
                f"{subject}: that has no interval", fix="measure at least two, better a hundred"
            )
    if not measurement.values:
        raise InputError(f"{measurement.task} has no items to measure")


def _align_items(before: MetricValues, after: MetricValues) -> MetricValues:
    """`after` with its items in the order of `before`."""
    if (before.task, before.metric) != (after.task, after.metric):
        raise InputError(
            f"{before.task}, {before.metric} cannot be compared with {after.task}, {after.metric}"
        )
    index_by_id = {item: i for i, item in enumerate(after.ids)}
    if (
        len(index_by_id) < len(after.ids)
        or set(before.ids) != set(index_by_id)
        or len(before.ids) != len(after.ids)
    ):
        mismatched_ids = sorted(set(before.ids) ^ set(index_by_id)) or [
            item for item, n in Counter(after.ids).items() if n > 1
        ]
        raise InputError(
            f"before and after were not measured on the same items: {mismatched_ids[0]}",
            where=before.task,
        )
    order = [index_by_id[item] for item in before.ids]
    values, weights, groups = (
        tuple(column[i] for i in order) if column else column
        for column in (after.values, after.weights, after.groups)
    )
    if (before.weights, before.groups) != (weights, groups):
        raise InputError("before and after weigh or group the items differently", where=before.task)
    return replace(after, ids=before.ids, values=values, weights=weights, groups=groups)
