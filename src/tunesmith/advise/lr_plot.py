"""A learning-rate test as a picture: bars for the terminal, an SVG for everyone else.

In: a RateTest. Out: text. The SVG needs nothing beside it and runs no script; its axes are the rate
and the held-out loss, from the lowest to the untrained model's, both logarithmic."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from tunesmith.advise.lr_finder import LRFinderResult, LRPoint

BAR_WIDTH = 32  # characters
WIDTH, HEIGHT, MARGIN_START, MARGIN_TOP, MARGIN_END, MARGIN_BOTTOM = 640, 360, 70, 30, 20, 70


def render_bar(point: LRPoint, result: LRFinderResult) -> str:
    """The longer the smaller the loss became, as a ratio to the untrained model's; the best fills
    it."""
    losses = [
        other.loss
        for other in result.points
        if other.loss is not None and not other.collapse_reason
    ]
    best_gain = _compute_log(result.base_loss) - _compute_log(min(losses, default=result.base_loss))
    if point.loss is None or point.collapse_reason or best_gain <= 0:
        return ""
    return "█" * max(
        0,
        round(BAR_WIDTH * (_compute_log(result.base_loss) - _compute_log(point.loss)) / best_gain),
    )


def _compute_log(loss: float) -> float:
    return math.log(max(loss, 1e-6))


def render_svg(result: LRFinderResult) -> str:
    """Points that collapsed are crosses on the upper edge."""
    plotted = [
        (point, point.loss)
        for point in result.points
        if point.loss is not None and not point.collapse_reason
    ]
    min_loss = min((loss for _, loss in plotted), default=0.0)
    max_loss = (
        max(result.base_loss, *(loss for _, loss in plotted))
        if plotted
        else max(result.base_loss, 1.0)
    )
    log_rates = [math.log10(point.learning_rate) for point in result.points]
    min_log_rate, max_log_rate = min(log_rates), max(max(log_rates), min(log_rates) + 0.1)

    def map_x(rate: float) -> float:
        return MARGIN_START + (math.log10(rate) - min_log_rate) / (max_log_rate - min_log_rate) * (
            WIDTH - MARGIN_START - MARGIN_END
        )

    def map_y(loss: float) -> float:
        return MARGIN_TOP + (_compute_log(max_loss) - _compute_log(loss)) / max(
            _compute_log(max_loss) - _compute_log(min_loss), 1e-9
        ) * (HEIGHT - MARGIN_TOP - MARGIN_BOTTOM)

    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<line x1="{MARGIN_START}" x2="{WIDTH - MARGIN_END}" y1="{map_y(result.base_loss):.1f}" y2="{map_y(result.base_loss):.1f}" stroke="#999" '
        'stroke-dasharray="4"/>',
        _render_text(
            WIDTH - MARGIN_END,
            map_y(result.base_loss) - 6,
            f"before training {result.base_loss:.3f}",
            "end",
        ),
        _render_text(
            MARGIN_START,
            16,
            f"held-out {result.metric} after {result.steps} steps, by learning rate",
        ),
        '<polyline fill="none" stroke="#888" stroke-width="2" points="'
        + " ".join(f"{map_x(point.learning_rate):.1f},{map_y(loss):.1f}" for point, loss in plotted)
        + '"/>',
    ]
    for point, loss in plotted:
        fill = "#0b6" if point.learning_rate == result.chosen_rate else "#888"
        elements.append(
            f'<circle cx="{map_x(point.learning_rate):.1f}" cy="{map_y(loss):.1f}" r="5" fill="{fill}"/>'
        )
        elements.append(
            _render_text(map_x(point.learning_rate), map_y(loss) + 18, f"{loss:.3f}", "middle")
        )
    for point in result.points:
        elements.append(
            _render_text(
                map_x(point.learning_rate), HEIGHT - 24, f"{point.learning_rate:g}", "middle"
            )
        )
        if point.collapse_reason:
            elements.append(
                _render_text(map_x(point.learning_rate), MARGIN_TOP + 12, "✕", "middle")
            )
    choice_text = (
        "none is sound" if result.chosen_rate is None else f"chosen: {result.chosen_rate:g}"
    )
    elements.append(_render_text(WIDTH / 2, HEIGHT - 6, choice_text, "middle"))
    return "\n".join([*elements, "</svg>"]) + "\n"


def _render_text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
