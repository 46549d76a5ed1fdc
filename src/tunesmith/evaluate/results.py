"""From values by item to claims: a score with its interval, and before against after on the same items.

    Measurement (one value an item) -> Score; two Measurements -> Comparison -> a plain sentence

Intervals are 95%: for plain 0/1 values the score intervals of stats.py, which are right for few items and near 0 and 1;
otherwise a bootstrap over items, within each group where there are groups. Before and after are always compared item by
item. Left out: what may be concluded (significance.py); spread between training seeds, which one run cannot know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.events import Sample, Score
from tunesmith.core.types import Comparison
from tunesmith.evaluate.intervals import bootstrap, paired_rates, wilson
from tunesmith.evaluate.significance import mcnemar, smallest_difference, verdict

RETENTION = "retention_data"


@dataclass(frozen=True)
class Measurement:
    """One metric on the items of one task. `weights` (empty: all equal) count within the mean, such as tokens of a
    document; with `groups` (empty: none) the result is the mean over groups of each group's mean."""

    task: str
    metric: str
    ids: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...] = ()
    groups: tuple[str, ...] = ()
    higher_is_better: bool = True

    @property
    def plain_rate(self) -> bool:
        return not self.weights and not self.groups and set(self.values) <= {0.0, 1.0}


@dataclass(frozen=True)
class Measured:
    """All that was measured of one model; what before.json and after.json of a run hold. `samples` are all answers,
    `shown` the ids of a few that the record shows. `contents`: role -> row -> a digest of what it says, by which the
    items of two runs are known to be the same."""

    measurements: tuple[Measurement, ...]
    samples: tuple[Sample, ...] = ()
    contents: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    shown: tuple[str, ...] = ()

    def scores(self, *, step: int) -> Iterator[Score]:
        for measurement in self.measurements:
            yield score(measurement, step=step)


def score(measured: Measurement, *, step: int = 0, seed: int = 0) -> Score:
    """Raises InputError for fewer than two items, over all or in a group: one item has no interval."""
    _check(measured)
    value = float(_mean(measured, np.array(measured.values)))
    if measured.plain_rate:
        low, high = wilson(sum(measured.values), len(measured.values))
    else:
        low, high = bootstrap(*_arrays(measured), seed=seed)
    return Score(measured.task, measured.metric, value, low, high, len(measured.values), step)


def compare(before: Measurement, after: Measurement, *, step: int = 0, seed: int = 0) -> Comparison:
    """`after` minus `before`, item by item. Raises InputError unless both measured the same items with the same weights
    in the same groups; the order may differ. `step`: when `after` was measured."""
    after = _in_order_of(before, after)
    change = replace(before, values=tuple(b - a for a, b in zip(before.values, after.values, strict=True)))
    counts = None
    if before.plain_rate and after.plain_rate:
        counts = change.values.count(1.0), change.values.count(-1.0)
        low, high = paired_rates(*counts, len(change.values))
    else:
        _check(change)
        low, high = bootstrap(*_arrays(change), seed=seed)
    return Comparison(
        task=before.task,
        metric=before.metric,
        before=score(before, seed=seed),
        after=score(after, step=step, seed=seed),
        difference=float(_mean(change, np.array(change.values))),
        low=low,
        high=high,
        higher_is_better=before.higher_is_better,
        **_changed(counts, before.higher_is_better),
        smallest=smallest_difference(low, high),
    )


def _changed(counts: tuple[int, int] | None, higher_is_better: bool) -> dict[str, Any]:
    """Of items that rose and fell: how many got better and worse, and how likely that is by chance."""
    if counts is None:
        return {}
    gains, losses = counts if higher_is_better else counts[::-1]
    return {"gains": gains, "losses": losses, "p": mcnemar(gains, losses)}


def shown_answers(before: Measured, after: Measured) -> tuple[tuple[Sample, Sample], ...]:
    """A few answers before and after."""
    both = zip(before.samples, after.samples, strict=True)
    return tuple(pair for pair in both if pair[0].id in before.shown)


def compare_all(before: Measured, after: Measured, *, step: int) -> tuple[Comparison, ...]:
    """Of two models on the same items: every measure of `before`. How far a model is from its base is measured after
    only: before, it has not moved."""
    later = {(one.task, one.metric): one for one in after.measurements}
    pairs = ((one, later[one.task, one.metric]) for one in before.measurements)
    return tuple(compare(first, second, step=step) for first, second in pairs)


def moved(before: Measured, after: Measured, *, step: int) -> tuple[Score, ...]:
    """What was measured after only: how far the model is from its base."""
    earlier = {(one.task, one.metric) for one in before.measurements}
    return tuple(score(one, step=step) for one in after.measurements if (one.task, one.metric) not in earlier)


def verdict_text(comparison: Comparison) -> str:
    """One line with all that a claim needs: both values, the difference, its interval, the number of items."""
    c = comparison
    return (
        f"{c.task}, {c.metric}: {c.before.value:.3f} -> {c.after.value:.3f},"
        f" difference {c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}], n = {c.after.n}: {verdict(c)}"
    )


def _mean(measured: Measurement, values: np.ndarray) -> float:
    weights, groups = _arrays(measured)[1:]
    return float(np.mean([np.average(values[rows], weights=weights[rows]) for rows in groups]))


def _arrays(measured: Measurement) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Values, weights, and the places of each group's items."""
    n = len(measured.values)
    names = np.array(measured.groups or ("",) * n)
    groups = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    return np.array(measured.values), np.array(measured.weights or (1.0,) * n), groups


def _check(measured: Measurement) -> None:
    for group, count in Counter(measured.groups or ("",) * len(measured.values)).items():
        if count < 2:
            what = f"{measured.task} has one item" + (f" in the group {group!r}" if group else "")
            raise InputError(f"{what}: that has no interval", fix="measure at least two, better a hundred")
    if not measured.values:
        raise InputError(f"{measured.task} has no items to measure")


def _in_order_of(before: Measurement, after: Measurement) -> Measurement:
    """`after` with its items in the order of `before`."""
    if (before.task, before.metric) != (after.task, after.metric):
        raise InputError(f"{before.task}, {before.metric} cannot be compared with {after.task}, {after.metric}")
    places = {item: i for i, item in enumerate(after.ids)}
    if len(places) < len(after.ids) or set(before.ids) != set(places) or len(before.ids) != len(after.ids):
        odd = sorted(set(before.ids) ^ set(places)) or [item for item, n in Counter(after.ids).items() if n > 1]
        raise InputError(f"before and after were not measured on the same items: {odd[0]}", where=before.task)
    order = [places[item] for item in before.ids]
    values, weights, groups = (
        tuple(x[i] for i in order) if x else x for x in (after.values, after.weights, after.groups)
    )
    if (before.weights, before.groups) != (weights, groups):
        raise InputError("before and after weigh or group the items differently", where=before.task)
    return replace(after, ids=before.ids, values=values, weights=weights, groups=groups)
