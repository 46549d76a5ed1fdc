"""Find a learning rate: short runs at a few rates from the same start, compared on held-out rows.

    trials = list(try_rates(plan, inputs))      one base model; each rate starts from its weights
    summarize_trials(plan, trials)              -> LRFinderResult: which rate, and where it diverges

A rate collapses when a loss is not finite or rises by a fifth above its minimum, its gradient is
ten times the median, or its held-out loss is not finite or worse than the untrained model's. Higher
rates are not tried. `test_data` is not read. Left out: what a longer run would prefer, which is
often a slightly lower rate.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import CheckResult, TrainStep
from tunesmith.core.types import Plan, PlanValue
from tunesmith.evaluate.items import EvalItems, build_eval_items
from tunesmith.evaluate.measure import measure_eval_loss
from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score
from tunesmith.evaluate.statistics import MIN_ITEMS
from tunesmith.model.adapters import copy_weights, restore_weights
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session, open_session
from tunesmith.train.loop import TrainingLoop

STEPS = 40
RATE_FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)  # times the planned rate
HELD_OUT_TOKENS = 8_000
LOSS_SMOOTHING = 0.2  # weight of the last step in the moving average
MAX_LOSS_RISE = 1.2  # times the minimum
MIN_LOSS_RISE = 0.05  # nats: near 0 a fifth is nothing
MAX_GRAD_JUMP = 10.0  # times the median
SETTLING_STEPS = 5  # before these, losses and gradients are not judged


@dataclass(frozen=True, eq=False)
class LRTrial:
    """One rate; rate 0 is the untrained model."""

    learning_rate: float
    losses: tuple[float, ...]  # of each step
    held_out: MetricValues | None  # None when the weights are unusable
    collapse_reason: str = ""


@dataclass(frozen=True)
class LRPoint:
    """One rate as it is reported."""

    learning_rate: float
    loss: float | None
    low: float | None
    high: float | None
    losses: tuple[float, ...]
    collapse_reason: str
    # of the held-out loss to the chosen rate's, paired by row: difference, low, high; empty for the
    # chosen rate and for a collapse
    difference: tuple[float, ...] = ()


@dataclass(frozen=True)
class LRFinderResult:
    metric: str
    steps: int
    rows: int
    base_loss: float
    points: tuple[LRPoint, ...]
    chosen_rate: float | None  # lowest held-out loss; None when every rate collapsed
    similar_rates: tuple[float, ...]  # not significantly different from it
    collapse_rate: float | None  # the lowest
    planned_rate: float
    caveats: tuple[str, ...] = ()


def select_eval_items(plan: Plan, inputs: RunInputs) -> EvalItems:
    """Return the held-out rows; without metrics, since no answers are generated."""
    no_metrics = PlanValue((), "rule", "no answers are graded")
    return build_eval_items(plan.with_settings(metrics=no_metrics), inputs)


def try_rates(plan: Plan, inputs: RunInputs, *, steps: int = STEPS) -> Iterator[LRTrial]:
    """Yield the untrained model, then the rates from low to high, until one collapses.

    Raises InputError without held-out rows, and for preference pairs.
    """
    if plan.config.stage == "preference":
        message = "the held-out loss does not measure preference accuracy"
        fix = "start from the planned rate, and compare two runs"
        raise InputError(message, where="stage", fix=fix)
    items = select_eval_items(plan, inputs)
    if not items.has_training_eval:
        message = "no held-out rows: test_data is reserved for the final result"
        raise InputError(message, where="eval_data", fix="set eval_data, or --eval-split 0.1")
    items = limit_items(items, HELD_OUT_TOKENS)
    session = open_session(plan, inputs, with_samples=False)
    start_weights = copy_weights(session.model.network)
    yield LRTrial(0.0, (), measure_eval_loss(session, items))
    for factor in RATE_FACTORS:
        rate = float(f"{min(1.0, plan.config.learning_rate * factor):.2g}")
        trial = _run_trial(session, items, rate, min(steps, plan.steps))
        yield trial
        if trial.collapse_reason:
            return
        restore_weights(session.model.network, start_weights)


def limit_items(items: EvalItems, max_tokens: int) -> EvalItems:
    """Keep the first eval documents, until they have `max_tokens` tokens."""
    tokens = 0
    end = 0
    while end < len(items.eval_documents) and tokens < max_tokens:
        tokens += len(items.eval_documents[end])
        end += 1
    return dataclasses.replace(items, eval_documents=items.eval_documents[:end])


def _run_trial(session: Session, items: EvalItems, rate: float, steps: int) -> LRTrial:
    config = dataclasses.replace(session.plan.config, learning_rate=rate)
    training = TrainingLoop(
        session.model, session.load_documents, config, steps=steps, warmup_steps=steps // 10
    )
    train_steps: list[TrainStep] = []
    collapse_reason = ""
    is_finite = True
    try:
        for event in training:
            if isinstance(event, TrainStep):
                train_steps.append(event)
            elif isinstance(event, CheckResult) and event.kind == "non-finite":
                collapse_reason = f"non-finite loss or gradient at step {event.step}"
    except GateError:
        is_finite = False
        collapse_reason = "non-finite loss or gradient"
    losses = tuple(step.loss for step in train_steps)
    collapse_reason = collapse_reason or detect_collapse(train_steps)
    held_out = measure_eval_loss(session, items) if is_finite else None
    if held_out is not None and not all(map(math.isfinite, held_out.values)):
        held_out = None
        collapse_reason = collapse_reason or "non-finite held-out loss"
    return LRTrial(rate, losses, held_out, collapse_reason)


def detect_collapse(train_steps: Sequence[TrainStep]) -> str:
    """Return how the steps show a collapse, or nothing. Losses are smoothed, since rows differ."""
    smoothed_loss = 0.0
    lowest_loss = float("inf")
    for index, step in enumerate(train_steps):
        smoothed_loss += (LOSS_SMOOTHING if index else 1.0) * (step.loss - smoothed_loss)
        if index < SETTLING_STEPS:
            continue
        grad_norm = statistics.median(earlier.grad_norm for earlier in train_steps[:index])
        if step.grad_norm > MAX_GRAD_JUMP * grad_norm > 0:
            ratio = step.grad_norm / grad_norm
            return f"the gradient is {ratio:.0f} times the median at step {step.step}"
        lowest_loss = min(lowest_loss, smoothed_loss)
        rise = smoothed_loss - lowest_loss
        if smoothed_loss > MAX_LOSS_RISE * lowest_loss and rise > MIN_LOSS_RISE:
            losses = f"{lowest_loss:.3f} to {smoothed_loss:.3f}"
            return f"the loss rises from {losses} at step {step.step}"
    return ""


def summarize_trials(plan: Plan, trials: Sequence[LRTrial]) -> LRFinderResult:
    """Choose a rate from the trials of try_rates."""
    untrained, *rate_trials = trials
    assert untrained.held_out is not None
    base_score = compute_score(untrained.held_out)
    rate_trials = [_mark_worse_than_base(trial, base_score.value) for trial in rate_trials]
    collapsed = [trial for trial in rate_trials if trial.collapse_reason]
    sound = [trial for trial in rate_trials if trial.held_out and not trial.collapse_reason]
    best = min(sound, key=_get_held_out_loss, default=None)
    points = tuple(_build_point(trial, best) for trial in rate_trials)
    similar_rates: list[float] = []
    for point in points:
        if not point.difference:
            continue
        if base_score.n < MIN_ITEMS or point.difference[1] <= 0 <= point.difference[2]:
            similar_rates.append(point.learning_rate)
    return LRFinderResult(
        metric=untrained.held_out.metric,
        steps=len(rate_trials[0].losses),
        rows=base_score.n,
        base_loss=base_score.value,
        points=points,
        chosen_rate=best.learning_rate if best else None,
        similar_rates=tuple(similar_rates),
        collapse_rate=collapsed[0].learning_rate if collapsed else None,
        planned_rate=plan.config.learning_rate,
        caveats=tuple(_iter_caveats(best, rate_trials, similar_rates)),
    )


def _mark_worse_than_base(trial: LRTrial, base_loss: float) -> LRTrial:
    """Mark a rate as collapsed if the model is worse than before training."""
    if trial.collapse_reason or trial.held_out is None or _get_held_out_loss(trial) <= base_loss:
        return trial
    reason = f"held-out loss {_get_held_out_loss(trial):.3f} is worse than before training"
    return dataclasses.replace(trial, collapse_reason=reason)


def _get_held_out_loss(trial: LRTrial) -> float:
    assert trial.held_out is not None
    return compute_score(trial.held_out).value


def _build_point(trial: LRTrial, best: LRTrial | None) -> LRPoint:
    rate = trial.learning_rate
    if trial.held_out is None:
        return LRPoint(rate, None, None, None, trial.losses, trial.collapse_reason)
    score = compute_score(trial.held_out)
    difference: tuple[float, ...] = ()
    if best is not None and best.held_out and trial is not best and not trial.collapse_reason:
        comparison = compare_measurements(best.held_out, trial.held_out)
        difference = (comparison.difference, comparison.low, comparison.high)
    return LRPoint(
        learning_rate=rate,
        loss=score.value,
        low=score.low,
        high=score.high,
        losses=trial.losses,
        collapse_reason=trial.collapse_reason,
        difference=difference,
    )


def _iter_caveats(
    best: LRTrial | None, rate_trials: Sequence[LRTrial], similar_rates: Sequence[float]
) -> Iterator[str]:
    if best is None:
        yield "every rate collapsed: start much lower, and inspect the rows"
    elif best is rate_trials[-1]:
        yield "the highest rate tried is the best: a higher one may be better"
    elif best is rate_trials[0]:
        yield "the lowest rate tried is the best: a lower one may be better"
    if similar_rates:
        rates = ", ".join(f"{rate:g}" for rate in similar_rates)
        yield f"not significantly different: {rates}"
