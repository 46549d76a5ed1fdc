"""Write rejected rows to a file for correction, and decide when they stop a run.

    data sets by role -> rejected.jsonl: {"where", "id", "reason", "what", "fix", "bytes", "row"}

Only the indices of rejected rows are stored; each row is read again here and its reader raises the
same error again, so any number of them takes no memory. `row` is its text, cut after
`MAX_RAW_BYTES` bytes (`bytes` is its full length), with invalid UTF-8 escaped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from tunesmith.core.atomic import atomic_file, disk_errors
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json
from tunesmith.core.types import DataReport, Finding, Json
from tunesmith.data.dataset import NOT_RENDERED, Dataset, DataSourceReader
from tunesmith.data.golden_set import refuse_test_leakage
from tunesmith.data.length_stats import find_rare_rows, select_scan_rows
from tunesmith.data.readers.invalid_row import MAX_SHOWN_ROWS, InvalidRow, RejectedRows

MAX_RAW_BYTES = 4096
MAX_DROPPED_SHARE = 0.20  # of the training rows
LINE_KEYS = ("where", "id", "reason", "what", "fix", "bytes", "row")  # keys of a line
MAX_LINE_BYTES = 2**20


def refuse_unusable_rows(
    datasets: Mapping[str, Dataset],
    reports: Mapping[str, DataReport],
    path: Path | None = None,
    *,
    skip_invalid: bool,
) -> None:
    """Raise InputError for rows that no run uses: leaked test rows, invalid ones (see below), and
    tables with one label, or with columns that nothing reads."""
    refuse_test_leakage(datasets)
    if finding := find_table_fault(reports["data"]):
        raise InputError(finding.message, where=f"data: {finding.rows[0]}", fix=finding.fix)
    refuse_invalid_rows(datasets, reports, path, skip_invalid=skip_invalid)


def find_table_fault(report: DataReport) -> Finding | None:
    """Return why a table is refused: one label in all rows, or a column that nothing reads."""
    faults = (each for each in report.findings if each.check in ("unused", "one_label"))
    return next((finding for finding in faults if finding.level == "error"), None)


def refuse_invalid_rows(
    datasets: Mapping[str, Dataset],
    reports: Mapping[str, DataReport],
    path: Path | None,
    *,
    skip_invalid: bool,
) -> None:
    """Raise InputError if rows cannot be used, or too many training rows would train nothing.

    The rejected rows are written to `path` first. With `skip_invalid` only a data set
    without any document is refused. `reports` are the results of the data check."""
    training_report = reports["data"]
    can_skip = training_report.documents > 0
    rejected: Counter[str] = Counter()
    for report in reports.values():
        rejected.update(report.rejected)
    if rejected and not (skip_invalid and can_skip):
        lines = write_rejected_rows(path if can_skip else None, datasets, reports)
        lines = lines[: rejected.total()]
        num_rows = 0
        for dataset in datasets.values():
            num_rows += len(dataset) + dataset.rejected_rows.counts.total()
        counts = _format_counts(rejected)
        message = f"{rejected.total():,} of {num_rows:,} rows cannot be used: {counts}"
        for line in lines:
            message += f"\n  {line['where']}: {line['what']}"
        if rejected.total() > len(lines):
            message += f"\n  and {rejected.total() - len(lines):,} more"
        fix = "correct them"
        if can_skip:
            file_note = f" (all are listed in {path})" if path else ""
            fix += f"{file_note}, or exclude them with --skip-invalid"
        raise InputError(message, where="data", fix=fix)
    if not can_skip or (has_many_dropped(training_report) and not skip_invalid):
        num_dropped = sum(training_report.dropped.values())
        counts = _format_counts(training_report.dropped)
        message = f"{num_dropped:,} of {training_report.rows:,} rows would train nothing: {counts}"
        fix = "raise max_length"
        if can_skip:
            fix += ", or exclude them with --skip-invalid"
        raise InputError(message, where=f"data: {training_report.path}", fix=fix)


def has_many_dropped(report: DataReport) -> bool:
    """Tell whether so many rows train nothing that a run must stop."""
    return sum(report.dropped.values()) > MAX_DROPPED_SHARE * report.rows


def _format_counts(counts: Mapping[str, int]) -> str:
    largest_first = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} {kind}" for kind, count in largest_first)


def refuse_foreign_file(path: Path) -> None:
    """Raise InputError if `path` exists and is not a rejected.jsonl: it would be overwritten."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            first: Any = json.loads(file.readline(MAX_LINE_BYTES))
        is_rejected_file = isinstance(first, dict) and tuple(cast("Json", first)) == LINE_KEYS
    except (OSError, ValueError, RecursionError):
        is_rejected_file = False
    if not is_rejected_file:
        message = "the file already exists, but is not a list of rejected rows"
        raise InputError(message, where=str(path), fix="choose a new file")


def write_rejected_rows(
    path: Path | None, datasets: Mapping[str, Dataset], reports: Mapping[str, DataReport]
) -> tuple[Json, ...]:
    """Write the rejected rows of all roles, then the rows that break a constraint.

    Replaces an older file; without any such rows the file is removed. Returns the first lines."""
    sources: list[Iterator[Json]] = []
    for role, dataset in datasets.items():
        has_render_errors = NOT_RENDERED in reports[role].rejected
        sources.append(iter_rejected_rows(dataset, has_render_errors=has_render_errors))
    for dataset in datasets.values():
        sources.append(_reread_rows(dataset, dataset.violations))
    lines = chain.from_iterable(sources)
    first_lines = tuple(islice(lines, MAX_SHOWN_ROWS))
    if path is None:
        return first_lines
    with disk_errors(path):
        if not first_lines:
            path.unlink(missing_ok=True)
            return first_lines
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.writelines(dump_json(line) for line in chain(first_lines, lines))
    return first_lines


def iter_rejected_rows(dataset: Dataset, *, has_render_errors: bool) -> Iterator[Json]:
    """Yield the rejected rows of a data set.

    With `has_render_errors` the rows that a scan renders are rendered again, to add those that
    cannot be rendered."""
    yield from _reread_rows(dataset, dataset.rejected_rows)
    if not has_render_errors:
        return
    scanned_R = select_scan_rows(dataset)
    for index in [*scanned_R.tolist(), *find_rare_rows(dataset, scanned_R).tolist()]:
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
    raw, num_bytes = part.source.read_raw(row, MAX_RAW_BYTES)
    row_id = part.source.get_id(row)
    where = str(part.source.get_location(row)) if problem.where == row_id else problem.where
    text = raw.decode("utf-8", errors="backslashreplace")
    values = (where, row_id, problem.reason, problem.message, problem.fix, num_bytes, text)
    return dict(zip(LINE_KEYS, values, strict=True))
