"""Two models measured apart, brought together: every measure that both have, on the items that both
were asked.

    Measured, Measured -> pairs of Measurements on the same items, and notes on what is left out

An item is known by what it says, where both sides kept a digest of it, else by its id: a file that
lost a row, or was put in another order, is still compared row by row, and two files of one name are
not taken for each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tunesmith.core.events import GENERAL_TASK
from tunesmith.evaluate.results import RETENTION_DATA, EvalResults, MetricValues

MetricPair = tuple[MetricValues, MetricValues]


def pair_measurements(
    first: EvalResults, second: EvalResults
) -> tuple[list[MetricPair], list[str]]:
    """The pairs, and what they do not hold."""
    second_by_metric = {
        (measurement.task, measurement.metric): measurement for measurement in second.measurements
    }
    has_digests = first.digests and second.digests
    pairs: list[MetricPair] = []
    notes, first_only = list[str](), list[str]()
    for measurement in first.measurements:
        name, other = (
            f"{measurement.task} {measurement.metric}",
            second_by_metric.pop((measurement.task, measurement.metric), None),
        )
        if other is None:
            first_only.append(name)
            continue
        first_keys, second_keys = (
            _index_items(m, results.digests if has_digests else {})
            for m, results in ((measurement, first), (other, second))
        )
        common = [key for key in first_keys if key in second_keys]
        first_common, second_common = (
            select_items(m, [keys[key] for key in common])
            for m, keys in ((measurement, first_keys), (other, second_keys))
        )
        if len(common) < max(len(first_keys), len(second_keys)):
            notes.append(
                f"{name}: {len(common)} items are common to {len(first_keys)} and {len(second_keys)}, and compared"
            )
        if problem := _find_problem(first_common, second_common):
            notes.append(f"{name}: not compared, {problem}")
        else:
            pairs.append(
                (
                    first_common,
                    replace(second_common, ids=first_common.ids, groups=first_common.groups),
                )
            )
    for ordinal, names in (
        ("first", first_only),
        ("second", [f"{task} {metric}" for task, metric in second_by_metric]),
    ):
        if names:
            notes.append(f"measured of the {ordinal} only: {', '.join(names)}")
    return pairs, notes


def _find_problem(first: MetricValues, second: MetricValues) -> str:
    if min(Counter(first.groups or ("",) * len(first.ids)).values(), default=0) < 2:
        return "fewer than two items are common"
    if first.weights != second.weights:
        return "the items weigh differently: other tokens. bits_per_byte can be compared"
    return ""


def _index_items(
    measurement: MetricValues, digests_by_role: Mapping[str, Mapping[str, str]]
) -> dict[tuple[str, int], int]:
    """(what an item says, how often that stood before) -> its place."""
    digests, counts = _find_task_digests(measurement.task, digests_by_role), Counter[str]()
    index_by_key: dict[tuple[str, int], int] = {}
    for index, item in enumerate(measurement.ids):
        digest = digests.get(item, item)
        index_by_key[digest, counts[digest]] = index
        counts[digest] += 1
    return index_by_key


def _find_task_digests(
    task: str, digests_by_role: Mapping[str, Mapping[str, str]]
) -> Mapping[str, str]:
    """The digests of a task's items; those of several stages have the name of the stage before
    them."""
    if task == GENERAL_TASK:
        return digests_by_role.get(RETENTION_DATA, {})
    test_roles = [
        role
        for role in digests_by_role
        if role.endswith("test_data") and task.startswith(role[: -len("test_data")])
    ]
    return digests_by_role[max(test_roles, key=len)] if test_roles else {}


def select_items(measurement: MetricValues, indices: Sequence[int]) -> MetricValues:
    """The items at these places, in this order."""
    ids, values, weights, groups = (
        tuple(column[index] for index in indices) if column else ()
        for column in (measurement.ids, measurement.values, measurement.weights, measurement.groups)
    )
    return replace(measurement, ids=ids, values=values, weights=weights, groups=groups)
