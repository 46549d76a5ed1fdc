"""Which scale of a trained adapter is offered, from what each gains and forgets.

    ScalePoints (0, 0.25, ... 1) -> the one that keeps most of the gain and forgets least, and how that is said

Chosen on `eval_data`, as everything is that is chosen: what it says of the chosen scale is no result. Left out: the
measuring (scales.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from shlex import quote

from tunesmith.core.types import ScalePoint

KEPT = 0.9  # of the best gain: what an offered scale keeps at least
BARGAIN = 0.5  # of the forgetting, at most: then the offer stands in the verdict of a run
LARGEST = 2.0  # what an adapter may be scaled by; beyond 1 nothing was measured by the run itself


def gain_kept(points: Sequence[ScalePoint], point: ScalePoint) -> float | None:
    """Of what the whole adapter lowers the loss by; None where it lowers nothing."""
    first, last = points[0].gain.value, points[-1].gain.value
    return None if last >= first else (first - point.gain.value) / (first - last)


def forgetting(points: Sequence[ScalePoint], point: ScalePoint) -> float | None:
    """Of what the whole adapter raises the bits per byte by; None where it raises nothing, or nothing was measured."""
    first, last = points[0].general, points[-1].general
    if first is None or last is None or point.general is None or last.value <= first.value:
        return None
    return (point.general.value - first.value) / (last.value - first.value)


def offered(points: Sequence[ScalePoint]) -> ScalePoint | None:
    """Of the scales that keep most of the best gain, with a loss inside the interval of the best one, the one that
    forgets least; without forgetting, the one with the best gain. None where nothing was gained."""
    best = min(points, key=lambda point: point.gain.value, default=None)
    most = None if best is None else gain_kept(points, best)
    if best is None or not most:
        return None
    near = [point for point in points if point.gain.value <= best.gain.high]
    good = [point for point in near if (gain_kept(points, point) or 0.0) >= KEPT * most]
    lost = {point.scale: forgetting(points, point) for point in good}
    if None in lost.values():
        return min(good, key=lambda point: point.gain.value)
    return min(good, key=lambda point: (lost[point.scale], -point.scale))


def offer(points: Sequence[ScalePoint]) -> str:
    """What is offered, in words."""
    if not points:
        return ""
    best = offered(points)
    if best is None:
        return "no scale of the adapter lowers the held-out loss"
    if best.scale == 1:
        lost = forgetting(points, best)
        why = "nothing was forgotten" if lost is None else "less of it keeps too little of the gain"
        return f"scale 1, the adapter as trained, is best: {why}" if best.general else "scale 1 is best"
    return f"scale {best.scale:g} {keeps(points, best)}"


def commands(points: Sequence[ScalePoint], run: str) -> tuple[str, ...]:
    """What measures a run as offered on its own items, which a loss on others is no proof for, and what hands it out;
    nothing where that is the adapter as trained."""
    best = offered(points)
    if best is None or best.scale == 1:
        return ()
    look = f"tunesmith compare {quote(f'{run}@{best.scale:g}')} {quote(run)}"
    return look, f"tunesmith export {quote(run)} --to peft --scale {best.scale:g}"


def bargain(points: Sequence[ScalePoint]) -> str:
    """What is offered, where it forgets so much less that nobody should miss it; else nothing."""
    best = offered(points)
    lost = None if best is None else forgetting(points, best)
    return offer(points) if lost is not None and lost <= BARGAIN else ""


def keeps(points: Sequence[ScalePoint], point: ScalePoint) -> str:
    """Of gain and forgetting, in words; nothing where nothing was gained."""
    kept, lost = gain_kept(points, point), forgetting(points, point)
    if kept is None:
        return ""
    gain = f"keeps {kept:.0%} of the gain in {point.gain.metric.replace('_', ' ')}"
    if lost is None:
        return gain
    return f"{gain} at {lost:.0%} of the forgetting" if lost > 0 else f"{gain} and forgets nothing"
