"""What is shown of retention: how far the model moved from its base, and gain against forgetting by scale.

In: parts of a RunRecord. Out: things that `rich` can print. Programs read the JSON instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.cli.progress import interval
from tunesmith.core.events import Score
from tunesmith.core.types import Comparison, ScalePoint
from tunesmith.evaluate.scale_choice import forgetting, gain_kept, offer, offered
from tunesmith.evaluate.significance import verdict

NAMES = {"kl": "KL to the model before, nats a token", "top1_agreement": "likeliest token the same"}


def moved_lines(moved: Sequence[Score]) -> list[str]:
    return [
        escape(f"{one.task}: {NAMES.get(one.metric, one.metric)} ") + interval(one.value, one.low, one.high)
        for one in moved
    ]


def recovery_lines(changes: Sequence[Comparison]) -> list[str]:
    """Of each domain that got worse by itself, how much of that is gone after other texts of it."""
    lines: list[str] = []
    for alone, after in zip(changes[::2], changes[1::2], strict=True):
        if verdict(alone) == "worse":
            said = f"{alone.task}: {alone.difference:+.3f} by itself, {after.difference:+.3f} after others: "
            back = 1 - after.difference / alone.difference
            lines.append(escape(said + (f"{back:.0%} of the loss is back" if back > 0 else "none of the loss is back")))
    return lines or ["no domain of general text is shown to be worse: there is nothing to recover"]


def scale_table(points: Sequence[ScalePoint]) -> RenderableType:
    """A row a scale; shares are of what the whole adapter gains and forgets."""
    title = "Gain against forgetting: the trained adapter, scaled"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("scale", f"{points[0].gain.task} {points[0].gain.metric}", "gain kept", "general bits per byte"):
        table.add_column(column, justify="right")
    table.add_column("forgetting", justify="right")
    table.add_column("")
    best = offered(points)
    for point in points:
        general = "-" if point.general is None else f"{point.general.value:.4f}"
        shares = (_share(gain_kept(points, point)), _share(forgetting(points, point)))
        word = Text("offered", "bold green") if point is best else Text("")
        table.add_row(f"{point.scale:g}", f"{point.gain.value:.4f}", shares[0], general, shares[1], word)
    return Group(table, offer(points))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
