"""What happened while training: the loss, every score that was taken on the way, and what was saved
or said.

In: a Story. Out: a section. Each stage has its own charts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.core.types import Json
from tunesmith.report.html import (
    Content,
    Html,
    make_details,
    make_section,
    make_table,
    make_tag,
    quote_text,
)
from tunesmith.report.run_data import ReportData, StageData
from tunesmith.report.summary import UNITS
from tunesmith.report.svg_charts import MARK_SIGNS, Axes, Mark, Point, Series, draw_line_chart

SMOOTHING_STEPS = 10  # steps
MAX_TABLE_ROWS = 200
MARK_WORDS = {"saved": "saved", "warn": "warning", "rollback": "rolled back", "stop": "stopped"}
ALERT_LEVELS = ("warn", "rollback", "stop")


def render_curves(story: ReportData) -> Html | None:
    parts = [
        _render_stage(part, number)
        for number, part in enumerate(story.stages, start=1)
        if part.events
    ]
    return make_section("curves", "While training", parts) if parts else None


def _render_stage(part: StageData, number: int) -> Html:
    marks = _build_marks(part)
    charts = [*_draw_loss(part, number, marks), *_draw_scores(part, number, marks)]
    kinds = dict.fromkeys(mark.kind for mark in marks)
    key = [
        make_tag("span", f"{MARK_SIGNS[kind]} {MARK_WORDS[kind]}", class_=f"key mark {kind}")
        for kind in kinds
    ]
    name = make_tag("h3", "Stage ", quote_text(part.name)) if part.name else None
    grid = (
        make_tag("div", charts, class_="charts")
        if charts
        else make_tag("p", "No step is taken yet.")
    )
    return make_tag(
        "div",
        name,
        grid,
        make_tag("p", key, class_="legend") if key else None,
        _render_messages(part),
        _render_samples(part),
    )


def _build_marks(part: StageData) -> list[Mark]:
    saved = [Mark(event["step"], "saved", event["path"]) for event in part.select_events("saved")]
    messages = [event for event in part.select_events("verdict") if event["level"] in ALERT_LEVELS]
    return saved + [
        Mark(message["step"], message["level"], f"{message['kind']}: {message['evidence']}")
        for message in messages
    ]


def _draw_loss(part: StageData, number: int, marks: Sequence[Mark]) -> list[Html]:
    steps = part.select_events("step")
    if not steps:
        return []
    values = [(event["step"], event["loss"]) for event in steps]
    series = [Series("loss of each step", tuple(Point(x, y) for x, y in values), "faint")]
    if len(steps) > 2 * SMOOTHING_STEPS:
        mean = [
            _compute_mean([y for _, y in values[max(0, i + 1 - SMOOTHING_STEPS) : i + 1]])
            for i in range(len(values))
        ]
        smooth = tuple(Point(x, y) for (x, _), y in zip(values, mean, strict=True))
        series.append(Series(f"mean of the last {SMOOTHING_STEPS} steps", smooth))
    few = min(SMOOTHING_STEPS, max(1, len(values) // 4))
    first, last = values[0][1], _compute_mean([y for _, y in values[-few:]])
    where = f"the mean of the last {few}" if few > 1 else "in the last"
    description = f"From {first:.3f} in the first step to {last:.3f}, {where}."
    return [
        draw_line_chart(
            f"loss-{number}",
            Axes("Training loss", description, "step", "nats per token", _find_step_range(part)),
            series,
            marks,
        )
    ]


def _draw_scores(part: StageData, number: int, marks: Sequence[Mark]) -> list[Html]:
    """One chart for each measure that was taken more than once."""
    events_by_metric: dict[tuple[str, str], list[Json]] = {}
    for event in part.select_events("score"):
        events_by_metric.setdefault((event["task"], event["metric"]), []).append(event)
    charts: list[Html] = []
    for index, ((task, metric), events) in enumerate(events_by_metric.items()):
        if len({event["step"] for event in events}) < 3:
            continue  # two are a before and an after, which the table has
        points = tuple(Point(e["step"], e["value"], *_get_bounds(e)) for e in events)
        first, last = points[0], points[-1]
        description = f"From {first.y:.3f} at step {first.x:g} to {last.y:.3f} at step {last.x:g}; the band is the 95% interval."
        word = metric.replace("_", " ")
        axes = Axes(
            f"{task}: {word}", description, "step", UNITS.get(metric, word), _find_step_range(part)
        )
        charts.append(
            draw_line_chart(f"score-{number}-{index}", axes, [Series(metric, points)], marks)
        )
    return charts


def _find_step_range(part: StageData) -> tuple[float, ...]:
    """All charts of a run have the same steps."""
    return (0, part.plan.steps)


def _get_bounds(event: Json) -> tuple[Any, Any]:
    return event.get("low"), event.get("high")


def _render_messages(part: StageData) -> Html | None:
    """What a guard, a proof or the run itself had to say; quiet where all is well."""
    messages = part.select_events("verdict")
    loud = [message for message in messages if message["level"] in ALERT_LEVELS]
    quiet = [message for message in messages if message["level"] not in ALERT_LEVELS]
    loud_table = (
        make_tag(
            "div", make_tag("h3", "What was said"), _build_message_table(loud, "What was said")
        )
        if loud
        else None
    )
    calm = (
        make_details(
            f"{len(quiet)} checks that found nothing wrong", _build_message_table(quiet, "Checks")
        )
        if quiet
        else None
    )
    return make_tag("div", loud_table, calm) if messages else None


def _build_message_table(messages: Sequence[Json], label: str) -> Html:
    rows = [
        [
            str(message["step"]),
            make_tag("b", message["level"], class_=f"level {message['level']}"),
            quote_text(message["kind"]),
            _split_lines(message),
        ]
        for message in messages[-MAX_TABLE_ROWS:]
    ]
    num_omitted = len(messages) - len(rows)
    note = (
        make_tag(
            "p",
            f"The last {MAX_TABLE_ROWS}; {num_omitted} before them are in events.jsonl.",
            class_="note",
        )
        if num_omitted
        else None
    )
    return make_tag(
        "div",
        note,
        make_table(["Step", "Level", "By", "Evidence"], rows, numbers=(0,), label=label),
    )


def _split_lines(message: Json) -> Content:
    return [make_tag("div", quote_text(line)) for line in message["evidence"].splitlines()]


def _render_samples(part: StageData) -> Html | None:
    """What the model wrote on the way, where a guard asked it."""
    samples = part.select_events("sample")
    if not samples:
        return None
    rows = [
        [
            str(sample["step"]),
            quote_text(sample["id"]),
            quote_text(sample["prompt"][:300]),
            quote_text(sample["answer"][:600]),
        ]
        for sample in samples[-MAX_TABLE_ROWS:]
    ]
    summary = f"What the model wrote on the way, {len(samples)} times" + (
        f", the last {len(rows)} of them" if len(rows) < len(samples) else ""
    )
    return make_details(
        summary,
        make_table(
            ["Step", "Row", "Prompt", "Answer"], rows, numbers=(0,), label="Answers on the way"
        ),
    )


def _compute_mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
