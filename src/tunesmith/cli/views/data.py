"""Views of `data check` and `data split`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape

from tunesmith.cli.progress import format_single_line
from tunesmith.cli.views import make_table
from tunesmith.core.formatting import format_rows
from tunesmith.core.types import DataReport, Finding

if TYPE_CHECKING:
    from tunesmith.data.split import SplitResult

LEVEL_STYLES = {"info": "dim", "warn": "yellow", "error": "bold red"}
COUNT_COLUMNS = (
    *("rows", "documents", "tokens", "supervised"),
    *("dropped", "truncated", "median", "longest"),
)
MAX_STRATA = 20
MAX_NAME_CHARS = 40


def render_data(reports: Mapping[str, DataReport]) -> RenderableType:
    """Show the counts of each data role, then tasks, formats and findings."""
    table = make_table("Data", "role", "format", *COUNT_COLUMNS, numbers=COUNT_COLUMNS)
    tasks: list[str] = []
    formats: dict[str, None] = {}  # ordered, without duplicates
    findings: list[str] = []
    for role, report in reports.items():
        counts = (
            report.rows,
            report.documents,
            report.tokens,
            report.supervised_tokens,
            sum(report.dropped.values()),
            report.truncated,
            report.length_percentiles.get("p50", 0),
            report.length_percentiles.get("max", 0),
        )
        table.add_row(role, report.format, *(f"{count:,}" for count in counts))
        for task, rows in report.task_rows.items():
            tokens = report.task_tokens.get(task, 0)
            tasks.append(f"{role} {task}: {rows:,} rows, {tokens:,} tokens")
        formats[f"[dim]{report.format}: {escape(report.format_reason)}[/]"] = None
        findings += [_format_finding(role, finding) for finding in report.findings]
    return Group(table, *tasks, *formats, *findings)


def _format_finding(role: str, finding: Finding) -> str:
    level = f"[{LEVEL_STYLES[finding.level]}]{finding.level}[/]"
    text = f"{level} {role} {finding.check}: {escape(finding.message)}"
    if finding.rows:
        text += f" [dim]{escape(format_rows(finding))}[/]"
    if finding.fix:
        text += f"\n     {escape(finding.fix)}"
    return text


def render_split(split: SplitResult) -> RenderableType:
    """Show the rows and groups of each file, and the rows of each stratum."""
    table = make_table("Rows", "file", "rows", "groups", numbers=("rows", "groups"))
    for side, rows in split.rows.items():
        table.add_row(f"{side}.jsonl", f"{rows:,}", f"{split.groups[side]:,}")
    parts: list[RenderableType] = [table]
    if split.strata:
        strata = make_table("", "stratum", *split.rows, numbers=tuple(split.rows))
        for name, counts in list(split.strata.items())[:MAX_STRATA]:
            cells = [f"{counts[side]:,}" for side in split.rows]
            strata.add_row(format_single_line(name, MAX_NAME_CHARS), *cells)
        parts.append(strata)
    if split.skipped_rows:
        parts.append(
            f"[yellow]{split.skipped_rows:,} rows skipped[/]: `tunesmith data check` says why"
        )
    if not split.has_near_check:
        parts.append(
            "[yellow]near duplicates were not checked[/]: pip install 'tunesmith\\[audit]'"
        )
    return Group(*parts, escape(split.path))
