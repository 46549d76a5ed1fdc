"""Training curves: the loss, every score over the steps, and what the guard did.

In: ReportData. Out: a CurvesView for each stage, which curves.html.jinja draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from tunesmith.core.events import (
    DATA_CHECK,
    EVAL_TASK,
    PROBE_TASK,
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
MARK_WORDS = {
    "saved": "checkpoint",
    "warn": "warning",
    "rollback": "rollback",
    "stop": "stop",
    "kept": "kept step",
}
RATE_TICKS = (0, 0.25, 0.5, 0.75, 1)
FORGOTTEN = "forgotten"  # bits per byte of general text, lost against the base
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
    checks = [each for each in stage.select_events(CheckResult) if each.kind != DATA_CHECK]
    alerts = [check for check in checks if check.level in ALERT_LEVELS]
    marks: list[Mark] = []
    for event in stage.select_events(CheckpointSaved):
        marks.append(Mark(event.step, "saved", event.path))
    for check in alerts:
        marks.append(Mark(check.step, check.level, f"{check.kind}: {check.evidence}"))
    selection = _mark_selected_step(stage)
    marks += selection
    kinds = dict.fromkeys(mark.kind for mark in marks)
    return CurvesView(
        stage=stage,
        charts=(
            *_build_chart_loss(stage, number, marks),
            *_build_chart_scores(stage, number, marks),
            *_build_chart_steps(stage, number, selection),
        ),
        legend=tuple((kind, f"{MARK_SIGNS[kind]} {MARK_WORDS[kind]}") for kind in kinds),
        alerts=alerts,
        passed=[check for check in checks if check.level not in ALERT_LEVELS],
        samples=[sample for sample in stage.select_events(GenerationSample) if not sample.task],
    )


def _mark_selected_step(stage: StageData) -> list[Mark]:
    step = stage.record.selected_step if stage.record else None
    return [] if step is None else [Mark(step, "kept", "the weights of this step are kept")]


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
    title = "Training loss (log scale)" if min(losses) > 0 else "Training loss"
    axes = Axes(title, description, "step", "nats per token", (0, stage.plan.steps), is_log=True)
    return [build_line_chart(f"loss-{number}", axes, series, marks)]


def _build_chart_steps(stage: StageData, number: int, marks: Sequence[Mark]) -> list[LineChart]:
    """Chart what a step costs and how it is taken: small multiples over the steps."""
    steps = stage.select_events(TrainStep)
    if len(steps) < 2:
        return []
    clip = stage.plan.config.max_grad_norm or None
    values: dict[str, tuple[str, str, list[float], float | None]] = {
        "learning-rate": ("Learning rate", "", [step.learning_rate for step in steps], None),
        "grad-norm": ("Gradient norm before clipping", "", [s.grad_norm for s in steps], clip),
        "speed": (
            "Tokens per second",
            "tokens/s",
            [step.tokens / max(step.seconds, 1e-9) for step in steps],
            None,
        ),
        "memory": ("Peak memory so far", "GB", [step.peak_bytes / 1e9 for step in steps], None),
    }
    charts: list[LineChart] = []
    for name, (title, unit, numbers, limit) in values.items():
        points = tuple(Point(step.step, value) for step, value in zip(steps, numbers, strict=True))
        low = min(point.y for point in points)
        high = max(point.y for point in points)
        shown_limit = limit if limit is not None and limit < 2 * high else None
        axes = Axes(
            title,
            f"From {low:.4g} to {high:.4g}; {points[-1].y:.4g} at the last step.",
            "step",
            unit,
            (0, stage.plan.steps),
            limit=shown_limit,
            limit_name="clipped at",
        )
        charts.append(build_line_chart(f"{name}-{number}", axes, [Series(title, points)], marks))
    return charts


def _build_chart_scores(stage: StageData, number: int, marks: Sequence[Mark]) -> list[LineChart]:
    """Chart each metric that was measured at three steps or more: two are before and after."""
    events_by_metric: dict[tuple[str, str], list[Score]] = {}
    for event in stage.select_events(Score):
        events_by_metric.setdefault((event.task, event.metric), []).append(event)
    charts: list[LineChart] = []
    for index, ((task, metric), events) in enumerate(events_by_metric.items()):
        if len({event.step for event in events}) < 3:
            continue
        start = _find_start(stage, task, metric, events)
        chart_id = f"score-{number}-{index}"
        charts.append(_build_chart_score(stage, chart_id, (*start, *events), marks))
    return charts


def _find_start(
    stage: StageData, task: str, metric: str, events: Sequence[Score]
) -> tuple[Score, ...]:
    """Return the score before training, where the run knows it: of the base model, the loss on
    eval_data; of general text that is lost against it, 0."""
    if events[0].step == 0:
        return ()
    if (task, metric) == (PROBE_TASK, FORGOTTEN):
        return (replace(events[0], value=0.0, low=0.0, high=0.0, step=0),)
    for point in stage.record.scales[:1] if stage.record else ():
        is_base = point.scale == 0 and stage.plan.config.adapter_sha256 is None
        if is_base and task == EVAL_TASK and point.eval_loss.metric == metric:
            return (replace(point.eval_loss, step=0),)
    return ()


def _build_chart_score(
    stage: StageData, chart_id: str, events: Sequence[Score], marks: Sequence[Mark]
) -> LineChart:
    points = [Point(event.step, event.value, event.low, event.high) for event in events]
    first = points[0]
    last = points[-1]
    description = (
        f"From {first.y:.3f} at step {first.x:g} to {last.y:.3f} at step {last.x:g}; "
        "the band is the 95% interval."
    )
    if first.x:
        description += " Not measured before training."
    task = events[-1].task
    metric = events[-1].metric
    label = metric.replace("_", " ")
    counts = sorted({event.n for event in events})
    n = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    title = f"{task}: {label} (n = {n})"
    limit = None
    if (task, metric) == (PROBE_TASK, FORGOTTEN):
        limit = stage.plan.config.forgetting_margin or None
        shown = f"limit {limit:g}, " if limit else ""
        title = f"General text lost, bits per byte ({shown}n = {n})"
    unit = UNITS.get(metric, "" if limit else label)
    is_rate = metric not in UNITS and all(
        0 <= value <= 1 for point in points for value in (point.y, point.low, point.high) if value
    )
    is_rate = is_rate and metric != FORGOTTEN
    axes = Axes(
        title,
        description,
        "step",
        unit,
        (0, stage.plan.steps),
        y_ticks=RATE_TICKS if is_rate else (),
        is_log=metric == "loss",
        limit=limit,
    )
    return build_line_chart(chart_id, axes, [Series(metric, tuple(points))], marks)
