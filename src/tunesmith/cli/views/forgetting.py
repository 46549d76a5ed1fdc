"""What is shown of retention: how far the model moved from its base, and gain against forgetting by
scale.

In: parts of a RunRecord. Out: things that `rich` can print. Programs read the JSON instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.cli.progress import format_interval
from tunesmith.core.events import Score
from tunesmith.core.types import Comparison, ScalePoint
from tunesmith.evaluate.scale_choice import (
    compute_forgetting_share,
    compute_gain_share,
    describe_recommendation,
    recommend_scale,
)
from tunesmith.evaluate.significance import judge_comparison

METRIC_NAMES = {
    "kl": "KL to the model before, nats a token",
    "top1_agreement": "likeliest token the same",
}


def format_kl_scores(kl_scores: Sequence[Score]) -> list[str]:
    return [
        escape(f"{kl_score.task}: {METRIC_NAMES.get(kl_score.metric, kl_score.metric)} ")
        + format_interval(kl_score.value, kl_score.low, kl_score.high)
        for kl_score in kl_scores
    ]


def format_relearning(changes: Sequence[Comparison]) -> list[str]:
    """Of each domain that got worse by itself, how much of that is gone after other texts of it."""
    lines: list[str] = []
    for first, relearned in zip(changes[::2], changes[1::2], strict=True):
        if judge_comparison(first) == "worse":
            text = f"{first.task}: {first.difference:+.3f} by itself, {relearned.difference:+.3f} after others: "
            recovered_share = 1 - relearned.difference / first.difference
            lines.append(
                escape(
                    text
                    + (
                        f"{recovered_share:.0%} of the loss is back"
                        if recovered_share > 0
                        else "none of the loss is back"
                    )
                )
            )
    return lines or ["no domain of general text is shown to be worse: there is nothing to recover"]


def render_scales(points: Sequence[ScalePoint]) -> RenderableType:
    """A row a scale; shares are of what the whole adapter gains and forgets."""
    title = "Gain against forgetting: the trained adapter, scaled"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in (
        "scale",
        f"{points[0].eval_loss.task} {points[0].eval_loss.metric}",
        "gain kept",
        "general bits per byte",
    ):
        table.add_column(column, justify="right")
    table.add_column("forgetting", justify="right")
    table.add_column("")
    recommended = recommend_scale(points)
    for point in points:
        general = "-" if point.general_text is None else f"{point.general_text.value:.4f}"
        shares = (
            _format_share(compute_gain_share(points, point)),
            _format_share(compute_forgetting_share(points, point)),
        )
        mark = Text("offered", "bold green") if point is recommended else Text("")
        table.add_row(
            f"{point.scale:g}", f"{point.eval_loss.value:.4f}", shares[0], general, shares[1], mark
        )
    return Group(table, describe_recommendation(points))


def _format_share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
