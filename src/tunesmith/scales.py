"""Gain against forgetting: the trained adapter scaled down, which costs no training.

    held-out loss on eval_data and bits per byte of general text, at 0 (the base), 0.25, 0.5, 0.75 and 1 (as trained)

In: a Workbench after training. Out: a ScalePoint each; `test_data` is not read. Left out: which of them is offered
(evaluate/tradeoff.py); full fine-tuning, which has no adapter to scale.
"""

from __future__ import annotations

from tunesmith.evaluate.compare import GENERAL, Measured, score
from tunesmith.evaluate.retention import BITS
from tunesmith.measure import Items, eval_measurement, general_measurement
from tunesmith.model.adapters import adapter_scaled
from tunesmith.types import ScalePoint, Score
from tunesmith.watch import watched
from tunesmith.workbench import Workbench

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


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
