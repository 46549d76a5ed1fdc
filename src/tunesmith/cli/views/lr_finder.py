"""Views of `tune lr`: a line per learning rate as it ends, then the table."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.advise.lr_finder import LRFinderResult, LRPoint, LRTrial
from tunesmith.cli.output import escape_markup, write_stderr
from tunesmith.cli.progress import format_interval
from tunesmith.cli.views import make_table
from tunesmith.evaluate.results import compute_score

BAR_WIDTH = 32  # characters


def report_lr_result(result: LRTrial | LRFinderResult) -> RenderableType | None:
    """Print a trial on stderr; return the table of the final result."""
    if isinstance(result, LRTrial):
        write_stderr(f"{format_trial(result)}\n")
        return None
    return render_lr_table(result)


def format_trial(trial: LRTrial) -> str:
    name = f"rate {trial.learning_rate:g}" if trial.learning_rate else "before training"
    loss = "none" if trial.held_out is None else f"{compute_score(trial.held_out).value:.4f}"
    collapse = f"; collapsed: {trial.collapse_reason}" if trial.collapse_reason else ""
    return f"{name}: held-out loss {loss}{collapse}"


def render_lr_table(result: LRFinderResult) -> RenderableType:
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
    return Group(table, *lines)


def render_bar(point: LRPoint, result: LRFinderResult) -> str:
    """Return a bar of the log ratio of the untrained loss to this one; the best fills the width."""
    losses = [each.loss for each in result.points if each.loss and not each.collapse_reason]
    if not losses or not point.loss or point.collapse_reason:
        return ""
    best_gain = math.log(result.base_loss / min(losses))
    if best_gain <= 0:
        return ""
    return "█" * max(0, round(BAR_WIDTH * math.log(result.base_loss / point.loss) / best_gain))


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
