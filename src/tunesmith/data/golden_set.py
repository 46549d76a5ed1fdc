"""Reviewed rows under lock: a set to measure with, which nothing trains on.

    rows with `review: {"reviewer", "date", "verdict"}` -> lock -> FILE.lock.json beside the file
    data sets by role -> refuse_golden

A lock holds the sha256 of the file, who reviewed how much, and a digest of every row. A file that has one is never
trained on; nor is a row of it, in whatever file: locks are looked for in the folders of all files of a recipe. A file
that has changed since is not measured with. Left out: what the verdicts are used for.
"""

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
from tunesmith.core.json_io import from_json, json_bytes, read_json
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.row_formats import REVIEW

SUFFIX = ".lock.json"
VERDICTS = ("good", "bad", "unsure")
SHOWN = 5


@dataclass(frozen=True)
class Golden:
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


def lock_of(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def lock(dataset: Dataset) -> Golden:
    """Write the lock of a file. Raises InputError for a row without a whole review, rows that cannot be used, several
    files, and a lock that is there already."""
    if len(dataset.parts) != 1:
        raise InputError("several files", where=dataset.path, fix="lock each file by itself")
    if dataset.rejects.counts.total():
        raise InputError(f"rows cannot be used: {dataset.rejects.summary()}", where=dataset.path, fix="correct them")
    (part,) = dataset.parts
    path = part.source.path
    if lock_of(path).exists():
        fix = "remove it if the reviews are to be made again"
        raise InputError("the file is locked already", where=str(lock_of(path)), fix=fix)
    reviews = [_review(dataset, row) for row in range(len(dataset))]
    dates = sorted(review["date"] for review in reviews)
    golden = Golden(
        file=path.name,
        sha256=dataset.fingerprint,
        rows=len(dataset),
        reviewers=dict(Counter(review["reviewer"] for review in reviews)),
        verdicts=dict(Counter(review["verdict"] for review in reviews)),
        first_date=dates[0],
        last_date=dates[-1],
        contents=tuple(f"{content:016x}" for content in dataset.contents_N.tolist()),
    )
    write_file(lock_of(path), json_bytes(golden, indent=1))
    return golden


def _review(dataset: Dataset, row: int) -> dict[str, str]:
    review: Any = dataset.row(row).data.get(REVIEW)
    fix = f'write "{REVIEW}": {{"reviewer": "ada", "date": "2026-11-25", "verdict": "{" | ".join(VERDICTS)}"}}'
    if not isinstance(review, dict):
        raise InputError(f"the row has no `{REVIEW}`", where=dataset.id(row), fix=fix)
    reviewer, when, verdict = (str(review.get(key, "")) for key in ("reviewer", "date", "verdict"))
    if not reviewer.strip():
        raise InputError("the review names no reviewer", where=dataset.id(row), fix=fix)
    if verdict not in VERDICTS:
        raise InputError(f"the verdict is {verdict!r:.40}", where=dataset.id(row), fix=fix)
    try:
        date.fromisoformat(when)
    except ValueError:
        raise InputError(f"the date of the review is {when!r:.40}", where=dataset.id(row), fix=fix) from None
    return {"reviewer": reviewer, "date": when, "verdict": verdict}


# ---------------------------------------------------------------- what a lock forbids


def refuse_golden(datasets: Mapping[str, Dataset], trained: tuple[str, ...]) -> None:
    """`trained`: the roles that train. Raises InputError for a locked file or row among them, and for a held-out file
    that is not as it was locked."""
    locks = dict(_locks(datasets))
    for role, dataset in datasets.items():
        for part in dataset.parts:
            golden = locks.get(lock_of(part.source.path))
            if golden is None:
                continue
            where = f"{role}: {part.source.path}"
            if role in trained:
                fix = "train on other rows, or remove the lock if it is no set to measure with"
                what = f"the file is locked: {golden.rows:,} reviewed rows to measure with"
                raise InputError(what, where=where, fix=fix)
            if part.source.fingerprint != golden.sha256:
                changed = f"sha256 {golden.sha256[:12]} -> {part.source.fingerprint[:12]}"
                what = f"the file has changed since it was locked ({changed})"
                raise InputError(what, where=where, fix="put it back, or review and lock it again")
    for role in trained:
        if role in datasets:
            _refuse_rows(role, datasets[role], locks.values())


def _locks(datasets: Mapping[str, Dataset]) -> Iterator[tuple[Path, Golden]]:
    """Those in the folders of the files."""
    folders = {part.source.path.parent for dataset in datasets.values() for part in dataset.parts}
    for folder in sorted(folders):
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                yield path, from_json(Golden, read_json(path), where=str(path))
            except InputError as error:
                fix = "put the lock back as it was, or remove it and lock the file again: tunesmith data lock"
                raise InputError(f"a lock that cannot be read: {error.what}", where=error.where, fix=fix) from error


def _refuse_rows(role: str, dataset: Dataset, locks: Iterable[Golden]) -> None:
    for golden in locks:
        rows = np.flatnonzero(np.isin(dataset.contents_N, golden.digests))
        if len(rows):
            named = ", ".join(dataset.id(row) for row in rows[:SHOWN].tolist())
            more = f", and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
            what = f"{len(rows):,} of {len(dataset):,} rows are in {golden.file}, which is locked: {named}{more}"
            fix = "take them out: what is trained cannot be measured"
            raise InputError(what, where=f"{role}: {dataset.path}", fix=fix)
