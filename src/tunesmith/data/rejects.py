"""The rows that cannot be used, or break a constraint, written down to be corrected; and when they stop a run.

    data sets by role -> rejected.jsonl: {"where", "id", "reason", "what", "fix", "bytes", "row"} a line

Only the places of bad rows are remembered; each is read again here, and its own reader says again what is wrong with
it, so any number of them takes no memory. `row` is its text, cut after `MOST_SHOWN` bytes (`bytes` is its length), with
bytes that are not UTF-8 spelled out.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from tunesmith.core.atomic import TEMPORARY, disk_errors
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import json_bytes
from tunesmith.core.types import DataReport, Json
from tunesmith.data.dataset import NOT_RENDERED, Dataset, Part
from tunesmith.data.length_stats import rare_rows, scanned_rows
from tunesmith.data.readers.invalid_row import SHOWN, BadRow, Rejects

MOST_SHOWN = 4096
MOST_LOST = 0.20  # of the training rows
KEYS = ("where", "id", "reason", "what", "fix", "bytes", "row")  # of a line
MOST_LINE = 2**20  # bytes of one


def refuse_bad_rows(
    datasets: Mapping[str, Dataset], reports: Mapping[str, DataReport], path: Path | None, *, skip_bad: bool
) -> None:
    """Raises InputError if no row trains anything; and, unless `skip_bad`, if rows cannot be used, written to `path`
    first, or if many training rows lose all that is trained. `reports`: what the data check said of the data sets."""
    training = reports["data"]
    skippable = training.documents > 0
    rejected: Counter[str] = Counter()
    for report in reports.values():
        rejected.update(report.rejected)
    if rejected and not (skip_bad and skippable):
        first = write_rejected(path if skippable else None, datasets, reports)[: rejected.total()]
        rows = sum(len(dataset) + dataset.rejects.counts.total() for dataset in datasets.values())
        what = f"{rejected.total():,} of {rows:,} rows cannot be used: {_counted(rejected)}"
        what += "".join(f"\n  {line['where']}: {line['what']}" for line in first)
        left = rejected.total() - len(first)
        what += f"\n  and {left:,} more" if left > 0 else ""
        written = f" (all of them are in {path})" if path and skippable else ""
        fix = f"correct them{written}" + (", or leave them out with --skip-bad" if skippable else "")
        raise InputError(what, where="data", fix=fix)
    lost = sum(training.dropped.values())
    if not skippable or (loses_most(training) and not skip_bad):
        what = f"{lost:,} of {training.rows:,} rows would train nothing: {_counted(training.dropped)}"
        fix = "raise max_length" + (", or go on without them with --skip-bad" if skippable else "")
        raise InputError(what, where=f"data: {training.path}", fix=fix)


def loses_most(report: DataReport) -> bool:
    """So many rows train nothing that a run stops."""
    return sum(report.dropped.values()) > MOST_LOST * report.rows


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1]))


def refuse_others_file(path: Path) -> None:
    """Raises InputError if there is a file that was not written here: it would be lost."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            first: Any = json.loads(file.readline(MOST_LINE))
        ours = isinstance(first, dict) and tuple(cast("Json", first)) == KEYS
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise InputError("it is there already, and holds no rejected rows", where=str(path), fix="name a new file")


def write_rejected(
    path: Path | None, datasets: Mapping[str, Dataset], reports: Mapping[str, DataReport]
) -> tuple[Json, ...]:
    """Write the bad rows of all roles, then those that break a constraint, into a new file, which takes the place of an
    older one; without any there is none. Returns the first ones."""
    lines = chain.from_iterable(
        rejected_rows(dataset, rendered=NOT_RENDERED in reports[role].rejected) for role, dataset in datasets.items()
    )
    lines = chain(lines, *(_again(dataset, dataset.violations) for dataset in datasets.values()))
    first = tuple(islice(lines, SHOWN))
    if path is None:
        return first
    with disk_errors(path):
        if not first:
            path.unlink(missing_ok=True)
            return first
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        with temporary.open("wb") as file:
            file.writelines(json_bytes(line) for line in chain(first, lines))
        os.replace(temporary, path)
    return first


def rejected_rows(dataset: Dataset, *, rendered: bool) -> Iterator[Json]:
    """The bad rows of a data set. `rendered`: among those that a scan looks at, rows that cannot be rendered, too."""
    yield from _again(dataset, dataset.rejects)
    scanned_R = scanned_rows(dataset)
    for index in [*scanned_R.tolist(), *rare_rows(dataset, scanned_R).tolist()] if rendered else ():
        if problem := dataset.limited(None, "drop").prepare(index).problem:
            yield _line(dataset.part(index), int(dataset.row_N[index]), problem)


def _again(dataset: Dataset, rejects: Rejects) -> Iterator[Json]:
    for number, row in rejects.places():
        part = dataset.parts[number]
        try:
            part.example(row, dataset.renderer.has_template)
        except BadRow as problem:
            yield _line(part, row, problem)


def _line(part: Part, row: int, problem: BadRow) -> Json:
    raw, length = part.source.raw(row, MOST_SHOWN)
    name = part.source.id(row)
    where = str(part.source.spot(row)) if problem.where == name else problem.where
    text = raw.decode("utf-8", errors="backslashreplace")
    values = (where, name, problem.reason, problem.what, problem.fix, length, text)
    return dict(zip(KEYS, values, strict=True))
