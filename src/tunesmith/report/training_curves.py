"""Training curves: the loss, every score over the steps, and what the guard did.

In: ReportData. Out: a CurvesView for each stage, which curves.html.jinja draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tunesmith.core.events import (
    CheckpointSaved,
    CheckResult,
    GenerationSample,
    Score,
    TrainStep,
)
from tunesmith.report.run_data import ReportData, StageData
from tunesmith.report.summary import UNITS
from tunesmith.report.svg_charts import (
    MARK_SIGNS,
    Axes,
    LineChart,
    Mark,
    Point,
    Series,
    build_line_chart,
)

SMOOTHING_STEPS = 10
MAX_TABLE_ROWS = 200
MARK_WORDS = {"saved": "checkpoint", "warn": "warning", "rollback": "rollback", "stop": "stop"}
ALERT_LEVELS = ("warn", "rollback", "stop")


@dataclass(frozen=True)
class CurvesView:
    stage: StageData
    charts: tuple[LineChart, ...]
    legend: tuple[tuple[str, str], ...]  # kind of a mark, sign and word
    alerts: list[CheckResult]
    passed: list[CheckResult]
    samples: list[GenerationSample]
    max_rows: int = MAX_TABLE_ROWS


def build_curves(run: ReportData) -> list[CurvesView] | None:
    views: list[CurvesView] = []
    for number, stage in enumerate(run.stages, start=1):
        if stage.events:
            views.append(_build_stage_curves(stage, number))
    return views or None


def _build_stage_curves(stage: StageData, number: int) -> CurvesView:
    checks = stage.select_events(CheckResult)
    alerts = [check for check in checks if check.level in ALERT_LEVELS]
    marks: list[Mark] = []
    for event in stage.select_events(CheckpointSaved):
        marks.append(Mark(event.step, "saved", event.path))
    for check in alerts:
        marks.append(Mark(check.step, check.level, f"{check.kind}: {check.evidence}"))
    kinds = dict.fromkeys(mark.kind for mark in marks)
    return CurvesView(
        stage=stage,
        charts=(
            *_build_chart_loss(stage, number, marks),
            *_build_chart_scores(stage, number, marks),
        ),
        legend=tuple((kind, f"{MARK_SIGNS[kind]} {MARK_WORDS[kind]}") for kind in kinds),
        alerts=alerts,
        passed=[check for check in checks if check.level not in ALERT_LEVELS],
        samples=[sample for sample in stage.select_events(GenerationSample) if not sample.task],
    )


def _build_chart_loss(stage: StageData, number: int, marks: Sequence[Mark]) -> list[LineChart]:
    steps = stage.select_events(TrainStep)
    if not steps:
        return []
    losses = [step.loss for step in steps]
    points = tuple(Point(step.step, step.loss) for step in steps)
    series = [Series("loss per step", points, "faint")]
    if len(steps) > 2 * SMOOTHING_STEPS:
        smooth: list[Point] = []
        for index, point in enumerate(points):
            window = losses[max(0, index + 1 - SMOOTHING_STEPS) : index + 1]
            smooth.append(Point(point.x, fmean(window)))
        series.append(Series(f"mean of the last {SMOOTHING_STEPS} steps", tuple(smooth)))
    tail = min(SMOOTHING_STEPS, max(1, len(losses) // 4))
    last = f"the mean of the last {tail} steps" if tail > 1 else "at the last step"
    description = f"From {losses[0]:.3f} at the first step to {fmean(losses[-tail:]):.3f}, {last}."
    axes = Axes("Training loss", description, "step", "nats per token", (0, stage.plan.steps))
    return [build_line_chart(f"loss-{number}", axes, series, marks)]


def _build_chart_scores(stage: StageData, number: int, marks: Sequence[Mark]) -> list[LineChart]:
    """Chart each metric that was measured at three steps or more: two are before and after."""
    events_by_metric: dict[tuple[str, str], list[Score]] = {}
    for event in stage.select_events(Score):
        events_by_metric.setdefault((event.task, event.metric), []).append(event)
    charts: list[LineChart] = []
    for index, ((task, metric), events) in enumerate(events_by_metric.items()):
        if len({event.step for event in events}) < 3:
            continue
        points: list[Point] = []
        for event in events:
            points.append(Point(event.step, event.value, event.low, event.high))
        first = points[0]
        last = points[-1]
        description = (
            f"From {first.y:.3f} at step {first.x:g} to {last.y:.3f} at step {last.x:g}; "
            "the band is the 95% interval."
        )
        label = metric.replace("_", " ")
        unit = UNITS.get(metric, label)
        axes = Axes(f"{task}: {label}", description, "step", unit, (0, stage.plan.steps))
        series = Series(metric, tuple(points))
        charts.append(build_line_chart(f"score-{number}-{index}", axes, [series], marks))
    return charts
