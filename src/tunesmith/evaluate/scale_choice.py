"""Which scale of a trained adapter is offered, from what each gains and forgets.

    ScalePoints (0, 0.25, ... 1) -> the one that keeps most of the gain and forgets least, and how that is said

Chosen on `eval_data`, as everything is that is chosen: what it says of the chosen scale is no
result. Left out: the measuring (scales.py)."""

from __future__ import annotations

from collections.abc import Sequence
from shlex import quote

from tunesmith.core.types import ScalePoint

MIN_GAIN_SHARE = 0.9  # of the best gain: what an offered scale keeps at least
# of the forgetting, at most: then the offer stands in the verdict of a run
MAX_FORGETTING_SHARE = 0.5
MAX_SCALE = 2.0  # what an adapter may be scaled by; beyond 1 nothing was measured by the run itself


def compute_gain_share(points: Sequence[ScalePoint], point: ScalePoint) -> float | None:
    """Of what the whole adapter lowers the loss by; None where it lowers nothing."""
    first, last = points[0].eval_loss.value, points[-1].eval_loss.value
    return None if last >= first else (first - point.eval_loss.value) / (first - last)


def compute_forgetting_share(points: Sequence[ScalePoint], point: ScalePoint) -> float | None:
    """Of what the whole adapter raises the bits per byte by; None where it raises nothing, or
    nothing was measured."""
    first, last = points[0].general_text, points[-1].general_text
    if first is None or last is None or point.general_text is None or last.value <= first.value:
        return None
    return (point.general_text.value - first.value) / (last.value - first.value)


def recommend_scale(points: Sequence[ScalePoint]) -> ScalePoint | None:
    """Of the scales that keep most of the best gain, with a loss inside the interval of the best
    one, the one that forgets least; without forgetting, the one with the best gain. None where
    nothing was gained."""
    best = min(points, key=lambda point: point.eval_loss.value, default=None)
    best_share = None if best is None else compute_gain_share(points, best)
    if best is None or not best_share:
        return None
    near = [point for point in points if point.eval_loss.value <= best.eval_loss.high]
    good = [
        point
        for point in near
        if (compute_gain_share(points, point) or 0.0) >= MIN_GAIN_SHARE * best_share
    ]
    forgetting_shares = {point.scale: compute_forgetting_share(points, point) for point in good}
    if None in forgetting_shares.values():
        return min(good, key=lambda point: point.eval_loss.value)
    return min(good, key=lambda point: (forgetting_shares[point.scale], -point.scale))


def describe_recommendation(points: Sequence[ScalePoint]) -> str:
    """What is offered, in words."""
    if not points:
        return ""
    best = recommend_scale(points)
    if best is None:
        return "no scale of the adapter lowers the held-out loss"
    if best.scale == 1:
        forgetting_share = compute_forgetting_share(points, best)
        reason = (
            "nothing was forgotten"
            if forgetting_share is None
            else "less of it keeps too little of the gain"
        )
        return (
            f"scale 1, the adapter as trained, is best: {reason}"
            if best.general_text
            else "scale 1 is best"
        )
    return f"scale {best.scale:g} {describe_tradeoff(points, best)}"


def build_commands(points: Sequence[ScalePoint], run: str) -> tuple[str, ...]:
    """What measures a run as offered on its own items, which a loss on others is no proof for, and
    what hands it out; nothing where that is the adapter as trained."""
    best = recommend_scale(points)
    if best is None or best.scale == 1:
        return ()
    compare_command = f"tunesmith compare {quote(f'{run}@{best.scale:g}')} {quote(run)}"
    return compare_command, f"tunesmith export {quote(run)} --to peft --scale {best.scale:g}"


def describe_bargain(points: Sequence[ScalePoint]) -> str:
    """What is offered, where it forgets so much less that nobody should miss it; else nothing."""
    best = recommend_scale(points)
    forgetting_share = None if best is None else compute_forgetting_share(points, best)
    return (
        describe_recommendation(points)
        if forgetting_share is not None and forgetting_share <= MAX_FORGETTING_SHARE
        else ""
    )


def describe_tradeoff(points: Sequence[ScalePoint], point: ScalePoint) -> str:
    """Of gain and forgetting, in words; nothing where nothing was gained."""
    gain_share, forgetting_share = (
        compute_gain_share(points, point),
        compute_forgetting_share(points, point),
    )
    if gain_share is None:
        return ""
    gain = f"keeps {gain_share:.0%} of the gain in {point.eval_loss.metric.replace('_', ' ')}"
    if forgetting_share is None:
        return gain
    return (
        f"{gain} at {forgetting_share:.0%} of the forgetting"
        if forgetting_share > 0
        else f"{gain} and forgets nothing"
    )
