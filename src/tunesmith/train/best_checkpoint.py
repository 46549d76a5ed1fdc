"""Choose the checkpoint that becomes the adapter: the best on eval_data within the forgetting
margin.

Neither the last checkpoint nor the one with the lowest loss: loss may fall while answers get worse,
or rise while they get better. Graded answers are compared first, by the recipe's metrics.
Checkpoints whose difference no paired test could show are tied, and the later one is taken, since
more steps were planned; without a right answer the lowest held-out loss decides.
The margin is no cliff: what is twice as good beyond it is taken. Otherwise an early evaluation that
happens to be within it would exclude all that the run learns later. Pure.

In: the scores of evaluations. Out: EvalPoints and the best of them, with what decided."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tunesmith.core.events import Score

EVAL = "eval"
# Items of one sign that show a checkpoint to be worse: one-sided sign test, p = 1 / 2**5.
SHOWN_ITEMS = 5


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation during training.

    `mean_metric` is the mean of the recipe's metrics, of which one item is `item_weight`."""

    step: int
    loss: float
    mean_metric: float | None = None
    item_weight: float = 0.0
    forgotten: float | None = None  # bits per byte of general text

    @property
    def metric(self) -> float:
        """The mean of the metrics, 0 without any: then the loss decides."""
        return self.mean_metric or 0.0

    def is_within(self, margin: float) -> bool:
        return self.forgotten is None or self.forgotten <= margin

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
    """Return the best evaluation: within the margin, unless one beyond it is twice as good.

    The best is the newest evaluation or was the best before it, so that its checkpoint exists."""
    best: EvalPoint | None = None
    points_by_side: dict[bool, list[EvalPoint]] = {True: [], False: []}
    best_by_side: dict[bool, EvalPoint] = {}
    for point in eval_points:
        is_within = point.is_within(margin)
        points_by_side[is_within].append(point)
        if not _is_better(point, best_by_side.get(is_within), points_by_side[is_within]):
            continue
        best_by_side[is_within] = point
        within = best_by_side.get(True)
        if is_within:
            is_next = best is None or best.is_within(margin) or not is_twice_as_good(best, point)
        else:
            is_next = within is None or is_twice_as_good(point, within)
        if is_next:
            best = point
    return best


def _is_better(point: EvalPoint, best: EvalPoint | None, seen: Sequence[EvalPoint]) -> bool:
    """seen: the evaluations on the same side of the margin, up to `point`. Those are tied that are
    not shown to be worse than the best answers, and then the later one is better."""
    if best is None:
        return True
    tied_metric = max(each.metric for each in seen) - (SHOWN_ITEMS - 0.5) * point.item_weight
    if point.metric < tied_metric:
        return False
    return best.metric < tied_metric or point.metric > 0 or point.loss < best.loss


def is_twice_as_good(over: EvalPoint, within: EvalPoint) -> bool:
    """Return whether a checkpoint is worth its forgetting: with twice the graded answers of the one
    within the margin, or half its held-out loss and answers that are no worse."""
    gain = over.metric - within.metric
    if gain > over.item_weight and over.metric >= 2 * within.metric:
        return True
    return gain >= 0 and 2 * over.loss <= within.loss


def describe_choice(best: EvalPoint, eval_points: Sequence[EvalPoint], margin: float) -> str:
    """Return the scores of the best checkpoint, and those of another that forgets more or less and
    was not taken."""
    text = _describe_scores(best)
    if best.is_within(margin):
        other = select_best(eval_points, math.inf)
        if other is None or other.is_within(margin):
            return text
        return (
            f"{text}; step {other.step} has {_describe_scores(other)}, but general text had lost "
            f"{other.forgotten:.3f} bits per byte by then, more than the margin of {margin:g}"
        )
    text += (
        f"; general text had lost {best.forgotten:.3f} bits per byte by then, more than the margin "
        f"of {margin:g}"
    )
    within = select_best([point for point in eval_points if point.is_within(margin)], margin)
    if within is None:
        return text
    return f"{text}, but step {within.step}, the best within it, has {_describe_scores(within)}"


def _describe_scores(point: EvalPoint) -> str:
    metric = ""
    if point.mean_metric is not None:
        metric = f"answers {point.mean_metric:.3f} of {round(1 / point.item_weight)} items, "
    return f"{metric}held-out loss {point.loss:.4f}"


def should_stop_early(eval_points: Sequence[EvalPoint], margin: float, patience: int) -> bool:
    """Return whether the last `patience` evaluations have neither better answers nor a lower loss
    than all before. Those beyond the margin are no better, if there are others."""
    judged = [point for point in eval_points if point.is_within(margin)] or eval_points
    latest = -1
    for index, point in enumerate(judged):
        earlier = judged[:index]
        if all(point.metric > each.metric for each in earlier) or all(
            point.loss < each.loss for each in earlier
        ):
            latest = point.step
    return bool(judged) and sum(point.step > latest for point in eval_points) >= patience
