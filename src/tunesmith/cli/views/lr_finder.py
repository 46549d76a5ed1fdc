"""What `tune lr` shows: a line a rate as it ends, then the table with bars, and the picture.

In: the objects of tune/rates.py. Out: things that `rich` can print, and the SVG file. Programs read
the JSON instead."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.advise.lr_finder import LRFinderResult, LRPoint, LRTrial
from tunesmith.advise.lr_plot import render_bar, render_svg
from tunesmith.cli.progress import format_interval
from tunesmith.core.atomic import write_file
from tunesmith.evaluate.results import compute_score


def report_lr_result(result: LRTrial | LRFinderResult, svg_path: Path) -> RenderableType | None:
    """A rate is told on stderr, and the conclusion drawn into `place` and returned."""
    if isinstance(result, LRTrial):
        sys.stderr.write(f"{format_trial(result)}\n")
        return None
    write_file(svg_path, render_svg(result).encode())
    return render_lr_table(result, svg_path)


def format_trial(trial: LRTrial) -> str:
    name = f"rate {trial.learning_rate:g}" if trial.learning_rate else "before training"
    loss = "none" if trial.held_out is None else f"{compute_score(trial.held_out).value:.4f}"
    return f"{name}: held-out loss {loss}" + (
        f"; collapsed: {trial.collapse_reason}" if trial.collapse_reason else ""
    )


def render_lr_table(result: LRFinderResult, svg_path: Path) -> RenderableType:
    title = (
        f"Held-out {result.metric} after {result.steps} steps, {result.rows} rows, 95% intervals"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("rate", justify="right")
    for column in ("loss", "loss before training / loss, as logarithms", ""):
        table.add_column(column)
    table.add_row("0", f"{result.base_loss:.3f}", "", Text("before training", "dim"))
    for point in result.points:
        table.add_row(
            f"{point.learning_rate:g}",
            _format_loss(point),
            render_bar(point, result),
            _format_verdict(point, result),
        )
    lines = [f"[yellow]note[/] {escape(caveat)}" for caveat in result.caveats]
    if result.collapse_rate is not None:
        lines.append(
            f"the model starts to collapse at {result.collapse_rate:g}; higher rates were not tried"
        )
    if result.chosen_rate is not None:
        lines.append(
            f"learning_rate: {result.chosen_rate:g} (the plan's was {result.planned_rate:g})"
        )
    return Group(table, *lines, escape(f"curve: {svg_path}"))


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
