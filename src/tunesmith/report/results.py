"""Before and after with their intervals, and what the trained weights gain and lose when scaled.

In: a Story. Out: sections, or None where there is nothing to show.
"""

from __future__ import annotations

from tunesmith.core.events import Score
from tunesmith.core.types import ScalePoint
from tunesmith.evaluate.scale_choice import build_commands, describe_recommendation
from tunesmith.report.html import Content, Html, make_section, make_table, make_tag, quote_text
from tunesmith.report.run_data import ReportData
from tunesmith.report.summary import UNITS, Claim, build_claims, format_signed
from tunesmith.report.svg_charts import Axes, Point, Series, draw_line_chart, draw_strip

KL_LABELS = {"kl": "KL divergence, nats per token", "top1_agreement": "top-1 agreement"}


def render_results(story: ReportData) -> Html | None:
    record = story.record
    if record is None or not record.comparisons:
        return None
    head = ["Measure", "n", "Before", "After", "Change", "← worse · better →", "Verdict"]
    note = make_tag(
        "p",
        "Each change is the mean of the differences item by item, with its 95% interval; in the drawing zero is the "
        "line in the middle, better is to the right, and every row has its own scale.",
        class_="note",
    )
    rows = [_build_row(claim) for claim in build_claims(record)]
    return make_section(
        "results",
        "Before and after",
        make_table(head, rows, numbers=(1, 2, 3, 4), label="Before and after"),
        note,
    )


def _build_row(claim: Claim) -> list[Content]:
    comparison = claim.comparison
    hint = (
        None if comparison.higher_is_better else make_tag("span", " lower is better", class_="soft")
    )
    task = (
        None
        if comparison.task == "test"
        else make_tag("span", quote_text(comparison.task), class_="over")
    )
    return [
        [task, quote_text(comparison.metric.replace("_", " ")), hint],
        str(comparison.after.n),
        _format_value(comparison.before),
        _format_value(comparison.after),
        [
            format_signed(comparison.difference),
            make_tag(
                "span",
                f"{format_signed(comparison.low)} to {format_signed(comparison.high)}",
                class_="interval",
            ),
        ],
        _draw_strip(claim),
        [make_tag("b", claim.verdict, class_=f"outcome {claim.outcome}"), _render_evidence(claim)],
    ]


def _format_value(score: Score) -> list[Content]:
    return [
        f"{score.value:.3f}",
        make_tag("span", f"{score.low:.3f} to {score.high:.3f}", class_="interval"),
    ]


def _render_evidence(claim: Claim) -> Html | None:
    return make_tag("span", claim.evidence, class_="under") if claim.evidence else None


def _draw_strip(claim: Claim) -> Html:
    """Turned so that better is to the right."""
    comparison, turn = claim.comparison, 1 if claim.comparison.higher_is_better else -1
    low, high = sorted((turn * comparison.low, turn * comparison.high))
    label = f"{format_signed(comparison.difference)}, from {format_signed(comparison.low)} to {format_signed(comparison.high)}: {claim.verdict}"
    return draw_strip(low, turn * comparison.difference, high, style=claim.outcome, label=label)


# ---------------------------------------------------------------- gain against forgetting


def render_scales(story: ReportData) -> Html | None:
    """What the trained weights gain and lose when they are scaled, and how far they are from where
    they began."""
    record = story.record
    if record is None or not (record.scales or record.kl_scores):
        return None
    charts = [*_draw_tradeoff(record.scales), *_draw_gain(record.scales)]
    note = "The trained weights times 0 (none of them), 0.25, 0.5, 0.75 and 1 (as trained), without more training. These "
    note += "rows are of eval_data, by which may be chosen; the results above are of test_data, by which nothing was."
    return make_section(
        "scales",
        "Gain against forgetting",
        [make_tag("p", note, class_="note"), make_tag("div", charts, class_="charts")]
        if charts
        else None,
        _render_recommendation(record.scales, str(story.path)),
        _render_kl(record.kl_scores),
    )


def _render_recommendation(scales: tuple[ScalePoint, ...], run: str) -> Html | None:
    """What may be had instead of the adapter as trained, and how."""
    recommendation, command_lines = describe_recommendation(scales), build_commands(scales, run)
    if not recommendation:
        return None
    if not command_lines:
        return make_tag("p", f"{recommendation[0].upper()}{recommendation[1:]}.")
    compare_command, export_command = (make_tag("code", command) for command in command_lines)
    return make_tag(
        "p",
        f"Offered: {recommendation}. Other measures may say otherwise: ",
        compare_command,
        ". To have it: ",
        export_command,
    )


def _draw_tradeoff(scales: tuple[ScalePoint, ...]) -> list[Html]:
    """Each scale as a point: to the right it knows more of the task, upward it has lost more of
    general text."""
    general_points = [
        (point, point.general_text) for point in scales if point.general_text is not None
    ]
    if not general_points:
        return []
    points = tuple(
        Point(point.eval_loss.value, general.value, general.low, general.high, f"× {point.scale:g}")
        for point, general in general_points
    )
    unit = UNITS.get(general_points[0][0].eval_loss.metric, general_points[0][0].eval_loss.metric)
    description = "Held-out loss from right to left, bits per byte of general text upward, lower is better in both; bars are 95%."
    axes = Axes(
        "Held-out loss and general text, by scale",
        description,
        f"held-out loss, {unit}",
        "general text, bits per byte",
    )
    return [
        draw_line_chart(
            "scales-traded", axes, [Series("bits per byte of general text", points, has_dots=True)]
        )
    ]


def _draw_gain(scales: tuple[ScalePoint, ...]) -> list[Html]:
    if not scales:
        return []
    points = tuple(
        Point(point.scale, point.eval_loss.value, point.eval_loss.low, point.eval_loss.high)
        for point in scales
    )
    metric = scales[0].eval_loss.metric
    description = f"From {points[0].y:.3f} without the trained weights to {points[-1].y:.3f} with all of them; the band is 95%."
    axes = Axes(
        "Held-out loss, by scale", description, "trained weights times", UNITS.get(metric, metric)
    )
    return [draw_line_chart("scales-gain", axes, [Series(metric.replace("_", " "), points)])]


def _render_kl(moved: tuple[Score, ...]) -> Html | None:
    rows = [
        [
            [
                make_tag("span", quote_text(score.task), class_="over"),
                quote_text(KL_LABELS.get(score.metric, score.metric)),
            ],
            str(score.n),
            _format_value(score),
        ]
        for score in moved
    ]
    title = make_tag("h3", "How far it moved from where it began")
    return (
        make_tag(
            "div", title, make_table(["Measure", "n", "Value"], rows, numbers=(1, 2), label="Moved")
        )
        if rows
        else None
    )
