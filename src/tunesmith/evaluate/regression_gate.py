"""Decide whether a model may be released: no metric worse, no more forgetting than allowed.

In: comparisons, a forgetting margin. Out: EvalReport and Gates.
A gate is a non-inferiority test: the worst end of the interval lies within a margin. General text
has the margin that the plan set before training, and may get worse within it; grades have
GRADE_MARGIN, other metrics RELATIVE_MARGIN of the value before, and must not be significantly worse
either. An interval that is too wide to pass is a failure: too few items to tell. KL to the base is
not gated. The limits of the recipe's `gates` are gates, too: they compare the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK, Score
from tunesmith.core.evidence import ErrorAnalysis
from tunesmith.core.run_dir import find_weights_dir, read_run_plan
from tunesmith.core.types import Comparison
from tunesmith.evaluate.error_analysis import Evaluation, analyze_errors
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import EvalResults
from tunesmith.evaluate.statistics import MIN_ITEMS, TOO_FEW_ITEMS, judge_comparison
from tunesmith.recipe.fields import Metrics
from tunesmith.recipe.metric_limits import MetricLimit, parse_limits
from tunesmith.recipe.yaml_lines import read_flag

GRADE_MARGIN = 0.1  # of metrics from 0 to 1: ten points
RELATIVE_MARGIN = 0.1


@dataclass(frozen=True)
class Gate:
    """One gate. `bound` is the worst end of the interval of the difference; it may lie on the worse
    side by at most `margin`. For a limit of the recipe: that of the value, and the limit."""

    name: str
    passed: bool
    bound: float
    margin: float
    message: str


@dataclass(frozen=True)
class EvalReport:
    """Scores of a model and its comparisons with the model before training; a base model has only
    scores."""

    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...] = ()
    margin: float | None = None  # forgetting that the plan allows, in bits per byte
    errors: ErrorAnalysis | None = None
    limits: tuple[MetricLimit, ...] = ()  # of the recipe's `gates`

    @classmethod
    def from_evaluation(cls, evaluation: Evaluation, run: Path | None) -> Self:
        """Report on a model before and after training. Raises InputError if nothing was measured,
        which is no result that an empty table could show."""
        if not evaluation.comparisons:
            message = "the run has neither test_data nor retention_data"
            fix = "name a file to evaluate on: --data test.jsonl"
            raise InputError(message, where="" if run is None else str(run), fix=fix)
        margin = None
        limits: tuple[MetricLimit, ...] = ()
        if run is not None:
            plan = read_run_plan(find_weights_dir(run))
            margin = plan.config.forgetting_margin
            limits = parse_limits(plan.recipe.get("gates") or {})
        scores = tuple(comparison.after for comparison in evaluation.comparisons)
        return cls(scores, evaluation.comparisons, margin, evaluation.errors, limits)

    @classmethod
    def from_results(cls, results: EvalResults, metrics: Sequence[str]) -> Self:
        """Report on a model that is compared with no other; `metrics` may be functions in files."""
        errors = analyze_errors(None, results, graded_metrics=metrics)
        return cls(tuple(results.iter_scores(step=0)), errors=errors)

    def check_gates(self) -> tuple[Gate, ...]:
        """Return the gates. Raises InputError for a base model, which is compared with nothing."""
        if not self.comparisons:
            fix = "name a run, a checkpoint or an adapter, or compare two models"
            raise InputError("a base model has no before/after to gate", where="--gate", fix=fix)
        gates = build_gates(self.comparisons, self.margin)
        return (*gates, *build_limit_gates(self.scores, self.limits))


def build_gates(comparisons: Sequence[Comparison], margin: float | None) -> tuple[Gate, ...]:
    """Return a gate per comparison. Raises InputError if there is none to gate."""
    gates: list[Gate] = []
    for comparison in comparisons:
        is_general = comparison.task == GENERAL_TASK
        if is_general and comparison.metric != BITS_PER_BYTE:
            continue
        if is_general and margin is not None:
            gates.append(_judge_gate(comparison, margin, is_loss_allowed=True))
        else:
            gates.append(_judge_gate(comparison, _choose_margin(comparison)))
    if not gates:
        fix = "add test_data or retention_data to the recipe"
        raise InputError("there is no metric to gate", where="--gate", fix=fix)
    return tuple(gates)


def build_limit_gates(scores: Sequence[Score], limits: Sequence[MetricLimit]) -> tuple[Gate, ...]:
    """Return a gate per limit of the recipe and score that it is for.

    The value decides; the message says when its interval reaches beyond the limit. A limit on what
    was not measured, or on too few items, fails."""
    gates: list[Gate] = []
    for limit in limits:
        matching = [score for score in scores if limit.is_limit_of(score.task, score.metric)]
        gates += [_judge_limit(score, limit) for score in matching]
        if not matching:
            gates.append(Gate(str(limit), False, math.nan, limit.limit, "not measured"))
    return tuple(gates)


def _judge_limit(score: Score, limit: MetricLimit) -> Gate:
    worst = score.low if limit.is_least else score.high
    verdict = "held" if limit.is_met_by(score.value) else "not held"
    if score.independent < MIN_ITEMS:
        verdict = TOO_FEW_ITEMS
    elif limit.is_met_by(score.value) and not limit.is_met_by(worst):
        verdict = "held, but the interval reaches beyond the limit"
    value = f"{score.value:.4f} [{score.low:.4f}, {score.high:.4f}]"
    message = f"{value}, n = {score.size}, {limit.comparator} {limit.limit:g}: {verdict}"
    is_passed = limit.is_met_by(score.value) and score.independent >= MIN_ITEMS
    return Gate(f"{score.task} {score.metric} limit", is_passed, worst, limit.limit, message)


def _choose_margin(comparison: Comparison) -> float:
    values = (comparison.before, comparison.after)
    is_rate = comparison.improved is not None
    is_within = all(score.low >= 0 and score.high <= 1 for score in values)
    if is_rate or (is_within and comparison.higher_is_better):
        return GRADE_MARGIN
    return RELATIVE_MARGIN * abs(comparison.before.value)


def _judge_gate(comparison: Comparison, margin: float, *, is_loss_allowed: bool = False) -> Gate:
    """Return the gate of a metric that may get worse by at most `margin`.

    With `is_loss_allowed`, a significant loss within the margin passes."""
    # A gate is on these very weights: other seeds do not matter.
    comparison = replace(comparison, seed_low=None)
    low = comparison.low
    high = comparison.high
    bound = low if comparison.higher_is_better else high
    worst_loss = -low if comparison.higher_is_better else high
    least_loss = -high if comparison.higher_is_better else low
    verdict = judge_comparison(comparison)
    is_significant = verdict == "worse" and not is_loss_allowed
    has_few = comparison.after.independent < MIN_ITEMS
    if has_few or (least_loss <= margin < worst_loss and not is_significant):
        verdict = TOO_FEW_ITEMS
    elif least_loss > margin:
        verdict = "worse"
    elif is_loss_allowed and verdict == "worse" and worst_loss <= margin:
        verdict = "worse, within the margin"
    is_passed = worst_loss <= margin and verdict not in ("worse", TOO_FEW_ITEMS)
    change = f"{comparison.difference:+.4f} [{low:+.4f}, {high:+.4f}]"
    is_general = comparison.task == GENERAL_TASK
    limit = f"bits per byte, at most {margin:+g}" if is_general else f"at most {margin:.2g} worse"
    message = f"{change}, n = {comparison.after.size}, {limit}: {verdict}"
    return Gate(f"{comparison.task} {comparison.metric}", is_passed, bound, margin, message)


def parse_metrics(metrics: str | Sequence[str] | None) -> tuple[str, ...]:
    """Parse metrics as in a recipe: a list, or comma-separated text. Raises InputError."""
    if metrics is None:
        return ()
    names = metrics
    if isinstance(metrics, str):
        names = read_flag(metrics if metrics.startswith("[") else f"[{metrics}]")
    try:
        return TypeAdapter(Metrics).validate_python(list(names))
    except (ValidationError, TypeError):
        message = f"invalid list of metrics: {metrics!r:.80}"
        fix = "write --metrics 'chrf, numeric: 0.1'"
        raise InputError(message, where="metrics", fix=fix) from None
