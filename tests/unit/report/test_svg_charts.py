"""Charts: the drawing and the table agree."""

import re
from collections.abc import Sequence
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
    chart = build_line_chart(name, AXES, series, marks)
    return render_template("chart.html.jinja", chart=chart)


def list_rows(chart: ElementTree.Element) -> list[list[str]]:
    rows: list[list[str]] = []
    for row in chart.iter("tr"):
        rows.append(["".join(cell.itertext()) for cell in row])
    return rows


def test_a_chart_is_well_formed_and_named_and_has_its_numbers() -> None:
    points = tuple(Point(x, 2 / x, 1.8 / x, 2.2 / x) for x in (1, 2, 4))
    marks = [Mark(2, "rollback", "<why>")]
    chart = ElementTree.fromstring(draw("loss", [Series("loss", points)], marks))
    svg = chart.find("svg")
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
        Series("b", (Point(2, 5, 4, 6),), has_dots=True),
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


def test_zero_is_in_the_middle_of_a_strip() -> None:
    strip = build_strip(0.1, 0.2, 0.3)
    assert strip.zero == 80
    assert 80 < strip.low < strip.value < strip.high <= 160
