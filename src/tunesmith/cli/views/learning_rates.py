"""Views of `tune lr`: a line for each rate as it ends, then the table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.advise.lr_finder import ShortRun, ShortRunRow, ShortRunTable
from tunesmith.cli.output import escape_markup, write_stderr
from tunesmith.cli.progress import format_interval
from tunesmith.cli.views import make_table


def report_rates(results: Iterable[ShortRun | ShortRunTable]) -> ShortRunTable:
    """Print each run on stderr as it ends; return the table, which comes last."""
    for result in results:
        if isinstance(result, ShortRunTable):
            return result
        name = f"rate {result.name}" if result.name else "before training"
        problem = f"; collapsed: {result.problem}" if result.problem else ""
        write_stderr(f"{name}: held-out loss {result.loss:.4f}{problem}\n")
    raise AssertionError("the table comes last")


def render_rates(table: ShortRunTable) -> RenderableType:
    """Show the held-out loss at each rate, compared with the reference."""
    batch = f" of {table.batch_size} rows" if table.batch_size else ""
    title = (
        f"Held-out {table.metric} after {table.steps} steps{batch}; "
        f"{table.items} held-out rows (95% CI); {table.base_loss:.3f} untrained"
    )
    columns = ("rate", "loss", f"minus that of {table.reference or 'none'}", "")
    view = make_table(title, *columns, numbers=columns[:-1])
    for row in table.rows:
        interval = "-"
        if row.loss is not None and row.low is not None and row.high is not None:
            interval = format_interval(row.loss, row.low, row.high)
        cells = (row.name, interval, _format_difference(row))
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
        return Text("chosen", "bold green")
    return Text(row.verdict, "dim")
