"""Rows divided into files for training, selecting and the last measure, so that no file gives another one away.

    Dataset -> group_rows (rows that belong together) -> assign (a side for each group) -> write_sides

Rows that say the same, ask the same, say nearly the same or share the value of a key stay on one side. Each stratum (a
label, or the value of a key) is divided by itself. Sides are a function of the rows and the seed, not of their order.
Rows are written as they stand in their file; unlike the `eval_split` of a recipe (split.py) a division is made once,
and kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tunesmith.core.atomic import new_folder
from tunesmith.core.errors import InputError
from tunesmith.data.checks.labels import labels_in
from tunesmith.data.checks.minhash import Sets
from tunesmith.data.checks.text_stats import Reading, digest, read_all
from tunesmith.data.dataset import Dataset

SIDES = ("train", "eval", "test")
LINES = (".jsonl", ".ndjson")  # files whose rows are copied byte by byte
ROLE = "data"


@dataclass(frozen=True)
class Divided:
    """What was written: `path` holds train.jsonl and the others that got a share, and a manifest with their hashes."""

    path: str
    rows: dict[str, int]  # side -> rows
    groups: dict[str, int]  # side -> groups of rows that belong together
    strata: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])  # stratum -> side -> rows
    near: bool = True  # near duplicates were looked for
    left_out: int = 0  # rows that cannot be used, or break a constraint


def divide(
    dataset: Dataset,
    path: Path,
    *,
    eval_share: float,
    test_share: float,
    group: str | None = None,
    stratify: str | None = None,
    seed: int = 0,
) -> Divided:
    """Raises InputError for shares that leave nothing to train, a folder that is there already, a key that rows lack,
    and too few groups for the sides."""
    shares = {"train": round(1 - eval_share - test_share, 9), "eval": eval_share, "test": test_share}
    _check(dataset, path, shares)
    reading = read_all({ROLE: dataset}, {})
    first_N = group_rows(dataset, reading, group)
    strata_N = _strata(dataset, reading, stratify)
    side_N = assign(first_N, strata_N, dataset.contents_N, list(shares.values()), seed)
    rows = {side: np.flatnonzero(side_N == number) for number, side in enumerate(SIDES)}
    if empty := [side for side in SIDES if shares[side] and not len(rows[side])]:
        what = f"{len(np.unique(first_N)):,} groups of rows that belong together are too few: {empty[0]} gets none"
        raise InputError(what, where=dataset.path, fix="give more rows, other shares, or another key to group by")
    divided = Divided(
        path=str(path),
        rows={side: len(of) for side, of in rows.items() if len(of)},
        groups={side: len(np.unique(first_N[of])) for side, of in rows.items() if len(of)},
        strata=_counts(strata_N, side_N) if len(set(strata_N)) > 1 else {},
        near=reading.alike is not None,
        left_out=dataset.rejects.counts.total() + dataset.violations.counts.total(),
    )
    _write(dataset, path, rows, {"source": dataset.fingerprint, "seed": seed, "rows": divided.rows})
    return divided


def _check(dataset: Dataset, path: Path, shares: Mapping[str, float]) -> None:
    if min(shares.values()) < 0 or not 0 < shares["train"] < 1:
        what = f"{shares['eval']:g} and {shares['test']:g} of the rows leave {shares['train']:g} to train"
        raise InputError(what, where="data split", fix="give shares of 0 and more, below 1 together")
    if path.exists():
        raise InputError("it is there already", where=str(path), fix="name another folder with --to, or remove it")
    if len({part.format for part in dataset.parts}) > 1:
        formats = ", ".join(f"{part.source.path}: {part.format}" for part in dataset.parts)
        raise InputError(f"rows of several formats: {formats}", where="data", fix="divide each file by itself")


def group_rows(dataset: Dataset, reading: Reading, key: str | None) -> np.ndarray:
    """int64 [N]: the first row of those that a row belongs to."""
    sets = Sets(len(dataset))
    sets.join_equal(dataset.contents_N)
    sets.join_equal(dataset.prompts_N)
    for row, _, first in reading.alike.of(ROLE) if reading.alike else ():
        sets.join(first, row)
    if key is not None:
        sets.join_equal(np.array([digest(value) for value in _values(dataset, key)], dtype=np.uint64))
    return sets.firsts()


def _values(dataset: Dataset, key: str) -> Iterator[str]:
    """The value of a key in every row, as text."""
    for index in range(len(dataset)):
        row = dataset.part(index).source.row(dataset.row_N[index])
        if key not in row.data:
            have = ", ".join(f"`{name}`" for name in row.data)
            raise InputError(f"the row has no key `{key}`", where=row.id, fix=f"name a key of every row; it has {have}")
        yield json.dumps(row.data[key], sort_keys=True, ensure_ascii=False)


def _strata(dataset: Dataset, reading: Reading, key: str | None) -> list[str]:
    """What a row counts with: the value of the key, or its label, where answers are labels."""
    if key is not None:
        return [value.strip('"') for value in _values(dataset, key)]
    names = labels_in(dataset, reading.roles[ROLE])
    return [names.get(int(answer), "") for answer in reading.roles[ROLE].answers_N] if names else [""] * len(dataset)


def assign(
    first_N: np.ndarray, strata_N: Sequence[str], contents_N: np.ndarray, shares: Sequence[float], seed: int
) -> np.ndarray:
    """int8 [N], the side of each row. Groups go one after the other, large ones first and else by a hash, to the side
    that lacks most of its share of the group's stratum."""
    members: dict[int, list[int]] = defaultdict(list)
    for row, first in enumerate(first_N.tolist()):
        members[first].append(row)
    order = sorted(members.values(), key=lambda rows: (-len(rows), _drawn(min(contents_N[rows].tolist()), seed)))
    totals = Counter(strata_N)
    given: dict[str, list[int]] = {stratum: [0] * len(shares) for stratum in totals}
    side_N = np.zeros(len(first_N), dtype=np.int8)
    for rows in order:
        stratum = Counter(strata_N[row] for row in rows).most_common(1)[0][0]
        lacks = [share * totals[stratum] - have for share, have in zip(shares, given[stratum], strict=True)]
        # The larger share first where nothing was given yet, so that small strata are trained on.
        side = max(range(len(shares)), key=lambda number: (lacks[number], shares[number]))
        for row in rows:
            given[strata_N[row]][side] += 1
        side_N[rows] = side
    return side_N


def _drawn(content: int, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{content}".encode(), digest_size=8).digest()


def _counts(strata_N: Sequence[str], side_N: np.ndarray) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(SIDES, 0))
    for stratum, side in zip(strata_N, side_N.tolist(), strict=True):
        counts[stratum][SIDES[side]] += 1
    return dict(sorted(counts.items(), key=lambda item: -sum(item[1].values())))


def _write(dataset: Dataset, path: Path, rows: Mapping[str, np.ndarray], facts: dict[str, object]) -> None:
    with new_folder(path, facts=facts, key="--to") as folder:
        for side, of in rows.items():
            if len(of):
                with (folder / f"{side}.jsonl").open("wb") as file:
                    file.writelines(line_of(dataset, int(index)) for index in of)


def line_of(dataset: Dataset, index: int) -> bytes:
    """A row as one line of JSON: the bytes of its file where that holds such lines."""
    source, place = dataset.part(index).source, dataset.row_N[index]
    if source.path.suffix.lower() in LINES:
        return source.raw(place, dataset.row_bytes(index))[0].strip() + b"\n"
    return json.dumps(source.row(place).data, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
