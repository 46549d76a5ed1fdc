"""Which checkpoint becomes the adapter: the best on `eval_data` that has not forgotten too much.

    Look, Look, ... -> the best one

Not the last, and not the one of the lowest loss: a loss goes on falling, or rises while answers get
better. Answers are compared first, by the recipe's metrics; where they differ by no more than one
item, the lower held-out loss decides, which tells apart what a few answers cannot. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tunesmith.core.events import Score

EVAL = "eval"


@dataclass(frozen=True)
class EvalPoint:
    """At `eval_data`, and at general text where there is any. `quality`: mean of the metrics; one
    item is `item` of it."""

    step: int
    loss: float
    mean_metric: float | None = None
    item_weight: float = 0.0
    forgotten: float | None = None  # bits per byte

    @classmethod
    def from_scores(
        cls, step: int, scores: Iterable[Score], metrics: Collection[str]
    ) -> EvalPoint | None:
        """None where nothing of `eval_data` was measured."""
        score_list = list(scores)
        losses = _select_eval_scores(score_list, ("loss", "bits_per_byte"))
        if not losses:
            return None
        graded = _select_eval_scores(score_list, (*metrics, "preference_accuracy"))
        return cls(
            step,
            fmean(score.value for score in losses),
            fmean(score.value for score in graded) if graded else None,
            1 / min(score.n for score in graded) if graded else 0.0,
            next((score.value for score in score_list if score.metric == "forgotten"), None),
        )


def _select_eval_scores(scores: Sequence[Score], metrics: Collection[str]) -> list[Score]:
    """Over all rows, else over the tasks."""
    eval_scores = [
        score
        for score in scores
        if score.metric in metrics and score.task.partition(":")[0] == EVAL
    ]
    return [
        score for score in eval_scores if score.task in (EVAL, f"{EVAL}: mean of tasks")
    ] or eval_scores


def select_best(eval_points: Sequence[EvalPoint], margin: float) -> EvalPoint | None:
    """Among those within the margin, if any is."""
    within_margin = [
        eval_point
        for eval_point in eval_points
        if eval_point.forgotten is None or eval_point.forgotten <= margin
    ] or list(eval_points)
    if not within_margin:
        return None
    max_metric = max(eval_point.mean_metric or 0.0 for eval_point in within_margin)
    tied = [
        eval_point
        for eval_point in within_margin
        if (eval_point.mean_metric or 0.0) >= max_metric - eval_point.item_weight
    ]
    return min(tied, key=lambda eval_point: (eval_point.loss, eval_point.step))


def should_stop_early(eval_points: Sequence[EvalPoint], margin: float, patience: int) -> bool:
    """So many looks in a row found nothing better."""
    best = select_best(eval_points, margin)
    return (
        best is not None
        and sum(eval_point.step > best.step for eval_point in eval_points) >= patience
    )
