"""What happened while training: the loss, every score that was taken on the way, and what was saved or said.

In: a Story. Out: a section. Each stage has its own charts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.core.types import Json
from tunesmith.report.html import Content, Html, details, quoted, section, table, tag
from tunesmith.report.run_data import Part, Story
from tunesmith.report.summary import UNITS
from tunesmith.report.svg_charts import MARK_SIGNS, Axes, Mark, Point, Series, line_chart

SMOOTH = 10  # steps
MOST_TOLD = 200
MARK_WORDS = {"saved": "saved", "warn": "warning", "rollback": "rolled back", "stop": "stopped"}
LEVELS = ("warn", "rollback", "stop")


def curves_section(story: Story) -> Html | None:
    parts = [_of_part(part, number) for number, part in enumerate(story.parts, start=1) if part.events]
    return section("curves", "While training", parts) if parts else None


def _of_part(part: Part, number: int) -> Html:
    marks = _marks(part)
    charts = [*_loss(part, number, marks), *_scores(part, number, marks)]
    kinds = dict.fromkeys(mark.kind for mark in marks)
    key = [tag("span", f"{MARK_SIGNS[kind]} {MARK_WORDS[kind]}", class_=f"key mark {kind}") for kind in kinds]
    name = tag("h3", "Stage ", quoted(part.name)) if part.name else None
    grid = tag("div", charts, class_="charts") if charts else tag("p", "No step is taken yet.")
    return tag("div", name, grid, tag("p", key, class_="legend") if key else None, _told(part), _said(part))


def _marks(part: Part) -> list[Mark]:
    saved = [Mark(event["step"], "saved", event["path"]) for event in part.of_type("saved")]
    said = [event for event in part.of_type("verdict") if event["level"] in LEVELS]
    return saved + [Mark(one["step"], one["level"], f"{one['kind']}: {one['evidence']}") for one in said]


def _loss(part: Part, number: int, marks: Sequence[Mark]) -> list[Html]:
    steps = part.of_type("step")
    if not steps:
        return []
    values = [(event["step"], event["loss"]) for event in steps]
    series = [Series("loss of each step", tuple(Point(x, y) for x, y in values), "faint")]
    if len(steps) > 2 * SMOOTH:
        mean = [_mean([y for _, y in values[max(0, i + 1 - SMOOTH) : i + 1]]) for i in range(len(values))]
        smooth = tuple(Point(x, y) for (x, _), y in zip(values, mean, strict=True))
        series.append(Series(f"mean of the last {SMOOTH} steps", smooth))
    few = min(SMOOTH, max(1, len(values) // 4))
    first, last = values[0][1], _mean([y for _, y in values[-few:]])
    where = f"the mean of the last {few}" if few > 1 else "in the last"
    told = f"From {first:.3f} in the first step to {last:.3f}, {where}."
    return [
        line_chart(f"loss-{number}", Axes("Training loss", told, "step", "nats per token", _span(part)), series, marks)
    ]


def _scores(part: Part, number: int, marks: Sequence[Mark]) -> list[Html]:
    """One chart for each measure that was taken more than once."""
    found: dict[tuple[str, str], list[Json]] = {}
    for event in part.of_type("score"):
        found.setdefault((event["task"], event["metric"]), []).append(event)
    charts: list[Html] = []
    for place, ((task, metric), events) in enumerate(found.items()):
        if len({event["step"] for event in events}) < 3:
            continue  # two are a before and an after, which the table has
        points = tuple(Point(e["step"], e["value"], *_bounds(e)) for e in events)
        first, last = points[0], points[-1]
        told = (
            f"From {first.y:.3f} at step {first.x:g} to {last.y:.3f} at step {last.x:g}; the band is the 95% interval."
        )
        word = metric.replace("_", " ")
        axes = Axes(f"{task}: {word}", told, "step", UNITS.get(metric, word), _span(part))
        charts.append(line_chart(f"score-{number}-{place}", axes, [Series(metric, points)], marks))
    return charts


def _span(part: Part) -> tuple[float, ...]:
    """All charts of a run have the same steps."""
    return (0, part.plan.steps)


def _bounds(event: Json) -> tuple[Any, Any]:
    return event.get("low"), event.get("high")


def _told(part: Part) -> Html | None:
    """What a guard, a proof or the run itself had to say; quiet where all is well."""
    said = part.of_type("verdict")
    loud = [one for one in said if one["level"] in LEVELS]
    quiet = [one for one in said if one["level"] not in LEVELS]
    loud_table = tag("div", tag("h3", "What was said"), _verdicts(loud, "What was said")) if loud else None
    calm = details(f"{len(quiet)} checks that found nothing wrong", _verdicts(quiet, "Checks")) if quiet else None
    return tag("div", loud_table, calm) if said else None


def _verdicts(said: Sequence[Json], label: str) -> Html:
    rows = [
        [str(one["step"]), tag("b", one["level"], class_=f"level {one['level']}"), quoted(one["kind"]), _lines(one)]
        for one in said[-MOST_TOLD:]
    ]
    left = len(said) - len(rows)
    note = tag("p", f"The last {MOST_TOLD}; {left} before them are in events.jsonl.", class_="note") if left else None
    return tag("div", note, table(["Step", "Level", "By", "Evidence"], rows, numbers=(0,), label=label))


def _lines(said: Json) -> Content:
    return [tag("div", quoted(line)) for line in said["evidence"].splitlines()]


def _said(part: Part) -> Html | None:
    """What the model wrote on the way, where a guard asked it."""
    samples = part.of_type("sample")
    if not samples:
        return None
    rows = [
        [str(one["step"]), quoted(one["id"]), quoted(one["prompt"][:300]), quoted(one["answer"][:600])]
        for one in samples[-MOST_TOLD:]
    ]
    summary = f"What the model wrote on the way, {len(samples)} times" + (
        f", the last {len(rows)} of them" if len(rows) < len(samples) else ""
    )
    return details(summary, table(["Step", "Row", "Prompt", "Answer"], rows, numbers=(0,), label="Answers on the way"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
