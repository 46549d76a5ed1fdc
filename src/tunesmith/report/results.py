"""Results before and after, and the adapter-scale trade-off.

In: ReportData. Out: what results.html.jinja and scales.html.jinja draw, or None without results.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.core.document import TextTable
from tunesmith.core.events import Score
from tunesmith.core.types import Comparison
from tunesmith.evaluate.results import DISTANCE_METRICS
from tunesmith.evaluate.scale_choice import (
    build_commands,
    describe_recommendation,
    tabulate_scales,
)
from tunesmith.report.run_data import ReportData
from tunesmith.report.summary import UNITS, Claim, build_claims
from tunesmith.report.svg_charts import Strip, build_strip


@dataclass(frozen=True)
class ResultRow:
    claim: Claim
    strip: Strip
    change: str  # of a loss: in % of the value before


@dataclass(frozen=True)
class ScalesView:
    table: TextTable | None
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
        table=tabulate_scales(record.scales) if record.scales else None,
        recommendation=describe_recommendation(record.scales),
        commands=build_commands(record.scales, str(run.path)),
        kl_scores=tuple(
            (DISTANCE_METRICS.get(score.metric, score.metric), score) for score in record.kl_scores
        ),
    )
