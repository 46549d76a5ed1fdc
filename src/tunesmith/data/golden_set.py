"""Reviewed rows under lock: a set to measure with, which nothing trains on.

    rows with `review: {"reviewer", "date", "verdict"}` -> lock -> FILE.lock.json beside the file
    data sets by role -> refuse_golden

A lock holds the sha256 of the file, who reviewed how much, and a digest of every row. A file that
has one is never trained on; nor is a row of it, in whatever file: locks are looked for in the
folders of all files of a recipe. A file that has changed since is not measured with. Left out: what
the verdicts are used for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.row_formats import REVIEW_KEY

LOCK_SUFFIX = ".lock.json"
VERDICTS = ("good", "bad", "unsure")
MAX_SHOWN_IDS = 5


@dataclass(frozen=True)
class GoldenLock:
    """What a lock holds."""

    file: str
    sha256: str
    rows: int
    reviewers: dict[str, int]  # name -> rows
    verdicts: dict[str, int]
    first_date: str
    last_date: str
    contents: tuple[str, ...]  # hexadecimal digests of the rows

    @property
    def digests(self) -> np.ndarray:
        return np.array([int(content, 16) for content in self.contents], dtype=np.uint64)


def get_lock_path(path: Path) -> Path:
    return path.with_name(path.name + LOCK_SUFFIX)


def write_lock(dataset: Dataset) -> GoldenLock:
    """Write the lock of a file. Raises InputError for a row without a whole review, rows that
    cannot be used, several files, and a lock that is there already."""
    if len(dataset.parts) != 1:
        raise InputError("several files", where=dataset.path, fix="lock each file by itself")
    if dataset.rejected_rows.counts.total():
        raise InputError(
            f"rows cannot be used: {dataset.rejected_rows.summarize()}",
            where=dataset.path,
            fix="correct them",
        )
    (part,) = dataset.parts
    path = part.source.path
    if get_lock_path(path).exists():
        fix = "remove it if the reviews are to be made again"
        raise InputError("the file is locked already", where=str(get_lock_path(path)), fix=fix)
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
        contents=tuple(f"{content:016x}" for content in dataset.contents_N.tolist()),
    )
    write_file(get_lock_path(path), dump_json(golden_lock, indent=1))
    return golden_lock


def _read_review(dataset: Dataset, row: int) -> dict[str, str]:
    review: Any = dataset.read_row(row).data.get(REVIEW_KEY)
    fix = f'write "{REVIEW_KEY}": {{"reviewer": "ada", "date": "2026-11-25", "verdict": "{" | ".join(VERDICTS)}"}}'
    if not isinstance(review, dict):
        raise InputError(f"the row has no `{REVIEW_KEY}`", where=dataset.get_id(row), fix=fix)
    reviewer, review_date, verdict = (
        str(review.get(key, "")) for key in ("reviewer", "date", "verdict")
    )
    if not reviewer.strip():
        raise InputError("the review names no reviewer", where=dataset.get_id(row), fix=fix)
    if verdict not in VERDICTS:
        raise InputError(f"the verdict is {verdict!r:.40}", where=dataset.get_id(row), fix=fix)
    try:
        date.fromisoformat(review_date)
    except ValueError:
        raise InputError(
            f"the date of the review is {review_date!r:.40}", where=dataset.get_id(row), fix=fix
        ) from None
    return {"reviewer": reviewer, "date": review_date, "verdict": verdict}


# ---------------------------------------------------------------- what a lock forbids


def refuse_locked_rows(datasets: Mapping[str, Dataset], trained_roles: tuple[str, ...]) -> None:
    """`trained`: the roles that train. Raises InputError for a locked file or row among them, and
    for a held-out file that is not as it was locked."""
    locks = dict(_iter_locks(datasets))
    for role, dataset in datasets.items():
        for part in dataset.parts:
            golden_lock = locks.get(get_lock_path(part.source.path))
            if golden_lock is None:
                continue
            where = f"{role}: {part.source.path}"
            if role in trained_roles:
                fix = "train on other rows, or remove the lock if it is no set to measure with"
                message = f"the file is locked: {golden_lock.rows:,} reviewed rows to measure with"
                raise InputError(message, where=where, fix=fix)
            if part.source.fingerprint != golden_lock.sha256:
                changed = f"sha256 {golden_lock.sha256[:12]} -> {part.source.fingerprint[:12]}"
                message = f"the file has changed since it was locked ({changed})"
                raise InputError(
                    message, where=where, fix="put it back, or review and lock it again"
                )
    for role in trained_roles:
        if role in datasets:
            _refuse_shared_rows(role, datasets[role], locks.values())


def _iter_locks(datasets: Mapping[str, Dataset]) -> Iterator[tuple[Path, GoldenLock]]:
    """Those in the folders of the files."""
    folders = {part.source.path.parent for dataset in datasets.values() for part in dataset.parts}
    for folder in sorted(folders):
        for path in sorted(folder.glob(f"*{LOCK_SUFFIX}")):
            try:
                yield path, parse_as(GoldenLock, read_json(path), where=str(path))
            except InputError as error:
                fix = "put the lock back as it was, or remove it and lock the file again: tunesmith data lock"
                raise InputError(
                    f"a lock that cannot be read: {error.message}", where=error.where, fix=fix
                ) from error


def _refuse_shared_rows(role: str, dataset: Dataset, locks: Iterable[GoldenLock]) -> None:
    for golden_lock in locks:
        rows = np.flatnonzero(np.isin(dataset.contents_N, golden_lock.digests))
        if len(rows):
            row_ids = ", ".join(dataset.get_id(row) for row in rows[:MAX_SHOWN_IDS].tolist())
            more = f", and {len(rows) - MAX_SHOWN_IDS:,} more" if len(rows) > MAX_SHOWN_IDS else ""
            message = f"{len(rows):,} of {len(dataset):,} rows are in {golden_lock.file}, which is locked: {row_ids}{more}"
            fix = "take them out: what is trained cannot be measured"
            raise InputError(message, where=f"{role}: {dataset.path}", fix=fix)
