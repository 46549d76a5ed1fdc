"""A learning-rate test as a picture: bars for the terminal, an SVG for everyone else.

In: a RateTest. Out: text. The SVG needs nothing beside it and runs no script; its axes are the rate and the
held-out loss, from the lowest to the untrained model's, both logarithmic.
"""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from tunesmith.advise.lr_finder import RatePoint, RateTest

BAR = 32  # characters
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 360, 70, 30, 20, 70


def bar(point: RatePoint, test: RateTest) -> str:
    """The longer the smaller the loss became, as a ratio to the untrained model's; the best fills it."""
    losses = [one.loss for one in test.points if one.loss is not None and not one.collapsed]
    gained = _log(test.base) - _log(min(losses, default=test.base))
    if point.loss is None or point.collapsed or gained <= 0:
        return ""
    return "█" * max(0, round(BAR * (_log(test.base) - _log(point.loss)) / gained))


def _log(loss: float) -> float:
    return math.log(max(loss, 1e-6))


def svg(test: RateTest) -> str:
    """Points that collapsed are crosses on the upper edge."""
    shown = [(point, point.loss) for point in test.points if point.loss is not None and not point.collapsed]
    low = min((loss for _, loss in shown), default=0.0)
    high = max(test.base, *(loss for _, loss in shown)) if shown else max(test.base, 1.0)
    rates = [math.log10(point.rate) for point in test.points]
    left, right = min(rates), max(max(rates), min(rates) + 0.1)

    def x(rate: float) -> float:
        return LEFT + (math.log10(rate) - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (_log(high) - _log(loss)) / max(_log(high) - _log(low), 1e-9) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(test.base):.1f}" y2="{y(test.base):.1f}" stroke="#999" '
        'stroke-dasharray="4"/>',
        _text(WIDTH - RIGHT, y(test.base) - 6, f"before training {test.base:.3f}", "end"),
        _text(LEFT, 16, f"held-out {test.metric} after {test.steps} steps, by learning rate"),
        '<polyline fill="none" stroke="#888" stroke-width="2" points="'
        + " ".join(f"{x(point.rate):.1f},{y(loss):.1f}" for point, loss in shown)
        + '"/>',
    ]
    for point, loss in shown:
        fill = "#0b6" if point.rate == test.chosen else "#888"
        parts.append(f'<circle cx="{x(point.rate):.1f}" cy="{y(loss):.1f}" r="5" fill="{fill}"/>')
        parts.append(_text(x(point.rate), y(loss) + 18, f"{loss:.3f}", "middle"))
    for point in test.points:
        parts.append(_text(x(point.rate), HEIGHT - 24, f"{point.rate:g}", "middle"))
        if point.collapsed:
            parts.append(_text(x(point.rate), TOP + 12, "✕", "middle"))
    chosen = "none is sound" if test.chosen is None else f"chosen: {test.chosen:g}"
    parts.append(_text(WIDTH / 2, HEIGHT - 6, chosen, "middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
