"""Split rows into training and held-out rows so that no near copy of a row is on the other side.

    Dataset -> split_by_hash -> (rest, held-out), for `eval_split` of a recipe
    Dataset -> split_by_group -> train.jsonl, eval.jsonl, test.jsonl, for `tunesmith data split`

`split_by_hash` looks at the group of a row or its content alone, so equal rows stay together in any
file. `split_by_group` also keeps rows together that have the same prompt, are near duplicates or
share the value of a key, and splits each stratum (a label, or the value of a key) separately. Its
result depends on the rows and the seed, not on their order; rows are written as in their file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tunesmith.core.atomic import atomic_dir
from tunesmith.core.errors import InputError
from tunesmith.data.checks.minhash import UnionFind
from tunesmith.data.checks.text_stats import TextStats, compute_digest, compute_text_stats
from tunesmith.data.constraints import ConstraintCounts
from tunesmith.data.dataset import Dataset
from tunesmith.data.labels import read_labels
from tunesmith.data.readers.invalid_row import RejectedRows

SPLITS = ("train", "eval", "test")
JSONL_SUFFIXES = (".jsonl", ".ndjson")  # rows of these files are copied byte by byte
ROLE = "data"


# ---------------------------------------------------------------- by hash


def is_in_split(content: str | int, fraction: float, seed: int = 0) -> bool:
    """Tell whether a text, or its digest, is in the split; true for about `fraction` of all.

    A pure function of its arguments."""
    return int.from_bytes(_hash_content(content, seed), "big") < fraction * 2**64


def split_by_hash(
    dataset: Dataset, fraction: float, seed: int = 0, groups: Mapping[str, str] | None = None
) -> tuple[Dataset, Dataset]:
    """Return (the rest, about `fraction` of the rows), in the order of the file. `groups`: id ->
    group, which is kept on one side. Raises InputError if either is empty."""
    if not 0 < fraction < 1:
        message = f"a split of {fraction} leaves one side empty"
        raise InputError(message, fix="use a fraction between 0 and 1")
    contents: list[str | int] = dataset.contents_N.tolist()
    if groups:
        contents = [groups.get(dataset.get_id(row), each) for row, each in enumerate(contents)]
    held_out_N = np.array([is_in_split(each, fraction, seed) for each in contents], dtype=bool)
    if held_out_N.all() or not held_out_N.any():
        plural = "s" * (len(dataset) != 1)
        message = f"a split of {fraction} leaves one side of {len(dataset)} row{plural} empty"
        fix = "use a separate file, or more (different) rows"
        raise InputError(message, where=dataset.path, fix=fix)
    rest = dataset.select_rows(np.flatnonzero(~held_out_N))
    held_out = dataclasses.replace(  # the excluded rows are reported once, with the rest
        dataset.select_rows(np.flatnonzero(held_out_N)),
        rejected_rows=RejectedRows(),
        violations=RejectedRows(),
        constraint_counts=ConstraintCounts(),
    )
    return rest, held_out


def _hash_content(content: str | int, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{content}".encode(), digest_size=8).digest()


# ---------------------------------------------------------------- by group


@dataclass(frozen=True)
class SplitResult:
    """The written split: `path` has train.jsonl, eval.jsonl, test.jsonl and a manifest."""

    path: str
    rows: dict[str, int]  # split -> rows
    groups: dict[str, int]  # split -> groups of rows that must stay together
    # Stratum -> split -> rows.
    strata: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    has_near_check: bool = True  # near duplicates were searched
    skipped_rows: int = 0  # rows that cannot be used, or break a constraint
    group: str | None = None  # the key whose equal values stay together; runs find it by themselves


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
    """Split a data set into files in the new folder `path`.

    Raises InputError for shares that leave nothing to train, an existing folder, a key that rows
    lack, and too few groups."""
    train_share = round(1 - eval_share - test_share, 9)
    shares = {"train": train_share, "eval": eval_share, "test": test_share}
    _check_split(dataset, path, shares)
    stats = compute_text_stats({ROLE: dataset}, {})
    group_N = group_rows(dataset, stats, group)
    strata_N = _compute_strata(dataset, stats, stratify)
    split_N = assign_splits(group_N, strata_N, dataset.contents_N, list(shares.values()), seed)
    rows: dict[str, np.ndarray] = {}
    for split_index, split in enumerate(SPLITS):
        rows_K = np.flatnonzero(split_N == split_index)
        if len(rows_K):
            rows[split] = rows_K
        elif shares[split]:
            num_groups = len(np.unique(group_N))
            message = f"too few groups of related rows ({num_groups:,}): {split} gets none"
            fix = "add rows, change the shares, or group by another key"
            raise InputError(message, where=dataset.path, fix=fix)
    result = SplitResult(
        path=str(path),
        rows={split: len(rows_K) for split, rows_K in rows.items()},
        groups={split: len(np.unique(group_N[rows_K])) for split, rows_K in rows.items()},
        group=group,
        strata=_count_strata(strata_N, split_N) if len(set(strata_N)) > 1 else {},
        has_near_check=stats.near_duplicates is not None,
        skipped_rows=dataset.rejected_rows.counts.total() + dataset.violations.counts.total(),
    )
    manifest = {"source": dataset.fingerprint, "seed": seed, "rows": result.rows, "group": group}
    with atomic_dir(path, metadata=manifest, key="--to") as folder:
        for split, rows_K in rows.items():
            with (folder / f"{split}.jsonl").open("wb") as file:
                file.writelines(encode_row(dataset, index) for index in rows_K.tolist())
    return result


def _check_split(dataset: Dataset, path: Path, shares: Mapping[str, float]) -> None:
    if min(shares.values()) < 0 or not 0 < shares["train"] < 1:
        message = (
            f"{shares['eval']:g} and {shares['test']:g} of the rows leave {shares['train']:g} "
            "for training"
        )
        fix = "use shares of at least 0 with a sum below 1"
        raise InputError(message, where="data split", fix=fix)
    if path.exists():
        fix = "choose another folder with --out, or remove it"
        raise InputError("the folder already exists", where=str(path), fix=fix)
    if len({part.format for part in dataset.parts}) > 1:
        formats = ", ".join(f"{part.source.path}: {part.format}" for part in dataset.parts)
        message = f"the files have different row formats: {formats}"
        raise InputError(message, where="data", fix="split each file separately")


def group_rows(dataset: Dataset, stats: TextStats, key: str | None) -> np.ndarray:
    """Return int64 [N]: for each row, the first row of its group."""
    groups = UnionFind(len(dataset))
    groups.union_equal(dataset.contents_N)
    groups.union_equal(dataset.prompts_N)
    if stats.near_duplicates:
        for row, _, first in stats.near_duplicates.iter_matches(ROLE):
            groups.union(first, row)
    if key is not None:
        digests = [compute_digest(value) for value in iter_values(dataset, key)]
        groups.union_equal(np.array(digests, dtype=np.uint64))
    return groups.find_roots()


def iter_values(dataset: Dataset, key: str) -> Iterator[str]:
    """Yield the value of a key in every row, as JSON."""
    for index in range(len(dataset)):
        row = dataset.get_part(index).source.read_row(dataset.row_N[index])
        if key not in row.data:
            row_keys = ", ".join(f"`{name}`" for name in row.data)
            fix = f"use a key that every row has; this one has {row_keys}"
            raise InputError(f"the row has no key `{key}`", where=row.id, fix=fix)
        yield json.dumps(row.data[key], sort_keys=True, ensure_ascii=False)


def _compute_strata(dataset: Dataset, stats: TextStats, key: str | None) -> list[str]:
    """Return the stratum of each row: the value of the key, or its label if answers are labels."""
    if key is not None:
        return [value.strip('"') for value in iter_values(dataset, key)]
    labels = {compute_digest(" ".join(each.lower().split())): each for each in read_labels(dataset)}
    return [labels.get(answer, "") for answer in stats.roles[ROLE].answer_digests_N.tolist()]


def assign_splits(
    group_N: np.ndarray,
    strata_N: Sequence[str],
    contents_N: np.ndarray,
    shares: Sequence[float],
    seed: int,
) -> np.ndarray:
    """Return int8 [N], the index of the split of each row.

    Groups are assigned largest first, ties by hash, each to the split that lacks most rows of the
    group's stratum."""
    members: dict[int, list[int]] = defaultdict(list)
    for row, first in enumerate(group_N.tolist()):
        members[first].append(row)

    def get_sort_key(rows: list[int]) -> tuple[int, bytes]:
        return -len(rows), _hash_content(min(contents_N[rows].tolist()), seed)

    totals = Counter(strata_N)
    assigned: dict[str, list[int]] = {stratum: [0] * len(shares) for stratum in totals}
    split_N = np.zeros(len(group_N), dtype=np.int8)
    for rows in sorted(members.values(), key=get_sort_key):
        stratum = Counter(strata_N[row] for row in rows).most_common(1)[0][0]
        # On ties the larger share is first, so that small strata are trained on.
        priorities: list[tuple[float, float]] = []
        for share, count in zip(shares, assigned[stratum], strict=True):
            priorities.append((share * totals[stratum] - count, share))
        split_index = priorities.index(max(priorities))
        for row in rows:
            assigned[strata_N[row]][split_index] += 1
        split_N[rows] = split_index
    return split_N


def _count_strata(strata_N: Sequence[str], split_N: np.ndarray) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(SPLITS, 0))
    for stratum, split_index in zip(strata_N, split_N.tolist(), strict=True):
        counts[stratum][SPLITS[split_index]] += 1
    return dict(sorted(counts.items(), key=lambda item: -sum(item[1].values())))


def encode_row(dataset: Dataset, index: int) -> bytes:
    """Return a row as one line of JSON; rows of JSON Lines files keep their bytes."""
    source = dataset.get_part(index).source
    row = dataset.row_N[index]
    if source.path.suffix.lower() in JSONL_SUFFIXES:
        return source.read_raw(row, dataset.get_row_bytes(index))[0].strip() + b"\n"
    text = json.dumps(source.read_row(row).data, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"
