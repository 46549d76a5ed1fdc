"""Views of short runs, of `tune lr` and `data curate --ablate`: a line each, then the table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.advise.short_runs import ShortRun, ShortRunRow, ShortRunTable
from tunesmith.cli.output import escape_markup, write_stderr
from tunesmith.cli.progress import format_interval
from tunesmith.cli.views import make_table


def report_short_runs(results: Iterable[ShortRun | ShortRunTable], subject: str) -> ShortRunTable:
    """Print each run on stderr as it ends; return the table, which comes last."""
    for result in results:
        if isinstance(result, ShortRunTable):
            return result
        name = f"{subject} {result.name}, seed {result.seed}" if result.name else "before training"
        problem = f"; collapsed: {result.problem}" if result.problem else ""
        write_stderr(f"{name}: held-out loss {result.loss:.4f}{problem}\n")
    raise AssertionError("the table comes last")


def render_short_runs(table: ShortRunTable, subject: str) -> RenderableType:
    """Show the held-out loss of each run, compared with the reference."""
    batch = f" of {table.batch_size} rows" if table.batch_size else ""
    seeds = f", {table.seeds} seeds" if table.seeds > 1 else ""
    title = (
        f"Held-out {table.metric} after {table.steps} steps{batch}{seeds}; "
        f"{table.items} held-out rows (95% CI); {table.base_loss:.3f} untrained"
    )
    columns = [subject, "loss", f"minus that of {table.reference or 'none'}", ""]
    if table.seeds > 1:
        columns.insert(3, "by seed")
    has_rows = any(row.rows for row in table.rows)
    if has_rows:
        columns[1:1] = ["rows", "tokens"]
    view = make_table(title, *columns, numbers=columns[:-1])
    for row in table.rows:
        interval = "-"
        if row.loss is not None and row.low is not None and row.high is not None:
            interval = format_interval(row.loss, row.low, row.high)
        cells = [row.name, *([f"{row.rows:,}", f"{row.tokens:,}"] if has_rows else []), interval]
        cells.append(_format_difference(row))
        if table.seeds > 1:
            cells.append(" ".join(f"{difference:+.3f}" for difference in row.seed_differences))
        view.add_row(*map(escape_markup, cells), _format_verdict(row, table))
    notes = [f"[yellow]note[/] {escape_markup(note)}" for note in table.notes]
    return Group(view, *notes)


def _format_difference(row: ShortRunRow) -> str:
    comparison = row.comparison
    if comparison is None:
        return ""
    low, high = comparison.interval
    return f"{comparison.difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def _format_verdict(row: ShortRunRow, table: ShortRunTable) -> Text:
    if row.problem:
        return Text(f"collapsed: {row.problem}", "bold red")
    if row.name == table.reference:
        return Text("reference" if row.rows else "chosen", "bold green")
    return Text(row.verdict, "dim")
