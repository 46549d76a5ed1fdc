"""Choose the checkpoint that becomes the adapter: the best on eval_data within the forgetting
margin.

Neither the last checkpoint nor the one with the lowest loss: loss may fall while answers get worse,
or rise while they get better. Graded answers are compared first, by the recipe's metrics.
Checkpoints that differ by no more than one item are tied, and the lowest held-out loss decides.
Pure.

In: the scores of evaluations. Out: EvalPoints and the best of them, with what decided."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tunesmith.core.events import Score

EVAL = "eval"


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation during training.

    `mean_metric` is the mean of the recipe's metrics, of which one item is `item_weight`."""

    step: int
    loss: float
    mean_metric: float | None = None
    item_weight: float = 0.0
    forgotten: float | None = None  # bits per byte of general text

    @classmethod
    def from_scores(
        cls, step: int, scores: Iterable[Score], metrics: Collection[str]
    ) -> EvalPoint | None:
        """Return the evaluation with these scores, None if none is of eval_data."""
        score_list = list(scores)
        losses = _select_eval_scores(score_list, ("loss", "bits_per_byte"))
        if not losses:
            return None
        graded = _select_eval_scores(score_list, (*metrics, "preference_accuracy"))
        forgotten = [score.value for score in score_list if score.metric == "forgotten"]
        return cls(
            step,
            loss=fmean(score.value for score in losses),
            mean_metric=fmean(score.value for score in graded) if graded else None,
            item_weight=1 / min(score.n for score in graded) if graded else 0.0,
            forgotten=forgotten[0] if forgotten else None,
        )


def _select_eval_scores(scores: Sequence[Score], metrics: Collection[str]) -> list[Score]:
    """Return the scores over all rows of eval_data; without such scores, those of its tasks."""
    by_task = [
        score
        for score in scores
        if score.metric in metrics and score.task.partition(":")[0] == EVAL
    ]
    overall = [score for score in by_task if score.task in (EVAL, f"{EVAL}: mean of tasks")]
    return overall or by_task


def select_best(eval_points: Sequence[EvalPoint], margin: float) -> EvalPoint | None:
    """Return the best evaluation within the margin; if none is, the best of all."""
    candidates: list[EvalPoint] = []
    for point in eval_points:
        if point.forgotten is None or point.forgotten <= margin:
            candidates.append(point)
    candidates = candidates or list(eval_points)
    if not candidates:
        return None
    max_metric = max(point.mean_metric or 0.0 for point in candidates)
    tied = [
        point
        for point in candidates
        if (point.mean_metric or 0.0) >= max_metric - point.item_weight
    ]
    return min(tied, key=lambda point: (point.loss, point.step))


def describe_choice(best: EvalPoint, eval_points: Sequence[EvalPoint], margin: float) -> str:
    """Return the scores of the best checkpoint, and those of a better one that forgets too much."""
    text = _describe_scores(best)
    other = select_best(eval_points, math.inf)
    if other is None or other.forgotten is None or other.forgotten <= margin:
        return text
    if other.step == best.step:
        return text
    return (
        f"{text}; step {other.step} has {_describe_scores(other)}, but general text had lost "
        f"{other.forgotten:.3f} bits per byte by then, more than the margin of {margin:g}"
    )


def _describe_scores(point: EvalPoint) -> str:
    metric = "" if point.mean_metric is None else f"answers {point.mean_metric:.3f}, "
    return f"{metric}held-out loss {point.loss:.4f}"


def should_stop_early(eval_points: Sequence[EvalPoint], margin: float, patience: int) -> bool:
    """Return whether `patience` evaluations since the best one were no better."""
    best = select_best(eval_points, margin)
    if best is None:
        return False
    return sum(point.step > best.step for point in eval_points) >= patience
