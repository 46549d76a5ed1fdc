"""From the arms' answers to a table and a verdict.

    outcomes -> Row of each kind of arm -> the cheapest that is not shown to be worse than the best -> Verdict

All arms were asked the same items, so they are compared item by item. Prompts of one kind count by
their best wording, beside the mean over wordings; trainings of one size count by their mean over
seeds. Cost goes by what must be built and kept: nothing, a schema, a longer prompt, an index, a
model (Arm.effort). Left out: words for people (measuredview.py)."""

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
from tunesmith.core.types import Comparison, Json
from tunesmith.evaluate.generate_until import EvalPrompt
from tunesmith.evaluate.metrics import grade_answer, parse_metric_arg
from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score
from tunesmith.evaluate.significance import compute_detectable_difference

FORMAT_METRICS = ("json_valid", "schema_valid")  # say nothing of what an answer holds
FEW_ITEMS = 20  # items under which a verdict is no more than a look
MIN_USEFUL_SCORE = 0.1  # of a score: below it no arm has done the task
Conclusion = Literal["prompt", "constrained decoding", "retrieval", "sft", "nothing", "undecided"]


@dataclass(frozen=True)
class ArmRow:
    """One kind of arm. `arm`: its best wording; `mean`, `least`: over wordings and seeds. `change`:
    against the best row, paired by item, with its interval; empty for the best one."""

    name: str
    arm: Arm
    variants: int
    score: Score
    mean_score: float
    min_score: float
    other_scores: tuple[Score, ...]  # the other metrics
    prompt_tokens: float
    request_seconds: float  # of a request alone
    train_minutes: float
    difference: tuple[float, ...] = ()


@dataclass(frozen=True)
class Decision:
    """`row`: of what was tried, the cheapest that is not shown to be worse than `best`. `smallest`:
    the least difference that so many items show in four of five cases. `untried`: kinds of ways
    that had no room, any of which may be better; then the answer is "undecided", unless a training
    wins anyway."""

    conclusion: Conclusion
    chosen: ArmRow
    best: ArmRow
    detectable_difference: float
    items: int
    caveats: tuple[str, ...]
    counterfactuals: tuple[str, ...]
    untried_kinds: tuple[str, ...] = ()


def choose_primary_metric(metrics: Sequence[str]) -> str:
    """The first that looks at what an answer holds."""
    return next((name for name in metrics if name not in FORMAT_METRICS), metrics[0])


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, eq=False)
class ArmGrader:
    """Answers of arms as values by item."""

    questions: tuple[EvalPrompt, ...]
    metric: str
    metrics: tuple[str, ...]
    schema: Json | None

    def grade_items(self, result: ArmResult, metric: str = "") -> tuple[float, ...]:
        metric = metric or self.metric
        metric_arg = parse_metric_arg(metric, self.schema)
        return tuple(
            grade_answer(metric, result.answers[question.id], question.expected, metric_arg)
            for question in self.questions
        )

    def average_grades(self, results: Sequence[ArmResult], metric: str = "") -> MetricValues:
        """The mean over outcomes, by item."""
        values = np.mean([self.grade_items(result, metric) for result in results], axis=0)
        ids = tuple(question.id for question in self.questions)
        return MetricValues("items", metric or self.metric, ids, tuple(values.tolist()))


def build_table(results: Sequence[ArmResult], grader: ArmGrader) -> tuple[ArmRow, ...]:
    """From the cheapest kind to the dearest, each against the best."""
    results_by_kind: dict[Arm, list[ArmResult]] = {}
    for result in results:
        results_by_kind.setdefault(result.arm.row_key, []).append(result)
    counted_by_kind = {
        kind: _select_counted(counted, grader) for kind, counted in results_by_kind.items()
    }
    values_by_kind = {kind: grader.average_grades(found) for kind, found in counted_by_kind.items()}
    best = _find_best(values_by_kind)
    rows: list[ArmRow] = []
    for kind in sorted(results_by_kind, key=lambda arm: arm.cost_key):
        comparison = (
            None
            if kind == best
            else compare_measurements(values_by_kind[best], values_by_kind[kind])
        )
        rows.append(_build_row(results_by_kind[kind], counted_by_kind[kind], grader, comparison))
    return tuple(rows)


def _select_counted(results: Sequence[ArmResult], grader: ArmGrader) -> Sequence[ArmResult]:
    """The wording that did best; of trainings all."""
    if results[0].arm.examples:
        return results
    return [max(results, key=lambda result: statistics.fmean(grader.grade_items(result)))]


def _find_best(values_by_kind: Mapping[Arm, MetricValues]) -> Arm:
    """The highest mean; of equal ones the cheapest."""
    return max(
        values_by_kind,
        key=lambda arm: (
            compute_score(values_by_kind[arm]).value,
            [-cost for cost in arm.cost_key],
        ),
    )


def _build_row(
    results: Sequence[ArmResult],
    counted: Sequence[ArmResult],
    grader: ArmGrader,
    comparison: Comparison | None,
) -> ArmRow:
    means = [statistics.fmean(grader.grade_items(result)) for result in results]
    other_metrics = [name for name in grader.metrics if name != grader.metric]
    return ArmRow(
        name=results[0].arm.row_key.name,
        arm=counted[0].arm,
        variants=len(results),
        score=compute_score(grader.average_grades(counted)),
        mean_score=statistics.fmean(means),
        min_score=min(means),
        other_scores=tuple(
            compute_score(grader.average_grades(counted, name)) for name in other_metrics
        ),
        prompt_tokens=statistics.fmean(result.prompt_tokens for result in counted),
        request_seconds=statistics.median(result.request_seconds for result in counted),
        train_minutes=statistics.fmean(result.train_seconds for result in counted) / 60,
        difference=()
        if comparison is None
        else (comparison.difference, comparison.low, comparison.high),
    )


# ---------------------------------------------------------------- the verdict


def make_decision(
    rows: Sequence[ArmRow], target: float | None, skipped: Sequence[Arm] = ()
) -> Decision:
    """`rows` as `table_of` gave them; `left_out`: what had no room in the time."""
    best = next(row for row in rows if not row.difference)
    chosen = next(row for row in rows if not row.difference or row.difference[2] >= 0)
    detectable_difference, num_items = _compute_detectable_difference(chosen, rows), best.score.n
    conclusion, untried_kinds = (
        _draw_conclusion(chosen, best, target),
        _find_untried_kinds(rows, skipped),
    )
    return Decision(
        conclusion="undecided" if untried_kinds and conclusion != "sft" else conclusion,
        chosen=chosen,
        best=best,
        detectable_difference=detectable_difference,
        items=num_items,
        caveats=tuple(_iter_caveats(chosen, best, rows, num_items, detectable_difference)),
        counterfactuals=tuple(
            _iter_counterfactuals(chosen, best, rows, detectable_difference, target)
        ),
        untried_kinds=untried_kinds,
    )


def _find_untried_kinds(rows: Sequence[ArmRow], skipped: Sequence[Arm]) -> tuple[str, ...]:
    """Kinds of ways without a row: what was left out of a kind that has one is another wording, or
    another size."""
    missing = {kind for arm in skipped for kind in _list_kinds(arm)}
    return tuple(sorted(missing - {kind for row in rows for kind in _list_kinds(row.arm)}))


def _list_kinds(arm: Arm) -> list[str]:
    kinds = {
        "retrieval": arm.passages,
        "training": arm.examples,
        "the schema": arm.is_constrained,
        "prompts": arm.shots,
    }
    return [kind for kind, amount in kinds.items() if amount]


def _draw_conclusion(chosen: ArmRow, best: ArmRow, target: float | None) -> Conclusion:
    if (
        best.score.high < (MIN_USEFUL_SCORE if target is None else target)
        or best.score.value < MIN_USEFUL_SCORE
    ):
        return "nothing"
    if chosen.arm.examples:
        return "sft"
    if chosen.arm.passages:
        return "retrieval"
    return (
        "constrained decoding" if chosen.arm.is_constrained and not chosen.arm.shots else "prompt"
    )


def _compute_detectable_difference(chosen: ArmRow, rows: Sequence[ArmRow]) -> float:
    """Difference between the chosen row and the best, or the first other one, that is seen in 80%
    of samples."""
    compared_row = next((row for row in (chosen, *rows) if row.difference), None)
    if compared_row is None:
        return 1.0  # nothing to compare with
    _, low, high = compared_row.difference
    return compute_detectable_difference(low, high)


def _iter_caveats(
    chosen: ArmRow,
    best: ArmRow,
    rows: Sequence[ArmRow],
    num_items: int,
    detectable_difference: float,
) -> Iterator[str]:
    if num_items < FEW_ITEMS:
        yield (
            f"{num_items} items are few: only a difference of about {detectable_difference:.2f} or more is likely to be seen. "
            "That an arm fails on nearly all of them, or on none, can be concluded; of two near ones, none"
        )
    if chosen.variants > 1 and not chosen.arm.examples:
        yield (
            f"{chosen.arm.variant} is the best of {chosen.variants} wordings, picked on the items that score it: "
            f"their mean is {chosen.mean_score:.3f}, the worst {chosen.min_score:.3f}"
        )
    if any(row.arm.examples for row in rows) and all(
        row.variants == 1 for row in rows if row.arm.examples
    ):
        yield "each size was trained once: another seed may differ by more than the interval says"
    if chosen is not best and chosen.difference[1] < -0.1:
        low, high = chosen.difference[1:]
        yield f"not shown to be worse is not shown to be as good: the difference lies in [{low:+.3f}, {high:+.3f}]"


def _iter_counterfactuals(
    chosen: ArmRow,
    best: ArmRow,
    rows: Sequence[ArmRow],
    detectable_difference: float,
    target: float | None,
) -> Iterator[str]:
    if chosen is not best:
        needed_items = math.ceil(
            chosen.score.n * (detectable_difference / max(0.02, abs(chosen.difference[0]))) ** 2
        )
        if needed_items > chosen.score.n and chosen.difference[0] < 0:
            lead = f"{best.name} stays {-chosen.difference[0]:.3f} ahead"
            yield f"{needed_items:,} items, if {lead}: then that is seen, and it wins"
    trained = [row for row in rows if row.arm.examples]
    not_worse = [row for row in trained if not row.difference or row.difference[2] >= 0]
    if not chosen.arm.examples and not_worse:
        best_trained = max(not_worse, key=lambda row: row.score.value)
        saved_seconds, saved_tokens = (
            chosen.request_seconds - best_trained.request_seconds,
            chosen.prompt_tokens - best_trained.prompt_tokens,
        )
        if saved_tokens > 0.2 * chosen.prompt_tokens and saved_seconds > 0:
            yield f"many requests: {best_trained.name} saves {saved_tokens:.0f} prompt tokens and {saved_seconds:.2f} s on each"
    if not trained and not chosen.arm.examples:
        yield "a training: none was tried"
    if target is not None and chosen.score.value < target:
        yield f"a target lower than {target:g}: {chosen.name} has {chosen.score.value:.3f}"
