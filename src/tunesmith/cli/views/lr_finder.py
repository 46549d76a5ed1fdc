"""What `tune lr` shows: a line a rate as it ends, then the table with bars, and the picture.

In: the objects of tune/rates.py. Out: things that `rich` can print, and the SVG file. Programs read the JSON instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.advise.lr_finder import RatePoint, RateTest, Trial
from tunesmith.advise.lr_plot import bar, svg
from tunesmith.cli.progress import interval
from tunesmith.core.atomic import write_file
from tunesmith.evaluate.results import score


def rate_view(found: Trial | RateTest, place: Path) -> RenderableType | None:
    """A rate is told on stderr, and the conclusion drawn into `place` and returned."""
    if isinstance(found, Trial):
        sys.stderr.write(f"{trial_line(found)}\n")
        return None
    write_file(place, svg(found).encode())
    return rate_table(found, place)


def trial_line(trial: Trial) -> str:
    name = f"rate {trial.rate:g}" if trial.rate else "before training"
    loss = "none" if trial.held_out is None else f"{score(trial.held_out).value:.4f}"
    return f"{name}: held-out loss {loss}" + (f"; collapsed: {trial.collapsed}" if trial.collapsed else "")


def rate_table(test: RateTest, drawn: Path) -> RenderableType:
    title = f"Held-out {test.metric} after {test.steps} steps, {test.rows} rows, 95% intervals"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("rate", justify="right")
    for column in ("loss", "loss before training / loss, as logarithms", ""):
        table.add_column(column)
    table.add_row("0", f"{test.base:.3f}", "", Text("before training", "dim"))
    for point in test.points:
        table.add_row(f"{point.rate:g}", _loss(point), bar(point, test), _word(point, test))
    lines = [f"[yellow]note[/] {escape(doubt)}" for doubt in test.doubts]
    if test.collapse_from is not None:
        lines.append(f"the model starts to collapse at {test.collapse_from:g}; higher rates were not tried")
    if test.chosen is not None:
        lines.append(f"learning_rate: {test.chosen:g} (the plan's was {test.planned:g})")
    return Group(table, *lines, escape(f"curve: {drawn}"))


def _loss(point: RatePoint) -> str:
    if point.loss is None or point.low is None or point.high is None:
        return "-"
    return interval(point.loss, point.low, point.high)


def _word(point: RatePoint, test: RateTest) -> Text:
    if point.collapsed:
        return Text(f"collapsed: {point.collapsed}", "bold red")
    if point.rate == test.chosen:
        return Text("chosen", "bold green")
    return Text("as good" if point.rate in test.as_good else "worse", "dim")
