"""Charts as inline SVG, each with a title, a description and a table of its data.

    line_chart("loss", Axes(...), [Series("loss", points)], [Mark(17, "saved", "...")]) -> a figure

Colours and fonts are the page's: elements carry classes, and no style of their own, which the
page's policy forbids. What is drawn is what the table says; longer series are thinned for both, and
the table says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.report.html import Html, join_html, make_details, make_table, make_tag

WIDTH, HEIGHT, PLOT_X0, RIGHT, TOP, BOTTOM = 460, 270, 54, 14, 26, 44
MAX_POINTS = 200
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
    has_dots: bool = False


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
    """From values to places in the drawing, which is as wide as the values and as high as the
    ticks."""

    x_range: tuple[float, float]
    y_ticks: tuple[float, ...]

    @property
    def x_ticks(self) -> tuple[float, ...]:
        low, high = self.x_range
        return tuple(x for x in compute_ticks(low, high) if low <= x <= high)

    def scale_x(self, value: float) -> float:
        low, high = self.x_range
        return round(PLOT_X0 + (value - low) / (high - low) * (WIDTH - PLOT_X0 - RIGHT), 2)

    def scale_y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def compute_ticks(low: float, high: float, max_ticks: int = 6) -> tuple[float, ...]:
    """Round numbers at equal distances, from at most `low` to at least `high`; at least two."""
    if not low < high:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(1, max_ticks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(
        power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= rough * 0.999
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def draw_line_chart(
    name: str, axes: Axes, series: Sequence[Series], marks: Sequence[Mark] = ()
) -> Html:
    """A figure. `name` is unique on the page; series without points are left out, and at least one
    has some."""
    lines = [
        Series(line.name, thin_points(line.points), line.style, line.has_dots)
        for line in series
        if line.points
    ]
    points = [point for line in lines for point in line.points]
    y_values = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    x_values = [*axes.span, *(point.x for point in points), *(mark.x for mark in marks)]
    frame = Frame(_find_ends(x_values), compute_ticks(min(y_values), max(y_values)))
    svg = make_tag(
        "svg",
        *(
            make_tag("title", axes.title, id=f"{name}-title"),
            make_tag("desc", axes.description, id=f"{name}-desc"),
        ),
        *(
            _draw_grid(frame, axes),
            [_draw_mark(frame, mark) for mark in marks],
            [_draw_series(frame, line) for line in lines],
        ),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )
    legend = _draw_legend(lines) if len(lines) > 1 else None
    return make_tag(
        "figure",
        make_tag("figcaption", axes.title),
        svg,
        legend,
        _build_data_table(axes, series, lines),
        class_="chart",
    )


def _find_ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 1, high + 1)


def thin_points(points: Sequence[Point]) -> tuple[Point, ...]:
    """At most MOST_POINTS of them, the last included."""
    stride = -(-len(points) // MAX_POINTS)
    return tuple(
        point for index, point in enumerate(points, start=1 - len(points)) if index % stride == 0
    )


def _draw_grid(frame: Frame, axes: Axes) -> Html:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    lines = [
        make_tag("line", x1=PLOT_X0, x2=right, y1=frame.scale_y(y), y2=frame.scale_y(y))
        for y in frame.y_ticks
    ]
    numbers = [draw_text(PLOT_X0 - 8, frame.scale_y(y) + 4, f"{y:g}", "end") for y in frame.y_ticks]
    numbers += [draw_text(frame.scale_x(x), bottom + 18, f"{x:g}", "middle") for x in frame.x_ticks]
    names = [
        draw_text((PLOT_X0 + right) / 2, HEIGHT - 6, axes.x, "middle"),
        draw_text(4, 14, axes.y),
    ]
    return join_html(
        make_tag("g", lines, class_="grid"),
        make_tag("g", numbers, class_="ticks"),
        make_tag("g", names, class_="names"),
    )


def _draw_series(frame: Frame, series: Series) -> Html:
    """Its band, its line, and its dots with their intervals where the points are few."""
    parts: list[Html] = []
    bounds = [(p, p.low, p.high) for p in series.points if p.low is not None and p.high is not None]
    is_sparse = series.has_dots or len(series.points) == 1
    if is_sparse:
        for p, low, high in bounds:
            parts.append(
                make_tag(
                    "path",
                    d=f"M{frame.scale_x(p.x)} {frame.scale_y(low)}V{frame.scale_y(high)}",
                    class_="bar",
                )
            )
    elif bounds:
        upper = [f"{frame.scale_x(p.x)},{frame.scale_y(high)}" for p, _, high in bounds]
        lower = [f"{frame.scale_x(p.x)},{frame.scale_y(low)}" for p, low, _ in reversed(bounds)]
        parts.append(make_tag("polygon", points=" ".join(upper + lower), class_="band"))
    line = " ".join(f"{frame.scale_x(p.x)},{frame.scale_y(p.y)}" for p in series.points)
    parts.append(make_tag("polyline", points=line, class_="line"))
    if is_sparse or len(series.points) <= 30:
        parts += [
            make_tag(
                "circle", cx=frame.scale_x(p.x), cy=frame.scale_y(p.y), r=3.5 if is_sparse else 2.5
            )
            for p in series.points
        ]
    for index, p in enumerate(series.points):
        if p.note:  # above and below in turn: neighbours may be near
            parts.append(
                draw_text(frame.scale_x(p.x) + 6, frame.scale_y(p.y) + (18, -9)[index % 2], p.note)
            )
    return make_tag("g", parts, class_=f"series {series.style}")


def _draw_mark(frame: Frame, mark: Mark) -> Html:
    x = frame.scale_x(mark.x)
    line = make_tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM)
    title = make_tag("title", f"step {mark.x:g}: {mark.text}")
    return make_tag(
        "g",
        title,
        line,
        draw_text(x, TOP - 6, MARK_SIGNS[mark.kind], "middle"),
        class_=f"mark {mark.kind}",
    )


def draw_text(x: float, y: float, content: str, anchor: str | None = None) -> Html:
    return make_tag("text", content, x=round(x, 2), y=round(y, 2), text_anchor=anchor)


def _draw_legend(series: Sequence[Series]) -> Html:
    return make_tag(
        "p",
        [make_tag("span", line.name, class_=f"key {line.style}") for line in series],
        class_="legend",
    )


def _build_data_table(axes: Axes, all_series: Sequence[Series], plotted: Sequence[Series]) -> Html:
    """The numbers of the drawing. Every series has a column, and its interval if it has one."""
    bounded = [any(p.low is not None for p in column.points) for column in plotted]
    head = [axes.x]
    for column, has_interval in zip(plotted, bounded, strict=True):
        head += [column.name, "95% interval"] if has_interval else [column.name]
    points_by_x = [{point.x: point for point in column.points} for column in plotted]
    rows: list[list[str]] = []
    for x in sorted({x for column in points_by_x for x in column}):
        row = [
            f"{x:g}"
            + "".join(
                f", {column[x].note}" for column in points_by_x if x in column and column[x].note
            )
        ]
        for column, has_interval in zip(points_by_x, bounded, strict=True):
            row += _format_cells(column.get(x), has_interval)
        rows.append(row)
    is_thinned = any(len(column.points) > MAX_POINTS for column in all_series)
    note = (
        make_tag("p", f"Every series is thinned to {MAX_POINTS} points; events.jsonl has all.")
        if is_thinned
        else None
    )
    numbers = range(1, len(head))
    return make_details(
        "Numbers", note, make_table(head, rows, numbers=numbers, label=f"Numbers of: {axes.title}")
    )


def _format_cells(point: Point | None, has_interval: bool) -> list[str]:
    if point is None:
        return ["", ""] if has_interval else [""]
    cells = [f"{point.y:.4g}"]
    if has_interval:
        cells.append(
            ""
            if point.low is None or point.high is None
            else f"{point.low:.4g} to {point.high:.4g}"
        )
    return cells


# ---------------------------------------------------------------- small ones

STRIP_WIDTH, STRIP_HEIGHT = 160, 20


def draw_strip(low: float, value: float, high: float, *, style: str, label: str) -> Html:
    """A difference with its interval beside zero, which stands in the middle."""
    reach = max(abs(low), abs(high), 1e-12) * 1.08

    def scale_x(number: float) -> float:
        return round(STRIP_WIDTH / 2 * (1 + number / reach), 2)

    middle = STRIP_HEIGHT / 2
    return make_tag(
        "svg",
        make_tag("line", x1=scale_x(0), x2=scale_x(0), y1=0, y2=STRIP_HEIGHT, class_="zero"),
        make_tag("line", x1=scale_x(low), x2=scale_x(high), y1=middle, y2=middle, class_="bar"),
        make_tag("circle", cx=scale_x(value), cy=middle, r=4),
        viewBox=f"0 0 {STRIP_WIDTH} {STRIP_HEIGHT}",
        role="img",
        aria_label=label,
        class_=f"strip {style}",
    )
