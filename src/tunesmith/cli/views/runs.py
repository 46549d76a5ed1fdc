"""View of `runs`: a line for each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.cli.output import flatten_text
from tunesmith.core.formatting import format_bytes

if TYPE_CHECKING:
    from tunesmith.session.run_list import RunSummary

STATE_STYLES = {
    "running": "bold green",
    "finished": "green",
    "interrupted": "yellow",
    "stopped": "bold red",
    "unreadable": "red",
}
MAX_PROBLEM_CHARS = 1_000  # long ones are wrapped
MAX_UNBROKEN_CHARS = 30  # of a path
AGE_UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))  # seconds


def render_runs(runs: Sequence[RunSummary], now: float, num_older: int = 0) -> RenderableType:
    """Show the runs; `now` is in seconds since the epoch. Older ones, which are not shown, are
    counted."""
    if not runs:
        return "no runs here: start one with `tunesmith train recipe.yaml`"
    paths = [flatten_text(_shorten_path(run.path)) for run in runs]
    # a narrow terminal shortens models before it breaks names and scores
    wrapped = {"model"}
    if any(run.problem for run in runs):
        wrapped.add("metric")
    if max(map(len, paths)) > MAX_UNBROKEN_CHARS:
        wrapped.add("run")
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "model", "step", "metric", "score", "memory", "age"):
        is_number = column in ("step", "score", "memory", "age")
        can_wrap = column in wrapped
        table.add_column(
            column,
            justify="right" if is_number else "left",
            no_wrap=not can_wrap,
            overflow="fold" if can_wrap else "ellipsis",
        )
    for run, path in zip(runs, paths, strict=True):
        table.add_row(
            Text(path),
            Text(run.state, STATE_STYLES[run.state]),
            Text(flatten_text(run.model, 30), no_wrap=True, overflow="ellipsis"),
            Text(f"{run.step}/{run.steps}") if run.steps else "",
            Text(_format_metric(run)),
            Text(_format_score(run)),
            Text(format_bytes(run.peak_bytes) if run.peak_bytes else ""),
            Text(_format_age(now - run.modified) if run.modified else ""),
        )
    if num_older:
        table.caption = f"and {num_older:,} older: tunesmith runs --all"
    return table


def _shorten_path(path: str) -> str:
    """Return a path below the working folder relative to it."""
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except ValueError:
        return path


def _format_metric(run: RunSummary) -> str:
    """Name the metric of the main score, or say why there is none."""
    if run.problem:
        return flatten_text(run.problem, MAX_PROBLEM_CHARS)
    return flatten_text(run.score.metric) if run.score else ""


def _format_score(run: RunSummary) -> str:
    """Format the main score with half of its interval."""
    if run.problem or run.score is None:
        return ""
    return f"{run.score.value:.2f} ±{(run.score.high - run.score.low) / 2:.2f}"


def _format_age(seconds: float) -> str:
    for unit_seconds, unit in AGE_UNITS:
        if seconds >= unit_seconds:
            return f"{seconds / unit_seconds:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
