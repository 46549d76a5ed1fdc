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


@dataclass(frozen=True)
class Series:
    name: str
    points: tuple[Point, ...]
    style: str = "main"  # main | faint | base: the classes of page.css
    has_dots: bool = False


@dataclass(frozen=True)
class Mark:
    """An event at x; `kind` is a key of MARK_SIGNS."""

    x: float
    kind: str
    text: str


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

    @property
    def x_ticks(self) -> tuple[float, ...]:
        low, high = self.x_range
        return tuple(x for x in compute_ticks(low, high) if low <= x <= high)

    def scale_x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 2)

    def scale_y(self, value: float) -> float:
        low = self.y_ticks[0]
        high = self.y_ticks[-1]
        if self.is_log:
            value = max(value, low)
            fraction = math.log(value / low) / math.log(high / low)
        else:
            fraction = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - fraction * (HEIGHT - TOP - BOTTOM), 2)


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
class Label:
    """Text in a drawing; `anchor` is SVG's text-anchor."""

    x: float
    y: float
    text: str
    anchor: str = "start"


@dataclass(frozen=True)
class DotShape:
    x: float
    y: float
    title: str  # that the pointer shows


@dataclass(frozen=True)
class SeriesShape:
    """A series in pixels: `band` and `line` are lists of SVG points, `bars` are paths."""

    name: str
    style: str
    band: str
    bars: tuple[str, ...]
    line: str
    dots: tuple[DotShape, ...]
    dot_radius: float


@dataclass(frozen=True)
class MarkShape:
    x: float
    kind: str
    sign: str
    title: str


@dataclass(frozen=True)
class LineChart:
    """Everything that chart.html.jinja draws: shapes in pixels, and the numbers as a table."""

    id: str
    axes: Axes
    grid_ys: tuple[float, ...]
    ticks: tuple[Label, ...]
    names: tuple[Label, ...]
    marks: tuple[MarkShape, ...]
    series: tuple[SeriesShape, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_thinned: bool
    limit: Label | None = None  # at the left end of the red line
    has_legend: bool = True  # where there are several series
    width: int = WIDTH
    height: int = HEIGHT
    top: int = TOP
    plot_left: int = LEFT
    plot_right: int = WIDTH - RIGHT
    plot_bottom: int = HEIGHT - BOTTOM
    max_points: int = MAX_POINTS


def build_line_chart(
    chart_id: str, axes: Axes, series: Sequence[Series], marks: Sequence[Mark] = ()
) -> LineChart:
    """Lay out a chart. `chart_id` is unique on the page; at least one series has points."""
    drawn: list[Series] = []
    is_thinned = False
    for line in series:
        if line.points:
            drawn.append(replace(line, points=thin_points(line.points)))
            is_thinned = is_thinned or len(line.points) > MAX_POINTS
    points = [point for line in drawn for point in line.points]
    y_values: list[float] = []
    for point in points:
        y_values += [value for value in (point.y, point.low, point.high) if value is not None]
    x_values = [*axes.span, *(point.x for point in points), *(mark.x for mark in marks)]
    if axes.limit is not None:
        y_values.append(axes.limit)
    is_log = axes.is_log and min(y_values) > 0
    frame = Frame(_find_range(x_values), _choose_ticks(axes, y_values, is_log), is_log)
    columns, rows = _build_table(axes, drawn)
    return LineChart(
        id=chart_id,
        axes=axes,
        grid_ys=tuple(frame.scale_y(y) for y in frame.y_ticks),
        ticks=_draw_ticks(frame),
        names=(
            Label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, axes.x, "middle"),
            Label(4, 14, axes.y),
        ),
        marks=tuple(_draw_mark(frame, mark) for mark in marks),
        series=tuple(_draw_series(frame, line) for line in drawn),
        columns=columns,
        rows=rows,
        is_thinned=is_thinned,
        limit=_draw_limit(frame, axes),
    )


def _choose_ticks(axes: Axes, y_values: Sequence[float], is_log: bool) -> tuple[float, ...]:
    low = min(y_values)
    high = max(y_values)
    if axes.y_ticks and axes.y_ticks[0] <= low and high <= axes.y_ticks[-1]:
        return axes.y_ticks
    return compute_log_ticks(low, high) if is_log else compute_ticks(low, high, 5)


def _draw_limit(frame: Frame, axes: Axes) -> Label | None:
    if axes.limit is None:
        return None
    name = f"{axes.limit_name} {axes.limit:g}"
    return Label(LEFT + 4, frame.scale_y(axes.limit), name)


def _find_range(values: Sequence[float]) -> tuple[float, float]:
    low = min(values)
    high = max(values)
    return (low, high) if low < high else (low - 1, high + 1)


def thin_points(points: Sequence[Point]) -> tuple[Point, ...]:
    """Keep at most MAX_POINTS at equal distances, the last one included."""
    stride = -(-len(points) // MAX_POINTS)
    first = (len(points) - 1) % stride if points else 0
    return tuple(points[first::stride])


def _draw_ticks(frame: Frame) -> tuple[Label, ...]:
    y_labels = [Label(LEFT - 8, frame.scale_y(y) + 4, f"{y:g}", "end") for y in frame.y_ticks]
    bottom = HEIGHT - BOTTOM + 18
    x_labels = [Label(frame.scale_x(x), bottom, f"{x:g}", "middle") for x in frame.x_ticks]
    return (*y_labels, *x_labels)


def _draw_mark(frame: Frame, mark: Mark) -> MarkShape:
    title = f"step {mark.x:g}: {mark.text}"
    return MarkShape(frame.scale_x(mark.x), mark.kind, MARK_SIGNS[mark.kind], title)


def _draw_series(frame: Frame, series: Series) -> SeriesShape:
    """Few points get bars for their intervals; a longer series gets a band."""
    is_sparse = series.has_dots or len(series.points) == 1
    upper: list[str] = []
    lower: list[str] = []
    bars: list[str] = []
    for point in series.points:
        if point.low is None or point.high is None:
            continue
        x = frame.scale_x(point.x)
        low = frame.scale_y(point.low)
        high = frame.scale_y(point.high)
        bars.append(f"M{x} {low}V{high}")
        upper.append(f"{x},{high}")
        lower.append(f"{x},{low}")
    dots: list[DotShape] = []
    for point in series.points:
        title = f"{point.x:g}: {', '.join(_format_cells(point, True))}"
        dots.append(DotShape(frame.scale_x(point.x), frame.scale_y(point.y), title))
    return SeriesShape(
        name=series.name,
        style=series.style,
        band="" if is_sparse else " ".join([*upper, *reversed(lower)]),
        bars=tuple(bars) if is_sparse else (),
        line=" ".join(f"{dot.x},{dot.y}" for dot in dots),
        dots=tuple(dots) if is_sparse or len(dots) <= 30 else (),
        dot_radius=4 if is_sparse else 2.5,
    )


def _build_table(
    axes: Axes, series: Sequence[Series]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the head and the rows: a column for each series, and one for its interval if any."""
    columns = [axes.x]
    points_by_x: list[dict[float, Point]] = []
    for line in series:
        points_by_x.append({point.x: point for point in line.points})
    rows: list[tuple[str, ...]] = []
    for x in sorted(set().union(*points_by_x)):
        points = [column.get(x) for column in points_by_x]
        cells = [f"{x:g}"]
        for line, point in zip(series, points, strict=True):
            cells += _format_cells(point, _has_interval(line))
        rows.append(tuple(cells))
    for line in series:
        columns += [line.name, "95% interval"] if _has_interval(line) else [line.name]
    return tuple(columns), tuple(rows)


def _has_interval(series: Series) -> bool:
    return any(point.low is not None for point in series.points)


def _format_cells(point: Point | None, has_interval: bool) -> list[str]:
    cells = [f"{point.y:.4g}" if point else ""]
    if has_interval:
        is_bounded = point and point.low is not None and point.high is not None
        cells.append(f"{point.low:.4g} to {point.high:.4g}" if point and is_bounded else "")
    return cells


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
