"""Turn the answers of the arms into a table and a decision.

    ArmResults -> an ArmRow per kind -> the cheapest not significantly worse than the best

All arms answer the same items, so they are compared item by item. Prompts of one kind count by
their best wording, with the mean over wordings; trainings of one size count by their mean over
seeds. Cost follows what must be built and maintained: nothing, a schema, a longer prompt, an index,
a model (Arm.cost_key). Left out: the words of the report (cli/views/measured_advice.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.run_arm import ArmResult
from tunesmith.core.events import Score
from tunesmith.core.types import Json
from tunesmith.evaluate.generate_until import EvalPrompt
from tunesmith.evaluate.metrics import grade_answer, parse_metric_arg
from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score
from tunesmith.evaluate.statistics import MIN_ITEMS, compute_detectable_difference

FORMAT_METRICS = ("json_valid", "schema_valid")  # blind to the content of an answer
FEW_ITEMS = 20  # fewer give a first impression only
MIN_USEFUL_SCORE = 0.1  # below it no arm solves the task
Conclusion = Literal["prompt", "constrained decoding", "retrieval", "sft", "nothing", "undecided"]


@dataclass(frozen=True)
class ArmRow:
    """One kind of arm, with its best wording."""

    name: str
    arm: Arm
    variants: int  # wordings or seeds
    score: Score
    mean_score: float  # over the variants
    min_score: float
    other_scores: tuple[Score, ...]  # of the other metrics
    prompt_tokens: float
    request_seconds: float  # of a single request
    train_minutes: float
    # to the best row, paired by item: difference, low, high; empty for the best row
    difference: tuple[float, ...] = ()

    @property
    def may_be_best(self) -> bool:
        """Whether it is the best row, or not significantly worse."""
        return not self.difference or self.difference[2] >= 0


@dataclass(frozen=True)
class Decision:
    conclusion: Conclusion
    chosen: ArmRow  # the cheapest that is not significantly worse than the best
    best: ArmRow
    detectable_difference: float  # with 80% power, on so many items
    items: int
    caveats: tuple[str, ...]
    counterfactuals: tuple[str, ...]
    # kinds that did not fit in the time: with any, it is undecided unless a training wins
    untried_kinds: tuple[str, ...] = ()


def choose_primary_metric(metrics: Sequence[str]) -> str:
    """Return the first metric that grades content rather than format."""
    return next((name for name in metrics if name not in FORMAT_METRICS), metrics[0])


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, eq=False)
class ArmGrader:
    """Grade the answers of arms, item by item."""

    questions: tuple[EvalPrompt, ...]
    metric: str
    metrics: tuple[str, ...]
    schema: Json | None
    groups: tuple[str, ...] = ()  # of the questions, where some are not independent

    def grade_items(self, result: ArmResult, metric: str = "") -> tuple[float, ...]:
        metric = metric or self.metric
        metric_arg = parse_metric_arg(metric, self.schema)
        return tuple(
            grade_answer(metric, result.answers[question.id], question.expected, metric_arg)
            for question in self.questions
        )

    def average_grades(self, results: Sequence[ArmResult], metric: str = "") -> MetricValues:
        """Return the mean over results, by item."""
        values = np.mean([self.grade_items(result, metric) for result in results], axis=0)
        ids = tuple(question.id for question in self.questions)
        name = metric or self.metric
        return MetricValues("items", name, ids, tuple(values.tolist()), groups=self.groups)


def build_table(results: Sequence[ArmResult], grader: ArmGrader) -> tuple[ArmRow, ...]:
    """Return the rows from the cheapest kind to the most expensive, each compared with the best."""
    results_by_kind: dict[Arm, list[ArmResult]] = {}
    for result in results:
        results_by_kind.setdefault(result.arm.row_key, []).append(result)
    counted_by_kind: dict[Arm, Sequence[ArmResult]] = {}
    values_by_kind: dict[Arm, MetricValues] = {}
    for kind, kind_results in results_by_kind.items():
        counted_by_kind[kind] = _select_counted(kind_results, grader)
        values_by_kind[kind] = grader.average_grades(counted_by_kind[kind])
    best = _find_best(values_by_kind)
    rows: list[ArmRow] = []
    for kind in sorted(results_by_kind, key=lambda arm: arm.cost_key):
        difference: tuple[float, ...] = ()
        if kind != best:
            comparison = compare_measurements(values_by_kind[best], values_by_kind[kind])
            difference = (comparison.difference, comparison.low, comparison.high)
        rows.append(_build_row(results_by_kind[kind], counted_by_kind[kind], grader, difference))
    return tuple(rows)


def _select_counted(results: Sequence[ArmResult], grader: ArmGrader) -> Sequence[ArmResult]:
    """Return the best wording; all of several trainings."""
    if results[0].arm.examples:
        return results
    return [max(results, key=lambda result: statistics.fmean(grader.grade_items(result)))]


def _find_best(values_by_kind: Mapping[Arm, MetricValues]) -> Arm:
    """Return the kind with the highest mean; among equals the cheapest."""

    def sort_key(kind: Arm) -> tuple[float, list[int]]:
        return compute_score(values_by_kind[kind]).value, [-cost for cost in kind.cost_key]

    return max(values_by_kind, key=sort_key)


def _build_row(
    results: Sequence[ArmResult],
    counted: Sequence[ArmResult],
    grader: ArmGrader,
    difference: tuple[float, ...],
) -> ArmRow:
    means = [statistics.fmean(grader.grade_items(result)) for result in results]
    other_scores: list[Score] = []
    for metric in grader.metrics:
        if metric != grader.metric:
            other_scores.append(compute_score(grader.average_grades(counted, metric)))
    return ArmRow(
        name=results[0].arm.row_key.name,
        arm=counted[0].arm,
        variants=len(results),
        score=compute_score(grader.average_grades(counted)),
        mean_score=statistics.fmean(means),
        min_score=min(means),
        other_scores=tuple(other_scores),
        prompt_tokens=statistics.fmean(result.prompt_tokens for result in counted),
        request_seconds=statistics.median(result.request_seconds for result in counted),
        train_minutes=statistics.fmean(result.train_seconds for result in counted) / 60,
        difference=difference,
    )


# ---------------------------------------------------------------- the verdict


def make_decision(
    rows: Sequence[ArmRow], target: float | None, skipped: Sequence[Arm] = ()
) -> Decision:
    """Decide from the rows of build_table; `skipped` are the arms that did not fit in the time."""
    best = next(row for row in rows if not row.difference)
    is_too_few = best.score.independent < MIN_ITEMS
    chosen = best if is_too_few else next(row for row in rows if row.may_be_best)
    detectable = _compute_detectable_difference(chosen, rows)
    conclusion = _draw_conclusion(chosen, best, target)
    untried_kinds = _find_untried_kinds(rows, skipped)
    if is_too_few or (untried_kinds and conclusion != "sft"):
        conclusion = "undecided"
    return Decision(
        conclusion=conclusion,
        chosen=chosen,
        best=best,
        detectable_difference=detectable,
        items=best.score.n,
        caveats=tuple(_iter_caveats(chosen, best, rows, detectable)),
        counterfactuals=tuple(_iter_counterfactuals(chosen, best, rows, detectable, target)),
        untried_kinds=untried_kinds,
    )


def _find_untried_kinds(rows: Sequence[ArmRow], skipped: Sequence[Arm]) -> tuple[str, ...]:
    """Return the kinds without a row; skipped arms of other kinds are wordings or sizes."""
    untried: set[str] = set()
    for arm in skipped:
        untried.update(_list_kinds(arm))
    for row in rows:
        untried.difference_update(_list_kinds(row.arm))
    return tuple(sorted(untried))


def _list_kinds(arm: Arm) -> list[str]:
    kinds = {
        "retrieval": arm.passages,
        "training": arm.examples,
        "the schema": arm.is_constrained,
        "prompts": arm.shots,
    }
    return [kind for kind, amount in kinds.items() if amount]


def _draw_conclusion(chosen: ArmRow, best: ArmRow, target: float | None) -> Conclusion:
    required = MIN_USEFUL_SCORE if target is None else target
    if best.score.high < required or best.score.value < MIN_USEFUL_SCORE:
        return "nothing"
    if chosen.arm.examples:
        return "sft"
    if chosen.arm.passages:
        return "retrieval"
    if chosen.arm.is_constrained and not chosen.arm.shots:
        return "constrained decoding"
    return "prompt"


def _compute_detectable_difference(chosen: ArmRow, rows: Sequence[ArmRow]) -> float:
    """Return the difference to the best that is detected with 80% power."""
    compared_row = next((row for row in (chosen, *rows) if row.difference), None)
    if compared_row is None:
        return 1.0  # nothing to compare with
    _, low, high = compared_row.difference
    return compute_detectable_difference(low, high)


def _iter_caveats(
    chosen: ArmRow, best: ArmRow, rows: Sequence[ArmRow], detectable: float
) -> Iterator[str]:
    num_items = best.score.n
    if num_items < MIN_ITEMS:
        yield f"{num_items} items are too few for any conclusion: measure at least {MIN_ITEMS}"
    elif num_items < FEW_ITEMS:
        yield (
            f"{num_items} items are few: only a difference of about {detectable:.2f} or more is "
            "likely to be detected. An arm that fails on nearly all items or on none is a result; "
            "two similar arms are not"
        )
    if chosen.variants > 1 and not chosen.arm.examples:
        yield (
            f"{chosen.arm.variant} is the best of {chosen.variants} wordings, selected on the "
            f"items that score it: their mean is {chosen.mean_score:.3f}, the worst "
            f"{chosen.min_score:.3f}"
        )
    trained = [row for row in rows if row.arm.examples]
    if trained and all(row.variants == 1 for row in trained):
        yield "each size was trained once: the intervals do not cover seed-to-seed variation"
    if chosen is not best and chosen.difference[1] < -0.1:
        low, high = chosen.difference[1:]
        yield (
            "not significantly worse does not mean equally good: the difference is in "
            f"[{low:+.3f}, {high:+.3f}]"
        )


def _iter_counterfactuals(
    chosen: ArmRow, best: ArmRow, rows: Sequence[ArmRow], detectable: float, target: float | None
) -> Iterator[str]:
    if chosen is not best:
        difference = chosen.difference[0]
        ratio = detectable / max(0.02, abs(difference))
        needed_items = math.ceil(chosen.score.n * ratio**2)
        if needed_items > chosen.score.n and difference < 0:
            yield (
                f"{needed_items:,} items, if {best.name} stays {-difference:.3f} ahead: then the "
                "difference is significant, and it wins"
            )
    trained = [row for row in rows if row.arm.examples]
    competitive = [row for row in trained if row.may_be_best]
    if competitive and not chosen.arm.examples:
        best_trained = max(competitive, key=lambda row: row.score.value)
        saved_seconds = chosen.request_seconds - best_trained.request_seconds
        saved_tokens = chosen.prompt_tokens - best_trained.prompt_tokens
        if saved_tokens > 0.2 * chosen.prompt_tokens and saved_seconds > 0:
            saved = f"{saved_tokens:.0f} prompt tokens and {saved_seconds:.2f} s per request"
            yield f"many requests: {best_trained.name} saves {saved}"
    if not trained and not chosen.arm.examples:
        yield "training: none was tried"
    if target is not None and chosen.score.value < target:
        yield f"a target below {target:g}: {chosen.name} has {chosen.score.value:.3f}"
