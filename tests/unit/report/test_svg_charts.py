"""Charts: the drawing and the table agree."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tunesmith.report.html import render_template
from tunesmith.report.svg_charts import (
    MAX_POINTS,
    Axes,
    Frame,
    Mark,
    Point,
    Series,
    build_line_chart,
    build_strip,
    compute_log_ticks,
    compute_ticks,
    thin_points,
)

AXES = Axes("Loss & <more>", "It falls.", "step", "nats")


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (-3.2, 17), (0.001, 0.0011), (5, 5), (0, 0), (1e-9, 1e9), (-1, -0.5), (97, 10_003)],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    ticks = compute_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low <= high <= ticks[-1]
    distances = {round((b - a) / (ticks[-1] - ticks[0]), 6) for a, b in pairwise(ticks)}
    assert len(distances) == 1


def test_scales_are_linear() -> None:
    frame = Frame((0, 65), (0, 2))
    assert frame.x_ticks == (0, 20, 40, 60)
    frame = Frame((0, 10), (0, 2))
    assert frame.scale_x(0) < frame.scale_x(5) < frame.scale_x(10)
    assert frame.scale_y(0) > frame.scale_y(1) > frame.scale_y(2)
    assert frame.scale_x(5) == pytest.approx((frame.scale_x(0) + frame.scale_x(10)) / 2)


def draw(name: str, series: Sequence[Series], marks: Sequence[Mark] = ()) -> str:
    """Return a chart with its numbers, as a section of the page has them."""
    chart = build_line_chart(name, AXES, series, marks)
    numbers = render_template("chart_numbers.html.jinja", charts=[chart])
    return f"<div>{render_template('chart.html.jinja', chart=chart)}{numbers}</div>"


def list_rows(chart: ElementTree.Element) -> list[list[str]]:
    rows: list[list[str]] = []
    for row in chart.iter("tr"):
        rows.append(["".join(cell.itertext()) for cell in row])
    return rows


def test_a_chart_is_well_formed_and_named_and_has_its_numbers() -> None:
    points = tuple(Point(x, 2 / x, 1.8 / x, 2.2 / x) for x in (1, 2, 4))
    marks = [Mark(2, "rollback", "<why>")]
    chart = ElementTree.fromstring(draw("loss", [Series("loss", points)], marks))
    svg = chart.find("figure/svg")
    assert svg is not None
    assert svg.get("aria-labelledby") == "loss-title loss-desc"
    assert svg.findtext("title") == "Loss & <more>"
    assert svg.findtext("desc") == "It falls."
    assert list_rows(chart) == [
        ["step", "loss", "95% interval"],
        ["1", "2", "1.8 to 2.2"],
        ["2", "1", "0.9 to 1.1"],
        ["4", "0.5", "0.45 to 0.55"],
    ]
    (mark,) = [group for group in svg.iter("g") if group.get("class") == "mark rollback"]
    assert mark.findtext("title") == "step 2: <why>"
    (line,) = [element.get("points") for element in svg.iter("polyline")]
    assert line is not None
    assert len(line.split()) == 3
    assert [band.get("points") for band in svg.iter("polygon")]


def test_two_series_share_a_table_and_have_a_key() -> None:
    both = [
        Series("a", (Point(1, 1), Point(2, 2))),
        Series("b", (Point(2, 5, 4, 6),)),
        Series("none", ()),
    ]
    html = draw("two", both)
    assert re.findall(r'class="key \w+">(\w)<', html) == ["a", "b"]
    assert list_rows(ElementTree.fromstring(html)) == [
        ["step", "a", "b", "95% interval"],
        ["1", "1", "", ""],
        ["2", "2", "5", "4 to 6"],
    ]


def test_a_long_series_is_thinned_and_says_so() -> None:
    points = tuple(Point(x, x) for x in range(1, 10_001))
    thinned = thin_points(points)
    assert len(thinned) <= MAX_POINTS
    assert thinned[-1] == points[-1]
    html = draw("long", [Series("loss", points)])
    assert f"thinned to {MAX_POINTS} points" in html
    assert len(html) < 40_000
    assert thin_points(points[:50]) == points[:50]


def test_strips_share_one_axis_from_minus_one_to_one() -> None:
    strip = build_strip(0.1, 0.2, 0.3)
    assert strip.zero == 80
    assert 80 < strip.low < strip.value < strip.high < strip.ticks[-1] < 160
    half = build_strip(0, 0.5, 1)
    assert (half.value, half.high) == strip.ticks[-2:] == half.ticks[-2:]
    assert build_strip(-9, -5, 9).low == strip.ticks[0], "what is beyond the axis is at its end"


def test_a_logarithmic_axis_has_the_same_distance_for_the_same_ratio() -> None:
    frame = Frame((0, 10), compute_log_ticks(0.003, 2), is_log=True)
    assert frame.y_ticks == (0.001, 0.01, 0.1, 1, 10)
    distances = {round(a - b) for a, b in pairwise(map(frame.scale_y, frame.y_ticks))}
    assert len(distances) == 1
    assert compute_log_ticks(0.4, 4) == (0.2, 0.5, 1, 2, 5)
    for low, high in [(1, 1), (1e-9, 1e9), (0.999, 1.001), (3, 3.1)]:
        ticks = compute_log_ticks(low, high)
        assert len(ticks) >= 2
        assert ticks[0] <= low <= high <= ticks[-1]


def test_a_value_of_zero_has_no_logarithm() -> None:
    points = (Point(1, 1), Point(2, 0))
    chart = build_line_chart("zero", replace(AXES, is_log=True), [Series("loss", points)])
    assert chart.frame.y_ticks[0] == 0


def test_a_limit_is_a_line_within_the_drawing() -> None:
    axes = replace(AXES, limit=0.5, y_ticks=(0, 1))
    chart = build_line_chart("limit", axes, [Series("lost", (Point(0, 0), Point(1, 0.1)))])
    html = render_template("chart.html.jinja", chart=chart)
    assert "limit 0.5" in html
    assert chart.frame.scale_y(0.5) == (chart.frame.top + chart.frame.bottom) / 2
    frame = build_line_chart("beyond", replace(axes, limit=7), chart.series).frame
    assert frame.top <= frame.scale_y(7) <= frame.bottom
