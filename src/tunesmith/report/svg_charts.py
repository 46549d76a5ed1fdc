"""Charts as inline SVG, each with a title, a description and a table of its data.

    line_chart("loss", Axes(...), [Series("loss", points)], [Mark(17, "saved", "...")]) -> a figure

Colours and fonts are the page's: elements carry classes, and no style of their own, which the page's policy forbids.
What is drawn is what the table says; longer series are thinned for both, and the table says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.report.html import Html, details, join, table, tag

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 270, 54, 14, 26, 44
MOST_POINTS = 200
MARK_SIGNS = {"saved": "▾", "warn": "◆", "rollback": "↺", "stop": "■"}


@dataclass(frozen=True)
class Point:
    """`low` and `high`: the interval of y. `note`: what the point is, if x does not say it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    name: str
    points: tuple[Point, ...]
    style: str = "main"  # main | faint | base: the classes of page.css
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at x. `kind`: a key of MARK_SIGNS."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Axes:
    title: str
    description: str
    x: str
    y: str
    span: tuple[float, ...] = ()  # values of x that are shown in any case


@dataclass(frozen=True)
class Frame:
    """From values to places in the drawing, which is as wide as the values and as high as the ticks."""

    ends: tuple[float, float]
    ys: tuple[float, ...]

    @property
    def xs(self) -> tuple[float, ...]:
        low, high = self.ends
        return tuple(x for x in ticks(low, high) if low <= x <= high)

    def x(self, value: float) -> float:
        low, high = self.ends
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        share = (value - self.ys[0]) / (self.ys[-1] - self.ys[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def ticks(low: float, high: float, most: int = 6) -> tuple[float, ...]:
    """Round numbers at equal distances, from at most `low` to at least `high`; at least two."""
    if not low < high:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(place * step, 12) for place in range(first, last + 1))


def line_chart(name: str, axes: Axes, series: Sequence[Series], marks: Sequence[Mark] = ()) -> Html:
    """A figure. `name` is unique on the page; series without points are left out, and at least one has some."""
    drawn = [Series(one.name, thinned(one.points), one.style, one.dots) for one in series if one.points]
    points = [point for one in drawn for point in one.points]
    reach = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    places = [*axes.span, *(point.x for point in points), *(mark.x for mark in marks)]
    frame = Frame(_ends(places), ticks(min(reach), max(reach)))
    svg = tag(
        "svg",
        *(tag("title", axes.title, id=f"{name}-title"), tag("desc", axes.description, id=f"{name}-desc")),
        *(_grid(frame, axes), [_marked(frame, mark) for mark in marks], [_drawn(frame, one) for one in drawn]),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )
    legend = _legend(drawn) if len(drawn) > 1 else None
    return tag("figure", tag("figcaption", axes.title), svg, legend, _data(axes, series, drawn), class_="chart")


def _ends(places: Sequence[float]) -> tuple[float, float]:
    low, high = min(places), max(places)
    return (low, high) if low < high else (low - 1, high + 1)


def thinned(points: Sequence[Point]) -> tuple[Point, ...]:
    """At most MOST_POINTS of them, the last included."""
    every = -(-len(points) // MOST_POINTS)
    return tuple(point for place, point in enumerate(points, start=1 - len(points)) if place % every == 0)


def _grid(frame: Frame, axes: Axes) -> Html:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    lines = [tag("line", x1=LEFT, x2=right, y1=frame.y(y), y2=frame.y(y)) for y in frame.ys]
    numbers = [text(LEFT - 8, frame.y(y) + 4, f"{y:g}", "end") for y in frame.ys]
    numbers += [text(frame.x(x), bottom + 18, f"{x:g}", "middle") for x in frame.xs]
    names = [text((LEFT + right) / 2, HEIGHT - 6, axes.x, "middle"), text(4, 14, axes.y)]
    return join(tag("g", lines, class_="grid"), tag("g", numbers, class_="ticks"), tag("g", names, class_="names"))


def _drawn(frame: Frame, series: Series) -> Html:
    """Its band, its line, and its dots with their intervals where the points are few."""
    parts: list[Html] = []
    bounds = [(p, p.low, p.high) for p in series.points if p.low is not None and p.high is not None]
    few = series.dots or len(series.points) == 1
    if few:
        for p, low, high in bounds:
            parts.append(tag("path", d=f"M{frame.x(p.x)} {frame.y(low)}V{frame.y(high)}", class_="bar"))
    elif bounds:
        upper = [f"{frame.x(p.x)},{frame.y(high)}" for p, _, high in bounds]
        lower = [f"{frame.x(p.x)},{frame.y(low)}" for p, low, _ in reversed(bounds)]
        parts.append(tag("polygon", points=" ".join(upper + lower), class_="band"))
    line = " ".join(f"{frame.x(p.x)},{frame.y(p.y)}" for p in series.points)
    parts.append(tag("polyline", points=line, class_="line"))
    if few or len(series.points) <= 30:
        parts += [tag("circle", cx=frame.x(p.x), cy=frame.y(p.y), r=3.5 if few else 2.5) for p in series.points]
    for place, p in enumerate(series.points):
        if p.note:  # above and below in turn: neighbours may be near
            parts.append(text(frame.x(p.x) + 6, frame.y(p.y) + (18, -9)[place % 2], p.note))
    return tag("g", parts, class_=f"series {series.style}")


def _marked(frame: Frame, mark: Mark) -> Html:
    x = frame.x(mark.x)
    line = tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM)
    title = tag("title", f"step {mark.x:g}: {mark.text}")
    return tag("g", title, line, text(x, TOP - 6, MARK_SIGNS[mark.kind], "middle"), class_=f"mark {mark.kind}")


def text(x: float, y: float, content: str, anchor: str | None = None) -> Html:
    return tag("text", content, x=round(x, 2), y=round(y, 2), text_anchor=anchor)


def _legend(series: Sequence[Series]) -> Html:
    return tag("p", [tag("span", one.name, class_=f"key {one.style}") for one in series], class_="legend")


def _data(axes: Axes, whole: Sequence[Series], drawn: Sequence[Series]) -> Html:
    """The numbers of the drawing. Every series has a column, and its interval if it has one."""
    bounded = [any(p.low is not None for p in one.points) for one in drawn]
    head = [axes.x]
    for one, has in zip(drawn, bounded, strict=True):
        head += [one.name, "95% interval"] if has else [one.name]
    found = [{point.x: point for point in one.points} for one in drawn]
    rows: list[list[str]] = []
    for x in sorted({x for one in found for x in one}):
        row = [f"{x:g}" + "".join(f", {one[x].note}" for one in found if x in one and one[x].note)]
        for one, has in zip(found, bounded, strict=True):
            row += _cells(one.get(x), has)
        rows.append(row)
    thin = any(len(one.points) > MOST_POINTS for one in whole)
    note = tag("p", f"Every series is thinned to {MOST_POINTS} points; events.jsonl has all.") if thin else None
    numbers = range(1, len(head))
    return details("Numbers", note, table(head, rows, numbers=numbers, label=f"Numbers of: {axes.title}"))


def _cells(point: Point | None, has_interval: bool) -> list[str]:
    if point is None:
        return ["", ""] if has_interval else [""]
    cells = [f"{point.y:.4g}"]
    if has_interval:
        cells.append("" if point.low is None or point.high is None else f"{point.low:.4g} to {point.high:.4g}")
    return cells


# ---------------------------------------------------------------- small ones

STRIP_WIDTH, STRIP_HEIGHT = 160, 20


def strip(low: float, value: float, high: float, *, style: str, label: str) -> Html:
    """A difference with its interval beside zero, which stands in the middle."""
    reach = max(abs(low), abs(high), 1e-12) * 1.08

    def x(number: float) -> float:
        return round(STRIP_WIDTH / 2 * (1 + number / reach), 2)

    middle = STRIP_HEIGHT / 2
    return tag(
        "svg",
        tag("line", x1=x(0), x2=x(0), y1=0, y2=STRIP_HEIGHT, class_="zero"),
        tag("line", x1=x(low), x2=x(high), y1=middle, y2=middle, class_="bar"),
        tag("circle", cx=x(value), cy=middle, r=4),
        viewBox=f"0 0 {STRIP_WIDTH} {STRIP_HEIGHT}",
        role="img",
        aria_label=label,
        class_=f"strip {style}",
    )
