"""Lay out charts: from series to shapes in pixels, which chart.html.jinja draws as inline SVG.

    build_line_chart("loss", Axes(...), [Series("loss", points)], [Mark(17, "saved", "...")])

Each chart has a title, a description and a table with the numbers that are drawn. Colors and fonts
come from classes in page.css, since the page's policy forbids inline styles. Long series are
thinned, in the drawing and in the table, and the page says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WIDTH = 340  # pixels: about that of a phone, so that text keeps its size
HEIGHT = 220
# margins
LEFT = 54
RIGHT = 14
TOP = 32
BOTTOM = 42
MAX_POINTS = 200
MARK_SIGNS = {"saved": "▾", "warn": "◆", "rollback": "↺", "stop": "■", "kept": "★"}


@dataclass(frozen=True)
class Point:
    """A value with its interval `low` to `high`."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, ...]:
        return () if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Series:
    name: str
    points: tuple[Point, ...]
    style: str = "main"  # main | faint: the classes of page.css

    @property
    def has_interval(self) -> bool:
        return any(point.interval for point in self.points)

    def format_cells(self, point: Point) -> list[str]:
        """Return the value and, if the series has intervals, that of the point."""
        interval = " to ".join(f"{value:.4g}" for value in point.interval)
        return [f"{point.y:.4g}", interval][: 1 + self.has_interval]


@dataclass(frozen=True)
class Mark:
    """An event at x; `kind` is a key of MARK_SIGNS."""

    x: float
    kind: str
    text: str

    @property
    def sign(self) -> str:
        return MARK_SIGNS[self.kind]

    @property
    def title(self) -> str:
        return f"step {self.x:g}: {self.text}"


@dataclass(frozen=True)
class Axes:
    title: str
    description: str
    x: str
    y: str
    span: tuple[float, ...] = ()  # values of x that the axis always covers
    y_ticks: tuple[float, ...] = ()  # of a fixed axis; empty: as the values need it
    is_log: bool = False  # of y; only for values above 0
    limit: float | None = None  # a red line
    limit_name: str = "limit"


@dataclass(frozen=True)
class Frame:
    """Map values to pixels: the plot spans `x_range`, and the y ticks from first to last."""

    x_range: tuple[float, float]
    y_ticks: tuple[float, ...]
    is_log: bool = False
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM

    @property
    def x_ticks(self) -> tuple[float, ...]:
        low, high = self.x_range
        return tuple(x for x in compute_ticks(low, high) if low <= x <= high)

    def scale_x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 2)

    def scale_y(self, value: float) -> float:
        low = self.y_ticks[0]
        high = self.y_ticks[-1]
        if self.is_log:
            value = max(value, low)
            fraction = math.log(value / low) / math.log(high / low)
        else:
            fraction = (value - low) / (high - low)
        return round(self.bottom - fraction * (self.bottom - self.top), 2)


def compute_ticks(low: float, high: float, max_ticks: int = 6) -> tuple[float, ...]:
    """Return at least two round, equidistant numbers that cover `low` to `high`."""
    if not low < high:
        pad = abs(low) * 0.1 or 1.0
        low -= pad
        high += pad
    rough = (high - low) / max(1, max_ticks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [power * factor for factor in (1, 2, 2.5, 5, 10, 20)]
    step = next(step for step in steps if step >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def compute_log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return 1, 2 and 5 times powers of ten that cover `low` to `high`; of many, powers alone."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    values = [round(factor * 10.0**power, 12) for power in decades for factor in factors]
    first = max(index for index, value in enumerate(values) if value <= low or index == 0)
    last = min((i for i, value in enumerate(values) if value >= high), default=len(values) - 1)
    return tuple(values[first : max(last, first + 1) + 1])


@dataclass(frozen=True)
class LineChart:
    """What chart.html.jinja draws: series and marks in a frame, and their numbers as a table."""

    id: str
    axes: Axes
    frame: Frame
    series: tuple[Series, ...]
    marks: tuple[Mark, ...]
    is_thinned: bool
    max_points: int = MAX_POINTS

    @property
    def columns(self) -> list[str]:
        columns = [self.axes.x]
        for line in self.series:
            columns += [line.name, "95% interval"] if line.has_interval else [line.name]
        return columns

    @property
    def rows(self) -> list[list[str]]:
        """A row for each x, with a cell for each series, and one for its interval if any."""
        cells_by_x: list[dict[float, list[str]]] = []
        for line in self.series:
            cells_by_x.append({point.x: line.format_cells(point) for point in line.points})
        rows: list[list[str]] = []
        for x in sorted(set().union(*cells_by_x)):
            rows.append([f"{x:g}"])
            for line, cells in zip(self.series, cells_by_x, strict=True):
                rows[-1] += cells.get(x, [""] * (1 + line.has_interval))
        return rows


def build_line_chart(
    chart_id: str, axes: Axes, series: Sequence[Series], marks: Sequence[Mark] = ()
) -> LineChart:
    """Lay out a chart. `chart_id` is unique on the page; at least one series has points."""
    drawn = [replace(line, points=thin_points(line.points)) for line in series if line.points]
    x_values = [*axes.span, *(mark.x for mark in marks)]
    y_values = [] if axes.limit is None else [axes.limit]
    for line in drawn:
        for point in line.points:
            x_values.append(point.x)
            y_values += [value for value in (point.y, *point.interval) if value is not None]
    is_log = axes.is_log and min(y_values) > 0
    return LineChart(
        id=chart_id,
        axes=axes,
        frame=Frame(_find_range(x_values), _choose_ticks(axes, y_values, is_log), is_log),
        series=tuple(drawn),
        marks=tuple(marks),
        is_thinned=any(len(line.points) > MAX_POINTS for line in series),
    )


def _choose_ticks(axes: Axes, y_values: Sequence[float], is_log: bool) -> tuple[float, ...]:
    low = min(y_values)
    high = max(y_values)
    if axes.y_ticks and axes.y_ticks[0] <= low and high <= axes.y_ticks[-1]:
        return axes.y_ticks
    return compute_log_ticks(low, high) if is_log else compute_ticks(low, high, 5)


def _find_range(values: Sequence[float]) -> tuple[float, float]:
    low = min(values)
    return (low, max(values)) if low < max(values) else (low - 1, low + 1)


def thin_points(points: Sequence[Point]) -> tuple[Point, ...]:
    """Keep at most MAX_POINTS at equal distances, the last one included."""
    stride = -(-len(points) // MAX_POINTS)
    first = (len(points) - 1) % stride if points else 0
    return tuple(points[first::stride])


# ---------------------------------------------------------------- intervals in a table

STRIP_WIDTH = 160  # pixels
STRIP_HEIGHT = 20
STRIP_TICKS = (-1, -0.5, 0, 0.5, 1)


@dataclass(frozen=True)
class Strip:
    """A difference and its interval in pixels, with zero in the middle of -1 to 1."""

    ticks: tuple[float, ...]
    zero: float
    low: float
    value: float
    high: float
    width: int = STRIP_WIDTH
    height: int = STRIP_HEIGHT


def build_strip(low: float, value: float, high: float) -> Strip:
    """Draw on the axis that all strips share; what is beyond -1 or 1 is drawn at its end."""
    edge = 6  # of a dot at the end

    def scale(number: float) -> float:
        bounded = min(1.0, max(-1.0, number))
        return round(STRIP_WIDTH / 2 + bounded * (STRIP_WIDTH / 2 - edge), 2)

    ticks = tuple(map(scale, STRIP_TICKS))
    return Strip(ticks, scale(0), scale(low), scale(value), scale(high))
