"""The rows that cannot be used, or break a constraint, written down to be corrected; and when they
stop a run.

    data sets by role -> rejected.jsonl: {"where", "id", "reason", "what", "fix", "bytes", "row"} a line

Only the places of bad rows are remembered; each is read again here, and its own reader says again
what is wrong with it, so any number of them takes no memory. `row` is its text, cut after
`MOST_SHOWN` bytes (`bytes` is its length), with bytes that are not UTF-8 spelled out."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from tunesmith.core.atomic import TEMP_PREFIX, disk_errors
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json
from tunesmith.core.types import DataReport, Json
from tunesmith.data.dataset import NOT_RENDERED, Dataset, DataSourceReader
from tunesmith.data.length_stats import find_rare_rows, select_scan_rows
from tunesmith.data.readers.invalid_row import MAX_SHOWN_ROWS, InvalidRow, RejectedRows

MAX_RAW_BYTES = 4096
MAX_DROPPED_SHARE = 0.20  # of the training rows
LINE_KEYS = ("where", "id", "reason", "what", "fix", "bytes", "row")  # of a line
MAX_LINE_BYTES = 2**20  # bytes of one


def refuse_invalid_rows(
    datasets: Mapping[str, Dataset],
    reports: Mapping[str, DataReport],
    path: Path | None,
    *,
    should_skip_invalid: bool,
) -> None:
    """Raises InputError if no row trains anything; and, unless `skip_bad`, if rows cannot be used,
    written to `path` first, or if many training rows lose all that is trained. `reports`: what the
    data check said of the data sets."""
    training_report = reports["data"]
    can_skip = training_report.documents > 0
    rejected: Counter[str] = Counter()
    for report in reports.values():
        rejected.update(report.rejected)
    if rejected and not (should_skip_invalid and can_skip):
        first_lines = write_rejected_rows(path if can_skip else None, datasets, reports)[
            : rejected.total()
        ]
        rows = sum(
            len(dataset) + dataset.rejected_rows.counts.total() for dataset in datasets.values()
        )
        message = (
            f"{rejected.total():,} of {rows:,} rows cannot be used: {_format_counts(rejected)}"
        )
        message += "".join(f"\n  {line['where']}: {line['what']}" for line in first_lines)
        remaining = rejected.total() - len(first_lines)
        message += f"\n  and {remaining:,} more" if remaining > 0 else ""
        file_note = f" (all of them are in {path})" if path and can_skip else ""
        fix = f"correct them{file_note}" + (
            ", or leave them out with --skip-bad" if can_skip else ""
        )
        raise InputError(message, where="data", fix=fix)
    num_dropped = sum(training_report.dropped.values())
    if not can_skip or (has_many_dropped(training_report) and not should_skip_invalid):
        message = f"{num_dropped:,} of {training_report.rows:,} rows would train nothing: {_format_counts(training_report.dropped)}"
        fix = "raise max_length" + (", or go on without them with --skip-bad" if can_skip else "")
        raise InputError(message, where=f"data: {training_report.path}", fix=fix)


def has_many_dropped(report: DataReport) -> bool:
    """So many rows train nothing that a run stops."""
    return sum(report.dropped.values()) > MAX_DROPPED_SHARE * report.rows


def _format_counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(
        f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])
    )


def refuse_foreign_file(path: Path) -> None:
    """Raises InputError if there is a file that was not written here: it would be lost."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            first: Any = json.loads(file.readline(MAX_LINE_BYTES))
        is_rejected_file = isinstance(first, dict) and tuple(cast("Json", first)) == LINE_KEYS
    except (OSError, ValueError, RecursionError):
        is_rejected_file = False
    if not is_rejected_file:
        raise InputError(
            "it is there already, and holds no rejected rows",
            where=str(path),
            fix="name a new file",
        )


def write_rejected_rows(
    path: Path | None, datasets: Mapping[str, Dataset], reports: Mapping[str, DataReport]
) -> tuple[Json, ...]:
    """Write the bad rows of all roles, then those that break a constraint, into a new file, which
    takes the place of an older one; without any there is none. Returns the first ones."""
    lines = chain.from_iterable(
        iter_rejected_rows(dataset, has_render_errors=NOT_RENDERED in reports[role].rejected)
        for role, dataset in datasets.items()
    )
    lines = chain(
        lines, *(_reread_rows(dataset, dataset.violations) for dataset in datasets.values())
    )
    first_lines = tuple(islice(lines, MAX_SHOWN_ROWS))
    if path is None:
        return first_lines
    with disk_errors(path):
        if not first_lines:
            path.unlink(missing_ok=True)
            return first_lines
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMP_PREFIX}{path.name}")
        with temporary.open("wb") as file:
            file.writelines(dump_json(line) for line in chain(first_lines, lines))
        os.replace(temporary, path)
    return first_lines


def iter_rejected_rows(dataset: Dataset, *, has_render_errors: bool) -> Iterator[Json]:
    """The bad rows of a data set. `rendered`: among those that a scan looks at, rows that cannot be
    rendered, too."""
    yield from _reread_rows(dataset, dataset.rejected_rows)
    scanned_R = select_scan_rows(dataset)
    for index in (
        [*scanned_R.tolist(), *find_rare_rows(dataset, scanned_R).tolist()]
        if has_render_errors
        else ()
    ):
        if problem := dataset.with_max_length(None, "drop").render_row(index)[1].problem:
            yield _build_line(dataset.get_part(index), int(dataset.row_N[index]), problem)


def _reread_rows(dataset: Dataset, rejected_rows: RejectedRows) -> Iterator[Json]:
    for part_index, row in rejected_rows.iter_indices():
        part = dataset.parts[part_index]
        try:
            part.read_example(row, dataset.renderer.has_template)
        except InvalidRow as problem:
            yield _build_line(part, row, problem)


def _build_line(part: DataSourceReader, row: int, problem: InvalidRow) -> Json:
    raw, length = part.source.read_raw(row, MAX_RAW_BYTES)
    row_id = part.source.get_id(row)
    where = str(part.source.get_location(row)) if problem.where == row_id else problem.where
    text = raw.decode("utf-8", errors="backslashreplace")
    values = (where, row_id, problem.reason, problem.message, problem.fix, length, text)
    return dict(zip(LINE_KEYS, values, strict=True))
