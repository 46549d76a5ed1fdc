"""View of `runs`: a line for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
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
    "ready": "bold green",
    "useful, not ready": "yellow",
    "harmful": "bold red",
}
MAX_PROBLEM_CHARS = 1_000
MAX_STATE_CHARS = 20
AGE_UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))  # seconds


# left out one after the other where the terminal is too narrow for all
SPARED_COLUMNS = ("model", "memory", "metric")
NUMBERS = ("step", "score", "memory", "age")
GAP = 2  # between columns
MIN_PATH_WIDTH = 12
MIN_MODEL_WIDTH = 20
MAX_MODEL_WIDTH = 60


def render_runs(runs: Sequence[RunSummary], now: float, num_older: int = 0) -> RenderableType:
    """Show the runs; `now` is in seconds since the epoch. Older ones, which are not shown, are
    counted."""
    if not runs:
        return "no runs here: start one with `tunesmith train recipe.yaml`"
    paths = [flatten_text(_shorten_path(run.path)) for run in runs]
    cells = {
        "run": [Text(path) for path in paths],
        "state": [_render_state(run) for run in runs],
        "model": [Text(flatten_text(run.model, MAX_MODEL_WIDTH)) for run in runs],
        "step": [Text(f"{run.step}/{run.steps}" if run.steps else "") for run in runs],
        "metric": [Text(_format_metric(run)) for run in runs],
        "score": [Text(_format_score(run)) for run in runs],
        "memory": [Text(format_bytes(run.peak_bytes) if run.peak_bytes else "") for run in runs],
        "age": [Text(_format_age(now - run.modified) if run.modified else "") for run in runs],
    }
    caption = f"and {num_older:,} older: tunesmith runs --all" if num_older else None
    problems = [
        Text(f"{path}: {flatten_text(run.problem, MAX_PROBLEM_CHARS)}", STATE_STYLES[run.state])
        for run, path in zip(runs, paths, strict=True)
        if run.problem
    ]
    return Group(RunTable(cells, caption), *problems)


class RunTable:
    """A table whose lines are not broken: a narrow terminal leaves columns out, and folds paths
    only if that is not enough.

    Its lines are laid out here: rich's own table takes ten times as long for a hundred runs."""

    def __init__(self, cells: Mapping[str, list[Text]], caption: str | None) -> None:
        titles = {name: Text(name, "bold") for name in cells}
        self.columns = {name: [titles[name], *column] for name, column in cells.items()}
        self.caption = caption
        self.widths: dict[str, int] = {}
        for name, column in self.columns.items():
            self.widths[name] = max(cell_len(cell.plain) for cell in column)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self._shorten_model(options.max_width)
        names = _choose_columns(widths, options.max_width)
        free = options.max_width - sum(widths[name] + GAP for name in names if name != "run")
        widths["run"] = min(widths["run"], max(MIN_PATH_WIDTH, free))
        for row in zip(*(self.columns[name] for name in names), strict=True):
            path, *folded = chop_cells(row[0].plain, widths["run"])
            for cell, name in zip((Text(path, row[0].style), *row[1:]), names, strict=True):
                words = flatten_text(cell.plain, widths[name]) if name == "model" else cell.plain
                blanks = " " * (widths[name] - cell_len(words))
                text = blanks + words if name in NUMBERS else words + blanks
                yield Segment(text, console.get_style(cell.style))
                yield Segment("\n" if name == names[-1] else " " * GAP)
            yield Segment("".join(f"{part}\n" for part in folded))
        if self.caption:
            yield Segment(f"{self.caption}\n", console.get_style("dim"))

    def _shorten_model(self, max_width: int) -> dict[str, int]:
        """Return the width of each column, where that of the model is what the others leave."""
        model = self.widths["model"]
        excess = sum(self.widths.values()) + GAP * (len(self.widths) - 1) - max_width
        return self.widths | {"model": max(min(model, MIN_MODEL_WIDTH), min(model, model - excess))}


def _choose_columns(widths: Mapping[str, int], max_width: int) -> list[str]:
    """Return the names of the columns that fit."""
    names = list(widths)
    for spared in SPARED_COLUMNS:
        if sum(widths[name] + GAP for name in names) - GAP > max_width:
            names.remove(spared)
    return names


def _render_state(run: RunSummary) -> Text:
    """Show the verdict of a finished run, which says more than that it is finished."""
    state = flatten_text(run.verdict or run.state, MAX_STATE_CHARS)
    return Text(state, STATE_STYLES.get(state, ""))


def _shorten_path(path: str) -> str:
    """Return a path below the working folder relative to it."""
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except ValueError:
        return path


def _format_metric(run: RunSummary) -> str:
    """Name the metric of the main score."""
    return flatten_text(run.score.metric) if run.score and not run.problem else ""


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
