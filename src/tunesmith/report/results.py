"""Results before and after, and the adapter-scale trade-off.

In: ReportData. Out: what results.html.jinja and scales.html.jinja draw, or None without results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.events import Score
from tunesmith.core.types import ScalePoint
from tunesmith.evaluate.scale_choice import build_commands, describe_recommendation
from tunesmith.report.run_data import ReportData
from tunesmith.report.summary import UNITS, Claim, build_claims
from tunesmith.report.svg_charts import (
    Axes,
    LineChart,
    Point,
    Series,
    Strip,
    build_line_chart,
    build_strip,
)

KL_LABELS = {
    "kl": "KL(base ‖ tuned), nats per token",
    "top1_agreement": "top-1 agreement with base",
}


@dataclass(frozen=True)
class ResultRow:
    claim: Claim
    strip: Strip


@dataclass(frozen=True)
class ScalesView:
    charts: tuple[LineChart, ...]
    recommendation: str
    commands: tuple[str, ...]  # verify it, export it; empty when the adapter as trained is best
    kl_scores: tuple[tuple[str, Score], ...]  # label, score


def build_results(run: ReportData) -> list[ResultRow] | None:
    if run.record is None or not run.record.comparisons:
        return None
    return [ResultRow(claim, _build_strip(claim)) for claim in build_claims(run.record)]


def _build_strip(claim: Claim) -> Strip:
    """Mirror metrics where lower is better, so that better is always to the right."""
    comparison = claim.comparison
    sign = 1 if comparison.higher_is_better else -1
    low, high = sorted((sign * comparison.low, sign * comparison.high))
    return build_strip(low, sign * comparison.difference, high)


def build_scales(run: ReportData) -> ScalesView | None:
    record = run.record
    if record is None or not (record.scales or record.kl_scores):
        return None
    return ScalesView(
        charts=(*_build_tradeoff_chart(record.scales), *_build_gain_chart(record.scales)),
        recommendation=describe_recommendation(record.scales),
        commands=build_commands(record.scales, str(run.path)),
        kl_scores=tuple(
            (KL_LABELS.get(score.metric, score.metric), score) for score in record.kl_scores
        ),
    )


def _build_tradeoff_chart(scales: Sequence[ScalePoint]) -> list[LineChart]:
    """A point for each scale: left is better on the task, down is less forgotten."""
    points: list[Point] = []
    metric = ""
    for scale_point in scales:
        general = scale_point.general_text
        if general is not None:
            metric = scale_point.eval_loss.metric
            loss = scale_point.eval_loss.value
            note = f"× {scale_point.scale:g}"
            points.append(Point(loss, general.value, general.low, general.high, note))
    if not points:
        return []
    axes = Axes(
        "Held-out loss and general text, by adapter scale",
        "Held-out loss to the right, bits per byte of general text upward; lower is better on "
        "both axes. Bars are 95% intervals.",
        f"held-out loss, {UNITS.get(metric, metric)}",
        "general text, bits per byte",
    )
    series = Series("bits per byte of general text", tuple(points), has_dots=True)
    return [build_line_chart("scales-tradeoff", axes, [series])]


def _build_gain_chart(scales: Sequence[ScalePoint]) -> list[LineChart]:
    if not scales:
        return []
    points: list[Point] = []
    for scale_point in scales:
        loss = scale_point.eval_loss
        points.append(Point(scale_point.scale, loss.value, loss.low, loss.high))
    metric = scales[0].eval_loss.metric
    description = (
        f"From {points[0].y:.3f} without the adapter to {points[-1].y:.3f} with all of it; "
        "the band is the 95% interval."
    )
    axes = Axes(
        "Held-out loss, by adapter scale", description, "adapter scale", UNITS.get(metric, metric)
    )
    series = Series(metric.replace("_", " "), tuple(points))
    return [build_line_chart("scales-gain", axes, [series])]
