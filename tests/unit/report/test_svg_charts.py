"""Charts: what is drawn is what the table says."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tunesmith.report.svg_charts import (
    MAX_POINTS,
    Axes,
    Frame,
    Mark,
    Point,
    Series,
    compute_ticks,
    draw_line_chart,
    draw_strip,
    thin_points,
)

AXES = Axes("Loss & <more>", "It falls.", "step", "nats")


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (-3.2, 17), (0.001, 0.0011), (5, 5), (0, 0), (1e-9, 1e9), (-1, -0.5), (97, 10_003)],
)
def test_ticks_are_round_and_hold_all(low: float, high: float) -> None:
    found = compute_ticks(low, high)
    assert 2 <= len(found) <= 8
    assert found[0] <= low <= high <= found[-1]
    distances = {round((b - a) / (found[-1] - found[0]), 6) for a, b in pairwise(found)}
    assert len(distances) == 1


def test_places_are_linear_and_inside() -> None:
    frame = Frame((0, 65), (0, 2))
    assert frame.x_ticks == (0, 20, 40, 60)
    frame = Frame((0, 10), (0, 2))
    assert frame.scale_x(0) < frame.scale_x(5) < frame.scale_x(10)
    assert frame.scale_y(0) > frame.scale_y(1) > frame.scale_y(2)
    assert frame.scale_x(5) == pytest.approx((frame.scale_x(0) + frame.scale_x(10)) / 2)


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html)


def test_a_chart_is_well_formed_named_and_has_its_numbers() -> None:
    points = tuple(Point(x, 2 / x, 1.8 / x, 2.2 / x) for x in (1, 2, 4))
    chart = parsed(
        draw_line_chart("loss", AXES, [Series("loss", points)], [Mark(2, "rollback", "<why>")])
    )
    svg = chart.find("svg")
    assert svg is not None
    assert svg.get("aria-labelledby") == "loss-title loss-desc"
    assert [svg.find(name).text for name in ("title", "desc")] == ["Loss & <more>", "It falls."]  # type: ignore[union-attr]
    cells = [["".join(cell.itertext()) for cell in row] for row in chart.iter("tr")]
    assert cells == [
        ["step", "loss", "95% interval"],
        ["1", "2", "1.8 to 2.2"],
        ["2", "1", "0.9 to 1.1"],
        ["4", "0.5", "0.45 to 0.55"],
    ]
    assert [
        mark.find("title").text for mark in svg.iter("g") if mark.get("class") == "mark rollback"
    ] == [  # type: ignore[union-attr]
        "step 2: <why>"
    ]
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
    made = draw_line_chart("two", AXES, both)
    assert re.findall(r'class="key \w+">(\w)<', made) == ["a", "b"]
    rows = [["".join(cell.itertext()) for cell in row] for row in parsed(made).iter("tr")]
    assert rows == [
        ["step", "a", "b", "95% interval"],
        ["1", "1", "", ""],
        ["2", "2", "5", "4 to 6"],
    ]


def test_a_long_series_is_thinned_and_says_so() -> None:
    points = tuple(Point(x, x) for x in range(1, 10_001))
    kept = thin_points(points)
    assert len(kept) <= MAX_POINTS
    assert kept[-1] == points[-1]
    made = draw_line_chart("long", AXES, [Series("loss", points)])
    assert f"thinned to {MAX_POINTS} points" in made
    assert len(made) < 40_000
    assert thin_points(points[:50]) == points[:50]


def test_zero_is_in_the_middle_of_a_strip() -> None:
    made = parsed(draw_strip(0.1, 0.2, 0.3, style="better", label="+0.2"))
    zero, bar = made.findall("line")
    assert float(zero.get("x1", 0)) == 80
    assert 80 < float(bar.get("x1", 0)) < float(bar.get("x2", 0)) <= 160
    assert made.get("aria-label") == "+0.2"
