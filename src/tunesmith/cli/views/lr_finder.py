"""Views of `tune lr`: a line per learning rate as it ends, then the table and the SVG plot."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.advise.lr_finder import LRFinderResult, LRPoint, LRTrial
from tunesmith.advise.lr_plot import render_bar, render_svg
from tunesmith.cli.output import escape_markup, write_stderr
from tunesmith.cli.progress import format_interval
from tunesmith.cli.views import make_table
from tunesmith.core.atomic import write_file
from tunesmith.evaluate.results import compute_score


def report_lr_result(result: LRTrial | LRFinderResult, svg_path: Path) -> RenderableType | None:
    """Print a trial on stderr; for the final result write the plot and return the table."""
    if isinstance(result, LRTrial):
        write_stderr(f"{format_trial(result)}\n")
        return None
    write_file(svg_path, render_svg(result).encode())
    return render_lr_table(result, svg_path)


def format_trial(trial: LRTrial) -> str:
    name = f"rate {trial.learning_rate:g}" if trial.learning_rate else "before training"
    loss = "none" if trial.held_out is None else f"{compute_score(trial.held_out).value:.4f}"
    collapse = f"; collapsed: {trial.collapse_reason}" if trial.collapse_reason else ""
    return f"{name}: held-out loss {loss}{collapse}"


def render_lr_table(result: LRFinderResult, svg_path: Path) -> RenderableType:
    """Show the held-out loss per learning rate, and the one chosen."""
    title = f"Held-out {result.metric} after {result.steps} steps, {result.rows} rows (95% CI)"
    columns = ("rate", "loss", "log(loss before training / loss)", "")
    table = make_table(title, *columns, numbers=("rate",))
    table.add_row("0", f"{result.base_loss:.3f}", "", Text("before training", "dim"))
    for point in result.points:
        table.add_row(
            f"{point.learning_rate:g}",
            _format_loss(point),
            render_bar(point, result),
            _format_verdict(point, result),
        )
    lines = [f"[yellow]note[/] {escape_markup(caveat)}" for caveat in result.caveats]
    if result.collapse_rate is not None:
        lines.append(
            f"the model starts to collapse at {result.collapse_rate:g}; higher rates were not tried"
        )
    if result.chosen_rate is not None:
        chosen = f"learning_rate: {result.chosen_rate:g}"
        lines.append(f"{chosen} (the plan had {result.planned_rate:g})")
    return Group(table, *lines, escape_markup(f"plot: {svg_path}"))


def _format_loss(point: LRPoint) -> str:
    if point.loss is None or point.low is None or point.high is None:
        return "-"
    return format_interval(point.loss, point.low, point.high)


def _format_verdict(point: LRPoint, result: LRFinderResult) -> Text:
    if point.collapse_reason:
        return Text(f"collapsed: {point.collapse_reason}", "bold red")
    if point.learning_rate == result.chosen_rate:
        return Text("chosen", "bold green")
    return Text("as good" if point.learning_rate in result.similar_rates else "worse", "dim")
