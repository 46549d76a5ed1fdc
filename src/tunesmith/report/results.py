"""Results before and after, and the adapter-scale trade-off.

In: ReportData. Out: what results.html.jinja and scales.html.jinja draw, or None without results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.events import Score
from tunesmith.core.types import Comparison, Plan, ScalePoint
from tunesmith.evaluate.scale_choice import (
    build_commands,
    compute_gain_share,
    describe_recommendation,
    recommend_scale,
)
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
    change: str  # of a loss: in % of the value before


@dataclass(frozen=True)
class ScalesView:
    charts: tuple[LineChart, ...]
    recommendation: str
    commands: tuple[str, ...]  # verify it, export it; empty when the adapter as trained is best
    kl_scores: tuple[tuple[str, Score], ...]  # label, score


def build_results(run: ReportData) -> list[ResultRow] | None:
    if run.record is None or not run.record.comparisons:
        return None
    return [_build_row(claim) for claim in build_claims(run.record)]


def _build_row(claim: Claim) -> ResultRow:
    """Draw rates as they are and other metrics in shares of the value before, all on one axis."""
    comparison = claim.comparison
    before = comparison.before.value
    if _is_rate(comparison) or not before:
        return ResultRow(claim, _build_strip(claim, 1.0), "")
    unit = abs(before)
    change = f"{comparison.difference / unit:+.1%}".replace("-", "−")
    return ResultRow(claim, _build_strip(claim, unit), change)


def _is_rate(comparison: Comparison) -> bool:
    values = (comparison.before.value, comparison.after.value)
    return comparison.metric not in UNITS and all(0 <= value <= 1 for value in values)


def _build_strip(claim: Claim, unit: float) -> Strip:
    """Mirror metrics where lower is better, so that better is always to the right."""
    comparison = claim.comparison
    sign = 1 / unit if comparison.higher_is_better else -1 / unit
    low, high = sorted((sign * comparison.low, sign * comparison.high))
    return build_strip(low, sign * comparison.difference, high)


def build_scales(run: ReportData) -> ScalesView | None:
    record = run.record
    if record is None or not (record.scales or record.kl_scores):
        return None
    return ScalesView(
        charts=(
            *_build_tradeoff_chart(record.scales, record.plan),
            *_build_gain_chart(record.scales),
        ),
        recommendation=describe_recommendation(record.scales),
        commands=build_commands(record.scales, str(run.path)),
        kl_scores=tuple(
            (KL_LABELS.get(score.metric, score.metric), score) for score in record.kl_scores
        ),
    )


def _build_tradeoff_chart(scales: Sequence[ScalePoint], plan: Plan) -> list[LineChart]:
    """A point for each scale: right is more of the gain, down is less forgotten."""
    base = scales[0].general_text if scales else None
    if base is None or compute_gain_share(scales, scales[-1]) is None:
        return []
    points: list[Point] = []
    is_paired = True
    for scale_point in scales:
        general = scale_point.general_text
        gain = compute_gain_share(scales, scale_point)
        if general is None or gain is None:
            continue
        note = f"× {scale_point.scale:g}"
        lost = scale_point.general_lost
        if lost is None:
            is_paired = False
            points.append(Point(gain * 100, general.value - base.value, note=note))
        else:
            points.append(Point(gain * 100, lost.value, lost.low, lost.high, note))
    bars = "Bars are 95% intervals of the paired difference from the base."
    if not is_paired:
        bars = "Intervals of the paired difference were not recorded."
    margin = plan.config.forgetting_margin
    best = recommend_scale(scales)
    chosen = tuple(index for index, point in enumerate(scales) if point is best)
    axes = Axes(
        f"General text lost against gain kept, by adapter scale (n = {base.n})",
        f"Share of the gain in held-out loss to the right, bits per byte of general text lost "
        f"upward: right and down is better. {bars} The filled point is the recommended scale, "
        f"the red line the limit of {margin:g}.",
        "gain in held-out loss kept, %  (more is better →)",
        "bits per byte lost (less is better ↓)",
        span=(0, 100),
        limit=margin or None,
    )
    series = Series("bits per byte lost", tuple(points), has_dots=True, filled=chosen)
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
    title = f"Held-out loss, by adapter scale (n = {scales[0].eval_loss.n})"
    axes = Axes(title, description, "adapter scale", UNITS.get(metric, metric))
    series = Series(metric.replace("_", " "), tuple(points))
    return [build_line_chart("scales-gain", axes, [series])]
