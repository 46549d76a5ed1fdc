"""Draw the result of the learning-rate finder: bars for the terminal, and an SVG file.

In: LRFinderResult. Out: text. The SVG is self-contained and runs no script; its axes are the rate
and the held-out loss, from the lowest to the untrained model's, both logarithmic.
"""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from tunesmith.advise.lr_finder import LRFinderResult, LRPoint

BAR_WIDTH = 32  # characters
WIDTH = 640  # pixels
HEIGHT = 360
# margins
LEFT = 70
RIGHT = 20
TOP = 30
BOTTOM = 70
GREEN = "#0b6"
GRAY = "#888"


def render_bar(point: LRPoint, result: LRFinderResult) -> str:
    """Return a bar of the log ratio of the untrained loss to this one; the best fills the width."""
    losses = [loss for _, loss in _list_sound_points(result)]
    if not losses or point.loss is None or point.collapse_reason:
        return ""
    best_gain = _log_loss(result.base_loss) - _log_loss(min(losses))
    if best_gain <= 0:
        return ""
    gain = _log_loss(result.base_loss) - _log_loss(point.loss)
    return "█" * max(0, round(BAR_WIDTH * gain / best_gain))


def _list_sound_points(result: LRFinderResult) -> list[tuple[LRPoint, float]]:
    """Return the points that have not collapsed, with their loss."""
    return [
        (point, point.loss)
        for point in result.points
        if point.loss is not None and not point.collapse_reason
    ]


def _log_loss(loss: float) -> float:
    return math.log(max(loss, 1e-6))


def render_svg(result: LRFinderResult) -> str:
    """Draw losses by rate; rates that collapsed are crosses at the top."""
    plotted = _list_sound_points(result)
    losses = [loss for _, loss in plotted] or [0.0, 1.0]
    low = _log_loss(min(losses))
    height = max(_log_loss(max(*losses, result.base_loss)) - low, 1e-9)
    log_rates = [math.log10(point.learning_rate) for point in result.points]
    width = max(max(log_rates) - min(log_rates), 0.1)

    def scale_x(rate: float) -> float:
        fraction = (math.log10(rate) - min(log_rates)) / width
        return LEFT + fraction * (WIDTH - LEFT - RIGHT)

    def scale_y(loss: float) -> float:
        fraction = (_log_loss(loss) - low) / height
        return HEIGHT - BOTTOM - fraction * (HEIGHT - TOP - BOTTOM)

    base_y = scale_y(result.base_loss)
    title = f"held-out {result.metric} after {result.steps} steps, by learning rate"
    base_label = f"before training {result.base_loss:.3f}"
    line = " ".join(f"{scale_x(point.learning_rate):.1f},{scale_y(y):.1f}" for point, y in plotted)
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base_y:.1f}" y2="{base_y:.1f}" '
        'stroke="#999" stroke-dasharray="4"/>',
        _render_text(WIDTH - RIGHT, base_y - 6, base_label, "end"),
        _render_text(LEFT, 16, title),
        f'<polyline fill="none" stroke="{GRAY}" stroke-width="2" points="{line}"/>',
    ]
    for point, loss in plotted:
        x = scale_x(point.learning_rate)
        y = scale_y(loss)
        fill = GREEN if point.learning_rate == result.chosen_rate else GRAY
        elements.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}"/>')
        elements.append(_render_text(x, y + 18, f"{loss:.3f}", "middle"))
    for point in result.points:
        x = scale_x(point.learning_rate)
        elements.append(_render_text(x, HEIGHT - 24, f"{point.learning_rate:g}", "middle"))
        if point.collapse_reason:
            elements.append(_render_text(x, TOP + 12, "✕", "middle"))
    choice = "every rate collapsed"
    if result.chosen_rate is not None:
        choice = f"chosen: {result.chosen_rate:g}"
    elements.append(_render_text(WIDTH / 2, HEIGHT - 6, choice, "middle"))
    return "\n".join([*elements, "</svg>"]) + "\n"


def _render_text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
