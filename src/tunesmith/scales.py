"""Gain against forgetting: the trained adapter scaled down, which costs no training.

    held-out loss on eval_data and bits per byte of general text, at 0 (the base), 0.25, 0.5, 0.75 and 1 (as trained)

In: a Workbench after training. Out: a ScalePoint each, and which of them is offered. They are chosen on `eval_data`,
as everything is that is chosen; `test_data` is not read. Left out: full fine-tuning, which has no adapter to scale.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.evaluate.compare import GENERAL, Measured, score
from tunesmith.evaluate.retention import BITS
from tunesmith.measure import Items, eval_measurement, general_measurement
from tunesmith.model.adapters import adapter_scaled
from tunesmith.types import ScalePoint, Score
from tunesmith.watch import watched
from tunesmith.workbench import Workbench

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
KEPT = 0.9  # of the best gain: what an offered scale keeps at least


def scale_curve(bench: Workbench, items: Items, *, step: int, after: Measured) -> tuple[ScalePoint, ...]:
    """Nothing without an adapter, or without `eval_data`. What `after` knows of general text is not measured again."""
    if bench.plan["method"] == "full" or not (items.eval_documents or "eval_data" in items.held_out):
        return ()
    bench.model.network.eval()
    known = [one for one in after.measurements if (one.task, one.metric) == (GENERAL, BITS)]
    points: list[ScalePoint] = []
    for scale in watched(SCALES, len(SCALES), "scales of the adapter"):
        with adapter_scaled(bench.model.network, scale):
            gain = score(eval_measurement(bench, items), step=step)
            general: Score | None = None
            if items.texts:
                measured = known[0] if known and scale == 1 else general_measurement(bench, items.texts)
                general = score(measured, step=step)
        points.append(ScalePoint(scale, gain, general))
    return tuple(points)


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
    """Of the scales that keep most of the best gain, the one that forgets least; without forgetting, the one with the
    best gain. None where nothing was gained."""
    kept = {point.scale: gain_kept(points, point) for point in points}
    best = max((share for share in kept.values() if share is not None), default=0.0)
    if best <= 0:
        return None
    good = [point for point in points if (kept[point.scale] or 0.0) >= KEPT * best]
    lost = {point.scale: forgetting(points, point) for point in good}
    if None in lost.values():
        return min(good, key=lambda point: point.gain.value)
    return min(good, key=lambda point: (lost[point.scale], -point.scale))
