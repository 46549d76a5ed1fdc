"""Which checkpoint becomes the adapter: the best on `eval_data` that has not forgotten too much.

    Look, Look, ... -> the best one

Not the last, and not the one of the lowest loss: a loss goes on falling, or rises while answers get better. Answers are
compared first, by the recipe's metrics; where they differ by no more than one item, the lower held-out loss decides,
which tells apart what a few answers cannot. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tunesmith.core.events import Score

EVAL = "eval"


@dataclass(frozen=True)
class Look:
    """At `eval_data`, and at general text where there is any. `quality`: mean of the metrics; one item is `item` of
    it."""

    step: int
    loss: float
    quality: float | None = None
    item: float = 0.0
    forgotten: float | None = None  # bits per byte

    @classmethod
    def of(cls, step: int, scores: Iterable[Score], metrics: Collection[str]) -> Look | None:
        """None where nothing of `eval_data` was measured."""
        kept = list(scores)
        losses = _of_eval(kept, ("loss", "bits_per_byte"))
        if not losses:
            return None
        graded = _of_eval(kept, (*metrics, "preference_accuracy"))
        return cls(
            step,
            fmean(score.value for score in losses),
            fmean(score.value for score in graded) if graded else None,
            1 / min(score.n for score in graded) if graded else 0.0,
            next((score.value for score in kept if score.metric == "forgotten"), None),
        )


def _of_eval(scores: Sequence[Score], metrics: Collection[str]) -> list[Score]:
    """Over all rows, else over the tasks."""
    found = [score for score in scores if score.metric in metrics and score.task.partition(":")[0] == EVAL]
    return [score for score in found if score.task in (EVAL, f"{EVAL}: mean of tasks")] or found


def best_of(looks: Sequence[Look], margin: float) -> Look | None:
    """Among those within the margin, if any is."""
    within = [look for look in looks if look.forgotten is None or look.forgotten <= margin] or list(looks)
    if not within:
        return None
    most = max(look.quality or 0.0 for look in within)
    alike = [look for look in within if (look.quality or 0.0) >= most - look.item]
    return min(alike, key=lambda look: (look.loss, look.step))


def exhausted(looks: Sequence[Look], margin: float, patience: int) -> bool:
    """So many looks in a row found nothing better."""
    best = best_of(looks, margin)
    return best is not None and sum(look.step > best.step for look in looks) >= patience
