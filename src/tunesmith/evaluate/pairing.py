"""Two models measured apart, brought together: every measure that both have, on the items that both were asked.

    Measured, Measured -> pairs of Measurements on the same items, and notes on what is left out

An item is known by what it says, where both sides kept a digest of it, else by its id: a file that lost a row, or was
put in another order, is still compared row by row, and two files of one name are not taken for each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tunesmith.core.events import GENERAL
from tunesmith.evaluate.results import RETENTION, Measured, Measurement

Pair = tuple[Measurement, Measurement]


def paired(first: Measured, second: Measured) -> tuple[list[Pair], list[str]]:
    """The pairs, and what they do not hold."""
    others = {(one.task, one.metric): one for one in second.measurements}
    known = first.contents and second.contents
    pairs: list[Pair] = []
    notes, alone = list[str](), list[str]()
    for one in first.measurements:
        name, other = f"{one.task} {one.metric}", others.pop((one.task, one.metric), None)
        if other is None:
            alone.append(name)
            continue
        ours, theirs = (_keys(m, side.contents if known else {}) for m, side in ((one, first), (other, second)))
        common = [key for key in ours if key in theirs]
        mine, its = (only(m, [keys[key] for key in common]) for m, keys in ((one, ours), (other, theirs)))
        if len(common) < max(len(ours), len(theirs)):
            notes.append(f"{name}: {len(common)} items are common to {len(ours)} and {len(theirs)}, and compared")
        if problem := _problem(mine, its):
            notes.append(f"{name}: not compared, {problem}")
        else:
            pairs.append((mine, replace(its, ids=mine.ids, groups=mine.groups)))
    for which, names in (("first", alone), ("second", [f"{task} {metric}" for task, metric in others])):
        if names:
            notes.append(f"measured of the {which} only: {', '.join(names)}")
    return pairs, notes


def _problem(one: Measurement, other: Measurement) -> str:
    if min(Counter(one.groups or ("",) * len(one.ids)).values(), default=0) < 2:
        return "fewer than two items are common"
    if one.weights != other.weights:
        return "the items weigh differently: other tokens. bits_per_byte can be compared"
    return ""


def _keys(measured: Measurement, contents: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, int], int]:
    """(what an item says, how often that stood before) -> its place."""
    digests, seen = _of_task(measured.task, contents), Counter[str]()
    places: dict[tuple[str, int], int] = {}
    for place, item in enumerate(measured.ids):
        said = digests.get(item, item)
        places[said, seen[said]] = place
        seen[said] += 1
    return places


def _of_task(task: str, contents: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    """The digests of a task's items; those of several stages have the name of the stage before them."""
    if task == GENERAL:
        return contents.get(RETENTION, {})
    of_test = [role for role in contents if role.endswith("test_data") and task.startswith(role[: -len("test_data")])]
    return contents[max(of_test, key=len)] if of_test else {}


def only(measured: Measurement, places: Sequence[int]) -> Measurement:
    """The items at these places, in this order."""
    ids, values, weights, groups = (
        tuple(found[place] for place in places) if found else ()
        for found in (measured.ids, measured.values, measured.weights, measured.groups)
    )
    return replace(measured, ids=ids, values=values, weights=weights, groups=groups)
