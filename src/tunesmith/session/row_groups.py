"""Which held-out rows are not independent: those of one package, document or author.

In: a data set and `group` of the recipe. Out: row id -> group, which every interval and test counts
once (evaluate/results.py). With `auto` the key is that of `tunesmith data split --group`, from the
manifest beside the file; else ids that share all but a number at the end. Left out: rows that are
nearly equal, which `data check` finds.
"""

from __future__ import annotations

import re

from tunesmith.core.atomic import MANIFEST, read_manifest
from tunesmith.data.dataset import Dataset
from tunesmith.data.split import iter_values

GROUPED_ID = re.compile(r"(.*\w)[-_./:#]\d+")
MIN_GROUPS = 6  # fewer shared beginnings of ids are kinds of rows rather than groups


def map_groups(dataset: Dataset, key: str) -> dict[str, str]:
    """Return row id -> group; empty without groups. Raises InputError for a row without the key."""
    if key == "none":
        return {}
    key = _find_split_key(dataset) if key == "auto" else key
    if not key:
        return _group_by_ids(dataset)
    values = iter_values(dataset, key)
    return {dataset.get_id(row): value for row, value in enumerate(values)}


def _find_split_key(dataset: Dataset) -> str:
    """Return the key that `data split` kept together, if it made all files of the data set."""
    folders = {part.source.path.parent for part in dataset.parts}
    if len(folders) > 1 or not all((folder / MANIFEST).is_file() for folder in folders):
        return ""
    group = read_manifest(folders.pop()).get("group")
    return group if isinstance(group, str) else ""


def _group_by_ids(dataset: Dataset) -> dict[str, str]:
    """Return the groups of rows with ids such as pkg-1 and pkg-2, if enough rows have such an id;
    a row with another id is a group of its own."""
    groups: dict[str, str] = {}
    prefixes: list[str] = []
    for index in range(len(dataset)):
        row = dataset.get_part(index).source.read_row(dataset.row_N[index])
        match = GROUPED_ID.fullmatch(str(row.data.get("id", "")))
        if match is not None:
            prefixes.append(match[1])
        groups[dataset.get_id(index)] = dataset.get_id(index) if match is None else match[1]
    return groups if MIN_GROUPS <= len(set(prefixes)) < len(prefixes) else {}
