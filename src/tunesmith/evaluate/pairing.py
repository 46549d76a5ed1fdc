"""Pair two models' results: every metric that both have, on the items that both were evaluated on.

In: EvalResults of two models. Out: pairs of MetricValues on the same items, and notes on what is
left out. Items are matched by a digest of their content where both sides have one, else by id: a
file that lost a row or changed its order is still compared row by row, and two files with the same
name are not confused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tunesmith.core.events import GENERAL_TASK
from tunesmith.evaluate.results import RETENTION_DATA, EvalResults, MetricValues, select_items

MetricPair = tuple[MetricValues, MetricValues]
ItemKey = tuple[str, int]  # content digest or id, number of earlier items with the same


def pair_measurements(
    first: EvalResults, second: EvalResults
) -> tuple[list[MetricPair], list[str]]:
    """Return the pairs, and a note on each metric or item that they leave out."""
    second_by_metric = {(m.task, m.metric): m for m in second.measurements}
    has_digests = bool(first.digests and second.digests)
    first_digests = first.digests if has_digests else {}
    second_digests = second.digests if has_digests else {}
    pairs: list[MetricPair] = []
    notes: list[str] = []
    first_only: list[str] = []
    for measurement in first.measurements:
        name = f"{measurement.task} {measurement.metric}"
        other = second_by_metric.pop((measurement.task, measurement.metric), None)
        if other is None:
            first_only.append(name)
            continue
        first_index = _index_items(measurement, first_digests)
        second_index = _index_items(other, second_digests)
        common = [key for key in first_index if key in second_index]
        first_common = select_items(measurement, [first_index[key] for key in common])
        second_common = select_items(other, [second_index[key] for key in common])
        if len(common) < max(len(first_index), len(second_index)):
            sizes = f"{len(first_index)} and {len(second_index)} items"
            notes.append(f"{name}: {sizes}, compared on the {len(common)} that both have")
        if problem := _find_problem(first_common, second_common):
            notes.append(f"{name}: not compared, {problem}")
            continue
        groups = first_common.groups or second_common.groups
        first_common = replace(first_common, groups=groups)
        strata = first_common.strata
        renamed = replace(second_common, ids=first_common.ids, strata=strata, groups=groups)
        pairs.append((first_common, renamed))
    second_only = [f"{task} {metric}" for task, metric in second_by_metric]
    if first_only:
        notes.append(f"only the first model has {', '.join(first_only)}")
    if second_only:
        notes.append(f"only the second model has {', '.join(second_only)}")
    return pairs, notes


def map_shared_samples(first: EvalResults, second: EvalResults) -> dict[str, str]:
    """Return the id in `first` of each test row of `second` that both have."""
    has_digests = bool(first.digests and second.digests)
    first_keys = _index_rows(first, has_digests)
    second_keys = _index_rows(second, has_digests)
    first_ids = {key: row for row, key in first_keys.items()}
    return {row: first_ids[key] for row, key in second_keys.items() if key in first_ids}


def _index_rows(results: EvalResults, has_digests: bool) -> dict[str, ItemKey]:
    """Return the key of each test row."""
    digests: dict[str, str] = {}
    for role, rows in results.digests.items():
        if has_digests and role.endswith("test_data"):
            digests |= rows
    ids: dict[str, None] = {}  # an ordered set
    for measurement in results.measurements:
        if measurement.task != GENERAL_TASK:
            ids |= dict.fromkeys(measurement.ids)
    return dict(zip(ids, _make_keys(ids, digests), strict=True))


def _make_keys(ids: Iterable[str], digests: Mapping[str, str]) -> list[ItemKey]:
    """Return the key of each item: equal contents are told apart by their order."""
    counts: Counter[str] = Counter()
    keys: list[ItemKey] = []
    for item in ids:
        digest = digests.get(item, item)
        keys.append((digest, counts[digest]))
        counts[digest] += 1
    return keys


def _find_problem(first: MetricValues, second: MetricValues) -> str:
    sizes = Counter(first.strata or ("",) * len(first.ids))
    if min(sizes.values(), default=0) < 2:
        return "fewer than two items are common"
    if first.weights != second.weights:
        return "the tokenizers differ, so the items have other weights: compare bits_per_byte"
    return ""


def _index_items(
    measurement: MetricValues, digests_by_role: Mapping[str, Mapping[str, str]]
) -> dict[ItemKey, int]:
    digests = _find_task_digests(measurement.task, digests_by_role)
    return {key: index for index, key in enumerate(_make_keys(measurement.ids, digests))}


def _find_task_digests(
    task: str, digests_by_role: Mapping[str, Mapping[str, str]]
) -> Mapping[str, str]:
    """Return the digests of a task's items. In a staged run, the names of roles and tasks start
    with the name of their stage."""
    if task == GENERAL_TASK:
        return digests_by_role.get(RETENTION_DATA, {})
    test_roles = [
        role
        for role in digests_by_role
        if role.endswith("test_data") and task.startswith(role.removesuffix("test_data"))
    ]
    return digests_by_role[max(test_roles, key=len)] if test_roles else {}
