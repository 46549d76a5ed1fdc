"""Views of `data check`, `data import-reviews` and `data split`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.cli.output import escape_markup, format_single_line
from tunesmith.cli.views import make_table
from tunesmith.core.formatting import format_count, format_rows
from tunesmith.core.types import DataReport, Finding

if TYPE_CHECKING:
    from tunesmith.data.agreement import Agreement
    from tunesmith.data.reviews import ReviewImport
    from tunesmith.data.split import SplitResult

LEVEL_MARKS = {"info": "·", "warn": "!", "error": "✗"}
LEVEL_STYLES = {"info": "dim", "warn": "yellow", "error": "bold red"}
MAX_STRATA = 20
MAX_NAME_CHARS = 40


def render_data(reports: Mapping[str, DataReport]) -> RenderableType:
    """Show the counts of each data role, then tasks, formats, and the findings by role."""
    formats: dict[str, None] = {}  # ordered, without duplicates
    tasks: list[str] = []
    findings: list[RenderableType] = []
    for role, report in reports.items():
        for task, rows in report.task_rows.items():
            tokens = report.task_tokens.get(task, 0)
            tasks.append(f"{role} {task}: {rows:,} rows, {tokens:,} tokens")
        formats[f"[dim]{report.format}: {escape_markup(report.format_reason)}[/]"] = None
        if report.findings:
            findings += [Text(role, "bold"), _build_findings_table(report.findings)]
    return Group(_build_counts_table(reports), *tasks, *formats, *findings)


def _build_counts_table(reports: Mapping[str, DataReport]) -> Table:
    """Build the table of counts; a column without any count is left out."""
    counts: dict[str, list[int]] = {}
    for report in reports.values():
        values = {
            "rows": report.rows,
            "documents": report.documents if report.documents != report.rows else 0,
            "tokens": report.tokens,
            "supervised": report.supervised_tokens,
            "dropped": sum(report.dropped.values()),
            "truncated": report.truncated,
            "median": report.length_percentiles.get("p50", 0),
            "longest": report.length_percentiles.get("max", 0),
        }
        for name, value in values.items():
            counts.setdefault(name, []).append(value)
    columns = [name for name, values in counts.items() if any(values) or name == "rows"]
    table = make_table("Data", "role", *columns, numbers=columns)
    for column in table.columns:
        column.no_wrap = True
    for index, role in enumerate(reports):
        table.add_row(role, *(f"{counts[name][index]:,}" for name in columns))
    return table


def _build_findings_table(findings: Sequence[Finding]) -> Table:
    """Build a line for each finding, its first rows, and below it what to do."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.message)
        if finding.rows:
            text.append(f" ({format_rows(finding.rows)})", "dim")
        if finding.fix:
            text.append(f"\n{finding.fix}")
        style = LEVEL_STYLES[finding.level]
        table.add_row(Text(f"  {LEVEL_MARKS[finding.level]}", style), finding.check, text)
    return table


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
    if split.group:
        note = f"a run on these files counts each {split.group} once (`group` of the recipe)"
        parts.append(escape_markup(note))
    if split.skipped_rows:
        parts.append(
            f"[yellow]{split.skipped_rows:,} rows skipped[/]: `tunesmith data check` says why"
        )
    if not split.has_near_check:
        parts.append(
            "[yellow]near duplicates were not checked[/]: pip install '.\\[audit]' in "
            "tunesmith's folder"
        )
    return Group(*parts, escape_markup(split.path))


def render_reviews(reviewed: ReviewImport) -> RenderableType:
    """Show the verdicts of the rows, what was not used, and how far reviewers agree."""
    verdicts = ", ".join(f"{rows:,} {verdict}" for verdict, rows in reviewed.verdicts.items())
    lines = [f"{reviewed.rows:,} reviewed rows in {reviewed.path}: {verdicts}"]
    for count, what in (
        (reviewed.corrected_rows, "with a corrected answer"),
        (reviewed.unanswered_rows, "without a verdict, left out"),
    ):
        if count:
            lines.append(f"{format_count(count, 'row')} {what}")
    if reviewed.replaced_verdicts:
        earlier = "earlier verdicts of a reviewer on the same row: the later one counts"
        lines.append(f"{reviewed.replaced_verdicts:,} {earlier}")
    if reviewed.agreement:
        lines += _list_agreement(reviewed.agreement)
    if reviewed.disagreements:
        fix = "fill in a verdict for each row, and import it with the other tables"
        lines.append(f"to settle: {reviewed.disagreements} ({fix})")
    return escape_markup("\n".join(lines))


def _list_agreement(agreement: Agreement) -> list[str]:
    """Return a line for each measure of agreement that the rows give, with its interval."""
    rows = format_count(agreement.rows, "row")
    lines = [f"{rows} with several reviewers, who agree on {agreement.equal_rows:,}"]
    if agreement.alpha is None:
        lines[0] += "; too few rows or too equal verdicts to correct for chance"
    for name, each in (
        ("equal verdicts", agreement.share),
        ("Krippendorff's alpha", agreement.alpha),
        ("Gwet's AC1", agreement.ac1),
    ):
        if each is not None:
            lines.append(f"  {name}: {each.value:.2f} (95%: {each.low:.2f} to {each.high:.2f})")
    return lines
