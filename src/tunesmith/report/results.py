"""Before and after with their intervals, and what the trained weights gain and lose when scaled.

In: a Story. Out: sections, or None where there is nothing to show.
"""

from __future__ import annotations

from tunesmith.core.events import Score
from tunesmith.core.types import ScalePoint
from tunesmith.evaluate.scale_choice import commands, offer
from tunesmith.report.html import Content, Html, quoted, section, table, tag
from tunesmith.report.run_data import Story
from tunesmith.report.summary import UNITS, Claim, claims_of, signed
from tunesmith.report.svg_charts import Axes, Point, Series, line_chart, strip

MOVES = {"kl": "KL divergence, nats per token", "top1_agreement": "top-1 agreement"}


def results_section(story: Story) -> Html | None:
    record = story.record
    if record is None or not record.comparisons:
        return None
    head = ["Measure", "n", "Before", "After", "Change", "← worse · better →", "Verdict"]
    note = tag(
        "p",
        "Each change is the mean of the differences item by item, with its 95% interval; in the drawing zero is the "
        "line in the middle, better is to the right, and every row has its own scale.",
        class_="note",
    )
    rows = [_row(one) for one in claims_of(record)]
    return section(
        "results", "Before and after", table(head, rows, numbers=(1, 2, 3, 4), label="Before and after"), note
    )


def _row(claim: Claim) -> list[Content]:
    one = claim.of
    hint = None if one.higher_is_better else tag("span", " lower is better", class_="soft")
    task = None if one.task == "test" else tag("span", quoted(one.task), class_="over")
    return [
        [task, quoted(one.metric.replace("_", " ")), hint],
        str(one.after.n),
        _value(one.before),
        _value(one.after),
        [signed(one.difference), tag("span", f"{signed(one.low)} to {signed(one.high)}", class_="interval")],
        _strip(claim),
        [tag("b", claim.words, class_=f"outcome {claim.outcome}"), _behind(claim)],
    ]


def _value(score: Score) -> list[Content]:
    return [f"{score.value:.3f}", tag("span", f"{score.low:.3f} to {score.high:.3f}", class_="interval")]


def _behind(claim: Claim) -> Html | None:
    return tag("span", claim.behind, class_="under") if claim.behind else None


def _strip(claim: Claim) -> Html:
    """Turned so that better is to the right."""
    one, turn = claim.of, 1 if claim.of.higher_is_better else -1
    low, high = sorted((turn * one.low, turn * one.high))
    label = f"{signed(one.difference)}, from {signed(one.low)} to {signed(one.high)}: {claim.words}"
    return strip(low, turn * one.difference, high, style=claim.outcome, label=label)


# ---------------------------------------------------------------- gain against forgetting


def scales_section(story: Story) -> Html | None:
    """What the trained weights gain and lose when they are scaled, and how far they are from where they began."""
    record = story.record
    if record is None or not (record.scales or record.moved):
        return None
    charts = [*_traded(record.scales), *_scaled(record.scales)]
    note = (
        "The trained weights times 0 (none of them), 0.25, 0.5, 0.75 and 1 (as trained), without more training. These "
    )
    note += "rows are of eval_data, by which may be chosen; the results above are of test_data, by which nothing was."
    return section(
        "scales",
        "Gain against forgetting",
        [tag("p", note, class_="note"), tag("div", charts, class_="charts")] if charts else None,
        _offered(record.scales, str(story.path)),
        _moved(record.moved),
    )


def _offered(scales: tuple[ScalePoint, ...], run: str) -> Html | None:
    """What may be had instead of the adapter as trained, and how."""
    said, ways = offer(scales), commands(scales, run)
    if not said:
        return None
    if not ways:
        return tag("p", f"{said[0].upper()}{said[1:]}.")
    look, have = (tag("code", way) for way in ways)
    return tag("p", f"Offered: {said}. Other measures may say otherwise: ", look, ". To have it: ", have)


def _traded(scales: tuple[ScalePoint, ...]) -> list[Html]:
    """Each scale as a point: to the right it knows more of the task, upward it has lost more of general text."""
    known = [(point, point.general) for point in scales if point.general is not None]
    if not known:
        return []
    points = tuple(
        Point(point.gain.value, general.value, general.low, general.high, f"× {point.scale:g}")
        for point, general in known
    )
    unit = UNITS.get(known[0][0].gain.metric, known[0][0].gain.metric)
    told = (
        "Held-out loss from right to left, bits per byte of general text upward, lower is better in both; bars are 95%."
    )
    axes = Axes(
        "Held-out loss and general text, by scale", told, f"held-out loss, {unit}", "general text, bits per byte"
    )
    return [line_chart("scales-traded", axes, [Series("bits per byte of general text", points, dots=True)])]


def _scaled(scales: tuple[ScalePoint, ...]) -> list[Html]:
    if not scales:
        return []
    points = tuple(Point(one.scale, one.gain.value, one.gain.low, one.gain.high) for one in scales)
    metric = scales[0].gain.metric
    told = (
        f"From {points[0].y:.3f} without the trained weights to {points[-1].y:.3f} with all of them; the band is 95%."
    )
    axes = Axes("Held-out loss, by scale", told, "trained weights times", UNITS.get(metric, metric))
    return [line_chart("scales-gain", axes, [Series(metric.replace("_", " "), points)])]


def _moved(moved: tuple[Score, ...]) -> Html | None:
    rows = [
        [
            [tag("span", quoted(one.task), class_="over"), quoted(MOVES.get(one.metric, one.metric))],
            str(one.n),
            _value(one),
        ]
        for one in moved
    ]
    title = tag("h3", "How far it moved from where it began")
    return tag("div", title, table(["Measure", "n", "Value"], rows, numbers=(1, 2), label="Moved")) if rows else None
