"""What is only evaluated: golden sets with reviews, and rows that must not be trained.

    rows with `review: {"reviewer", "date", "verdict"}` -> write_lock -> FILE.lock.json
    data sets by role -> refuse_locked_rows, refuse_test_leakage, ...

A lock has the sha256 of the file, the number of rows per reviewer, and a digest of every row. A
locked file is never trained on, nor is any of its rows in another file: locks are searched in the
folders of all files of a recipe. A file that has changed since is not used for evaluation. Other
rows that are both trained and evaluated are refused by digests that ignore white space: rehearsal
rows that are held out elsewhere, rows of a held-out task that train under another name, and rows of
test_data that train. Left out: how reviews are written (reviews.py), and partial copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.hub_names import is_cached_file
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.parse import REVIEW_KEY
from tunesmith.data.readers.invalid_row import Reason

LOCK_SUFFIX = ".lock.json"
VERDICTS = ("good", "bad", "unsure")
EXCLUDED_REASONS: frozenset[Reason] = frozenset({"bad verdict", "unsettled verdict"})
MAX_SHOWN_IDS = 5


@dataclass(frozen=True)
class GoldenLock:
    """The content of a lock file."""

    file: str
    sha256: str
    rows: int
    reviewers: dict[str, int]  # name -> rows
    verdicts: dict[str, int]
    first_date: str
    last_date: str
    contents: tuple[str, ...]  # hexadecimal digests of the rows
    excluded_rows: dict[str, int] = field(default_factory=dict)  # other rows of the file, by reason

    @property
    def digests(self) -> np.ndarray:
        """The digests of the rows, uint64."""
        return np.array([int(content, 16) for content in self.contents], dtype=np.uint64)


def get_lock_path(path: Path) -> Path:
    """Return the path of the lock of a file."""
    return path.with_name(path.name + LOCK_SUFFIX)


def write_lock(dataset: Dataset) -> GoldenLock:
    """Write the lock of the rows of a file that were found good; the others are counted.

    Raises InputError for a row without a complete review, invalid rows, several files, a file of
    the hub, and an existing lock."""
    if len(dataset.parts) != 1:
        fix = "lock each file separately"
        raise InputError("cannot lock several files", where=dataset.path, fix=fix)
    counts = dataset.rejected_rows.counts
    if counts.keys() - EXCLUDED_REASONS:
        message = f"rows cannot be used: {dataset.rejected_rows.summarize()}"
        raise InputError(message, where=dataset.path, fix="correct them")
    path = dataset.parts[0].source.path
    if is_cached_file(path):
        message = "a data set of the hub cannot be locked: its file is in the hub's cache"
        raise InputError(message, where=dataset.path, fix="copy its rows into a file of yours")
    lock_path = get_lock_path(path)
    if lock_path.exists():
        fix = "remove the lock to review the rows again"
        raise InputError("the file is already locked", where=str(lock_path), fix=fix)
    reviews = [_read_review(dataset, row) for row in range(len(dataset))]
    dates = sorted(review["date"] for review in reviews)
    golden_lock = GoldenLock(
        file=path.name,
        sha256=dataset.fingerprint,
        rows=len(dataset),
        reviewers=dict(Counter(review["reviewer"] for review in reviews)),
        verdicts=dict(Counter(review["verdict"] for review in reviews)),
        first_date=dates[0],
        last_date=dates[-1],
        excluded_rows={str(reason): count for reason, count in counts.items()},
        contents=tuple(f"{content:016x}" for content in dataset.contents_N.tolist()),
    )
    write_file(lock_path, dump_json(golden_lock, indent=1))
    return golden_lock


def _read_review(dataset: Dataset, row: int) -> dict[str, str]:
    review: Any = dataset.read_row(row).data.get(REVIEW_KEY)
    where = dataset.get_id(row)
    fix = (
        f'add "{REVIEW_KEY}": {{"reviewer": "ada", "date": "2026-11-25", '
        f'"verdict": "{" | ".join(VERDICTS)}"}}'
    )
    if not isinstance(review, dict):
        raise InputError(f"the row has no `{REVIEW_KEY}`", where=where, fix=fix)
    reviewer = str(review.get("reviewer", ""))
    review_date = str(review.get("date", ""))
    verdict = str(review.get("verdict", ""))
    if not reviewer.strip():
        raise InputError("the review has no reviewer", where=where, fix=fix)
    if verdict not in VERDICTS:
        raise InputError(f"unknown verdict {verdict!r:.40}", where=where, fix=fix)
    try:
        date.fromisoformat(review_date)
    except ValueError:
        message = f"the date of the review is {review_date!r:.40}"
        raise InputError(message, where=where, fix=fix) from None
    return {"reviewer": reviewer, "date": review_date, "verdict": verdict}


# ---------------------------------------------------------------- enforcement


def refuse_locked_rows(datasets: Mapping[str, Dataset], trained_roles: tuple[str, ...]) -> None:
    """Raise InputError if a trained role has locked rows, or a held-out file differs from its lock.

    `datasets` has the data sets by role."""
    locks = dict(_iter_locks(datasets))
    for role, dataset in datasets.items():
        for part in dataset.parts:
            golden_lock = locks.get(get_lock_path(part.source.path))
            if golden_lock is None:
                continue
            where = f"{role}: {part.source.path}"
            if role in trained_roles:
                message = f"the file is locked: its {golden_lock.rows:,} rows are for evaluation"
                fix = "train on other rows, or remove the lock if this is not an evaluation set"
                raise InputError(message, where=where, fix=fix)
            if part.source.fingerprint != golden_lock.sha256:
                change = f"sha256 {golden_lock.sha256[:12]} -> {part.source.fingerprint[:12]}"
                message = f"the file has changed since it was locked ({change})"
                fix = "restore it, or review and lock it again"
                raise InputError(message, where=where, fix=fix)
    for role in trained_roles:
        if role in datasets:
            _refuse_shared_rows(role, datasets[role], locks.values())


def _iter_locks(datasets: Mapping[str, Dataset]) -> Iterator[tuple[Path, GoldenLock]]:
    """Yield (path, lock) of every lock in the folders of the files."""
    folders = {part.source.path.parent for dataset in datasets.values() for part in dataset.parts}
    for folder in sorted(folders):
        for path in sorted(folder.glob(f"*{LOCK_SUFFIX}")):
            try:
                yield path, parse_as(GoldenLock, read_json(path), where=str(path))
            except InputError as error:
                message = f"the lock cannot be read: {error.message}"
                fix = "restore the lock, or remove it and run `tunesmith data lock` again"
                raise InputError(message, where=error.where, fix=fix) from error


def _refuse_shared_rows(role: str, dataset: Dataset, locks: Iterable[GoldenLock]) -> None:
    for golden_lock in locks:
        rows = np.flatnonzero(np.isin(dataset.contents_N, golden_lock.digests)).tolist()
        if not rows:
            continue
        row_ids = [dataset.get_id(row) for row in rows[:MAX_SHOWN_IDS]]
        if len(rows) > MAX_SHOWN_IDS:
            row_ids.append(f"and {len(rows) - MAX_SHOWN_IDS:,} more")
        verb = "is" if len(rows) == 1 else "are"
        message = (
            f"{len(rows):,} of {len(dataset):,} rows {verb} in the locked {golden_lock.file}: "
            f"{', '.join(row_ids)}"
        )
        fix = "remove them: an evaluation on trained rows measures memorization"
        raise InputError(message, where=f"{role}: {dataset.path}", fix=fix)


# ---------------------------------------------------------------- leakage

MAX_SHOWN_PAIRS = 5


def refuse_rehearsal_leakage(rehearsal: Dataset, held_out: Mapping[str, Dataset]) -> None:
    """Raise InputError if rehearsal rows are also in a held-out role."""
    for role, dataset in held_out.items():
        if overlap := _describe_overlap(rehearsal, dataset, role):
            fix = f"remove them from the rehearsal file, so that {role} stays held-out"
            raise InputError(overlap, where=f"rehearsal: {rehearsal.path}", fix=fix)


def refuse_task_leakage(data: Dataset, held_out: Mapping[str, Dataset]) -> None:
    """Raise InputError if rows of a task that is not trained are also in the training data."""
    for role, dataset in held_out.items():
        for part_index, part in enumerate(dataset.parts):
            if not part.task or part.task in data.tasks:
                continue
            task_rows = dataset.select_rows(np.flatnonzero(dataset.part_N == part_index))
            if overlap := _describe_overlap(task_rows, data, "data", f"held-out '{part.task}' "):
                fix = "remove them from one side, or use the name of the task that trains them"
                raise InputError(overlap, where=f"{role}: {part.source.path}", fix=fix)


def refuse_test_leakage(datasets: Mapping[str, Dataset], role: str = "test_data") -> None:
    """Raise InputError if rows of test_data are also in the training data.

    Rows of eval_data only select in a run, where the data check reports them."""
    test = datasets.get(role)
    if test is not None and (overlap := _describe_overlap(test, datasets["data"], "data")):
        fix = "remove them from one side; `tunesmith data split` writes files without shared rows"
        raise InputError(overlap, where=f"{role}: {test.path}", fix=fix)


def _describe_overlap(dataset: Dataset, other: Dataset, other_role: str, kind: str = "") -> str:
    """Return how many rows are also in the other data set, and which; "" if none."""
    shared_K = np.flatnonzero(np.isin(dataset.contents_N, other.contents_N)).tolist()
    if not shared_K:
        return ""
    index_by_content = {content: i for i, content in enumerate(other.contents_N.tolist())}
    pairs: list[str] = []
    for i in shared_K[:MAX_SHOWN_PAIRS]:
        other_index = index_by_content[int(dataset.contents_N[i])]
        pairs.append(f"{dataset.get_id(i)} is {other.get_id(other_index)}")
    if len(shared_K) > MAX_SHOWN_PAIRS:
        pairs.append(f"and {len(shared_K) - MAX_SHOWN_PAIRS:,} more")
    verb = "is" if len(shared_K) == 1 else "are"
    return (
        f"{len(shared_K):,} of {len(dataset):,} {kind}rows {verb} also in {other_role}: "
        f"{', '.join(pairs)}"
    )
