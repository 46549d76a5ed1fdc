"""Rows divided into files for training, selecting and the last measure, so that no file gives
another one away.

    Dataset -> group_rows (rows that belong together) -> assign (a side for each group) -> write_sides

Rows that say the same, ask the same, say nearly the same or share the value of a key stay on one
side. Each stratum (a label, or the value of a key) is divided by itself. Sides are a function of
the rows and the seed, not of their order. Rows are written as they stand in their file; unlike the
`eval_split` of a recipe (split.py) a division is made once, and kept."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tunesmith.core.atomic import atomic_dir
from tunesmith.core.errors import InputError
from tunesmith.data.checks.labels import build_label_map
from tunesmith.data.checks.minhash import UnionFind
from tunesmith.data.checks.text_stats import TextStats, compute_digest, compute_text_stats
from tunesmith.data.dataset import Dataset

SPLITS = ("train", "eval", "test")
JSONL_SUFFIXES = (".jsonl", ".ndjson")  # files whose rows are copied byte by byte
ROLE = "data"


@dataclass(frozen=True)
class SplitResult:
    """What was written: `path` holds train.jsonl and the others that got a share, and a manifest
    with their hashes."""

    path: str
    rows: dict[str, int]  # side -> rows
    groups: dict[str, int]  # side -> groups of rows that belong together
    strata: dict[str, dict[str, int]] = field(
        default_factory=dict[str, dict[str, int]]
    )  # stratum -> side -> rows
    has_near_check: bool = True  # near duplicates were looked for
    skipped_rows: int = 0  # rows that cannot be used, or break a constraint


def split_by_group(
    dataset: Dataset,
    path: Path,
    *,
    eval_share: float,
    test_share: float,
    group: str | None = None,
    stratify: str | None = None,
    seed: int = 0,
) -> SplitResult:
    """Raises InputError for shares that leave nothing to train, a folder that is there already, a
    key that rows lack, and too few groups for the sides."""
    shares = {
        "train": round(1 - eval_share - test_share, 9),
        "eval": eval_share,
        "test": test_share,
    }
    _check_split(dataset, path, shares)
    stats = compute_text_stats({ROLE: dataset}, {})
    group_N = group_rows(dataset, stats, group)
    strata_N = _compute_strata(dataset, stats, stratify)
    split_N = assign_splits(group_N, strata_N, dataset.contents_N, list(shares.values()), seed)
    rows = {
        split: np.flatnonzero(split_N == split_index) for split_index, split in enumerate(SPLITS)
    }
    if empty := [split for split in SPLITS if shares[split] and not len(rows[split])]:
        message = f"{len(np.unique(group_N)):,} groups of rows that belong together are too few: {empty[0]} gets none"
        raise InputError(
            message,
            where=dataset.path,
            fix="give more rows, other shares, or another key to group by",
        )
    result = SplitResult(
        path=str(path),
        rows={split: len(indices) for split, indices in rows.items() if len(indices)},
        groups={
            split: len(np.unique(group_N[indices]))
            for split, indices in rows.items()
            if len(indices)
        },
        strata=_count_strata(strata_N, split_N) if len(set(strata_N)) > 1 else {},
        has_near_check=stats.near_duplicates is not None,
        skipped_rows=dataset.rejected_rows.counts.total() + dataset.violations.counts.total(),
    )
    _write_splits(
        dataset, path, rows, {"source": dataset.fingerprint, "seed": seed, "rows": result.rows}
    )
    return result


def _check_split(dataset: Dataset, path: Path, shares: Mapping[str, float]) -> None:
    if min(shares.values()) < 0 or not 0 < shares["train"] < 1:
        message = f"{shares['eval']:g} and {shares['test']:g} of the rows leave {shares['train']:g} to train"
        raise InputError(
            message, where="data split", fix="give shares of 0 and more, below 1 together"
        )
    if path.exists():
        raise InputError(
            "it is there already",
            where=str(path),
            fix="name another folder with --to, or remove it",
        )
    if len({part.format for part in dataset.parts}) > 1:
        formats = ", ".join(f"{part.source.path}: {part.format}" for part in dataset.parts)
        raise InputError(
            f"rows of several formats: {formats}", where="data", fix="divide each file by itself"
        )


def group_rows(dataset: Dataset, stats: TextStats, key: str | None) -> np.ndarray:
    """int64 [N]: the first row of those that a row belongs to."""
    groups = UnionFind(len(dataset))
    groups.union_equal(dataset.contents_N)
    groups.union_equal(dataset.prompts_N)
    for row, _, first in stats.near_duplicates.iter_matches(ROLE) if stats.near_duplicates else ():
        groups.union(first, row)
    if key is not None:
        groups.union_equal(
            np.array(
                [compute_digest(value) for value in _iter_values(dataset, key)], dtype=np.uint64
            )
        )
    return groups.find_roots()


def _iter_values(dataset: Dataset, key: str) -> Iterator[str]:
    """The value of a key in every row, as text."""
    for index in range(len(dataset)):
        row = dataset.get_part(index).source.read_row(dataset.row_N[index])
        if key not in row.data:
            row_keys = ", ".join(f"`{name}`" for name in row.data)
            raise InputError(
                f"the row has no key `{key}`",
                where=row.id,
                fix=f"name a key of every row; it has {row_keys}",
            )
        yield json.dumps(row.data[key], sort_keys=True, ensure_ascii=False)


def _compute_strata(dataset: Dataset, stats: TextStats, key: str | None) -> list[str]:
    """What a row counts with: the value of the key, or its label, where answers are labels."""
    if key is not None:
        return [value.strip('"') for value in _iter_values(dataset, key)]
    label_names = build_label_map(dataset, stats.roles[ROLE])
    return (
        [label_names.get(int(answer), "") for answer in stats.roles[ROLE].answer_digests_N]
        if label_names
        else [""] * len(dataset)
    )


def assign_splits(
    group_N: np.ndarray,
    strata_N: Sequence[str],
    contents_N: np.ndarray,
    shares: Sequence[float],
    seed: int,
) -> np.ndarray:
    """int8 [N], the side of each row. Groups go one after the other, large ones first and else by a
    hash, to the side that lacks most of its share of the group's stratum."""
    members: dict[int, list[int]] = defaultdict(list)
    for row, first in enumerate(group_N.tolist()):
        members[first].append(row)
    groups = sorted(
        members.values(),
        key=lambda rows: (-len(rows), _hash_content(min(contents_N[rows].tolist()), seed)),
    )
    totals = Counter(strata_N)
    assigned: dict[str, list[int]] = {stratum: [0] * len(shares) for stratum in totals}
    split_N = np.zeros(len(group_N), dtype=np.int8)
    for rows in groups:
        stratum = Counter(strata_N[row] for row in rows).most_common(1)[0][0]
        deficits = [
            share * totals[stratum] - count
            for share, count in zip(shares, assigned[stratum], strict=True)
        ]
        # The larger share first where nothing was given yet, so that small strata are trained on.
        split_index = max(range(len(shares)), key=lambda index: (deficits[index], shares[index]))
        for row in rows:
            assigned[strata_N[row]][split_index] += 1
        split_N[rows] = split_index
    return split_N


def _hash_content(content: int, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{content}".encode(), digest_size=8).digest()


def _count_strata(strata_N: Sequence[str], split_N: np.ndarray) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(SPLITS, 0))
    for stratum, split_index in zip(strata_N, split_N.tolist(), strict=True):
        counts[stratum][SPLITS[split_index]] += 1
    return dict(sorted(counts.items(), key=lambda item: -sum(item[1].values())))


def _write_splits(
    dataset: Dataset, path: Path, rows: Mapping[str, np.ndarray], manifest: dict[str, object]
) -> None:
    with atomic_dir(path, metadata=manifest, key="--to") as folder:
        for split, indices in rows.items():
            if len(indices):
                with (folder / f"{split}.jsonl").open("wb") as file:
                    file.writelines(encode_row(dataset, int(index)) for index in indices)


def encode_row(dataset: Dataset, index: int) -> bytes:
    """A row as one line of JSON: the bytes of its file where that holds such lines."""
    source, row = dataset.get_part(index).source, dataset.row_N[index]
    if source.path.suffix.lower() in JSONL_SUFFIXES:
        return source.read_raw(row, dataset.get_row_bytes(index))[0].strip() + b"\n"
    return (
        json.dumps(source.read_row(row).data, ensure_ascii=False).encode(errors="backslashreplace")
        + b"\n"
    )
