"""The learning-rate test: short runs at a few rates from the same start, picked by the held-out
loss.

    points = list(try_rates(plan, facts))      one base load; each rate starts from the same weights
    conclude(base, points) -> RateTest          which rate, and from which on the model collapses

A rate collapses when its loss is not finite, rises by a fifth above the lowest it had, its gradient
is ten times the usual one, or the held-out loss is worse than the untrained model's. Higher ones
are not tried. `test_data` is not looked at. Left out: printing and drawing (curve.py), and what a
longer run would prefer, which is often a little less."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import CheckResult, TrainStep
from tunesmith.core.types import Plan, PlanValue
from tunesmith.evaluate.items import EvalItems, build_eval_items
from tunesmith.evaluate.measure import measure_eval_loss
from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score
from tunesmith.model.adapters import copy_weights, restore_weights
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session, open_session
from tunesmith.train.loop import TrainingLoop

STEPS = 40
RATE_FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)  # of the plan's rate
HELD_OUT_TOKENS = 8_000
LOSS_SMOOTHING, MAX_LOSS_RISE, MAX_GRAD_JUMP = 0.2, 1.2, 10.0
SETTLING_STEPS = 5  # steps after which a loss and a gradient have a usual size


@dataclass(frozen=True, eq=False)
class LRTrial:
    """One rate; rate 0 is the model before any training."""

    learning_rate: float
    losses: tuple[float, ...]  # of each step
    held_out: MetricValues | None  # none when the weights are of no use
    collapse_reason: str = ""  # how it shows


@dataclass(frozen=True)
class LRPoint:
    """One rate as it is reported. `change`: of the held-out loss against the chosen rate's, paired
    by row, with its interval; empty for the chosen one and for those that collapsed."""

    learning_rate: float
    loss: float | None
    low: float | None
    high: float | None
    losses: tuple[float, ...]
    collapse_reason: str
    difference: tuple[float, ...] = ()


@dataclass(frozen=True)
class LRFinderResult:
    """`chosen`: that of the lowest held-out loss, none when every rate collapsed. `as_good`: what
    cannot be told from it."""

    metric: str
    steps: int
    rows: int
    base_loss: float
    points: tuple[LRPoint, ...]
    chosen_rate: float | None
    similar_rates: tuple[float, ...]
    collapse_rate: float | None
    planned_rate: float
    caveats: tuple[str, ...] = ()


def select_eval_items(plan: Plan, inputs: RunInputs) -> EvalItems:
    """What short trainings are told apart by; no answer is graded, so no metric is asked for."""
    no_metrics = PlanValue((), "rule", "no answers are looked at")
    return build_eval_items(plan.with_settings(metrics=no_metrics), inputs)


def try_rates(plan: Plan, inputs: RunInputs, *, steps: int = STEPS) -> Iterator[LRTrial]:
    """The untrained model first, then the rates from low to high. Raises InputError without
    held-out rows."""
    if plan.config.stage == "preference":
        fix = "start from the plan's rate, and compare two runs"
        raise InputError(
            "a held-out loss does not say how well pairs are told apart", where="stage", fix=fix
        )
    items = select_eval_items(plan, inputs)
    if not items.has_training_eval:
        message = "no held-out rows to pick by; test_data is for the end"
        raise InputError(message, where="eval_data", fix="give eval_data, or --eval-split 0.1")
    items = limit_items(items, HELD_OUT_TOKENS)
    session = open_session(plan, inputs)
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
    """Of the rows to select by, the first ones, until they have so many tokens."""
    tokens, end = 0, 0
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
    try:
        for event in training:
            if isinstance(event, TrainStep):
                train_steps.append(event)
            elif isinstance(event, CheckResult) and event.kind == "non-finite":
                collapse_reason = f"loss or gradient not finite at step {event.step}"
    except GateError:
        return LRTrial(rate, _collect_losses(train_steps), None, "loss or gradient not finite")
    collapse_reason = collapse_reason or detect_collapse(train_steps)
    return LRTrial(
        rate, _collect_losses(train_steps), measure_eval_loss(session, items), collapse_reason
    )


def _collect_losses(train_steps: Sequence[TrainStep]) -> tuple[float, ...]:
    return tuple(step.loss for step in train_steps)


def detect_collapse(train_steps: Sequence[TrainStep]) -> str:
    """What in the course of the steps shows a collapse, or nothing. Losses are smoothed: steps
    differ in their rows."""
    smoothed_loss, lowest_loss = 0.0, float("inf")
    for index, step in enumerate(train_steps):
        smoothed_loss = (
            step.loss
            if index == 0
            else (1 - LOSS_SMOOTHING) * smoothed_loss + LOSS_SMOOTHING * step.loss
        )
        if index < SETTLING_STEPS:
            continue
        median_grad_norm = statistics.median(
            earlier_step.grad_norm for earlier_step in train_steps[:index]
        )
        if step.grad_norm > MAX_GRAD_JUMP * median_grad_norm > 0:
            return f"the gradient is {step.grad_norm / median_grad_norm:.0f} times the usual one at step {step.step}"
        lowest_loss = min(lowest_loss, smoothed_loss)
        if (
            smoothed_loss > MAX_LOSS_RISE * lowest_loss and smoothed_loss - lowest_loss > 0.05
        ):  # nats: near 0 a fifth is nothing
            return (
                f"the loss rises from {lowest_loss:.3f} to {smoothed_loss:.3f} at step {step.step}"
            )
    return ""


def summarize_trials(plan: Plan, trials: Sequence[LRTrial]) -> LRFinderResult:
    """`trials` as `try_rates` gave them."""
    untrained, *rate_trials = trials
    assert untrained.held_out is not None
    base_score = compute_score(untrained.held_out)
    rate_trials = [_mark_worse_than_base(trial, base_score.value) for trial in rate_trials]
    sound_trials = [
        trial for trial in rate_trials if trial.held_out is not None and not trial.collapse_reason
    ]
    best = min(sound_trials, key=_get_held_out_loss, default=None)
    points = tuple(_build_point(trial, best) for trial in rate_trials)
    similar_rates = tuple(
        point.learning_rate
        for point in points
        if point.difference and point.difference[1] <= 0 <= point.difference[2]
    )
    collapse_rate = next(
        (trial.learning_rate for trial in rate_trials if trial.collapse_reason), None
    )
    return LRFinderResult(
        metric=untrained.held_out.metric,
        steps=len(rate_trials[0].losses),
        rows=base_score.n,
        base_loss=base_score.value,
        points=points,
        chosen_rate=None if best is None else best.learning_rate,
        similar_rates=similar_rates,
        collapse_rate=collapse_rate,
        planned_rate=plan.config.learning_rate,
        caveats=tuple(_iter_caveats(best, rate_trials, similar_rates)),
    )


def _mark_worse_than_base(trial: LRTrial, base_loss: float) -> LRTrial:
    """A rate after which the model is worse than before has collapsed too."""
    if trial.collapse_reason or trial.held_out is None or _get_held_out_loss(trial) <= base_loss:
        return trial
    return dataclasses.replace(
        trial,
        collapse_reason=f"held out, it is worse than before training ({_get_held_out_loss(trial):.3f})",
    )


def _get_held_out_loss(trial: LRTrial) -> float:
    assert trial.held_out is not None
    return compute_score(trial.held_out).value


def _build_point(trial: LRTrial, best: LRTrial | None) -> LRPoint:
    if trial.held_out is None:
        return LRPoint(trial.learning_rate, None, None, None, trial.losses, trial.collapse_reason)
    loss_score, difference = compute_score(trial.held_out), ()
    if (
        best is not None
        and best.held_out is not None
        and trial is not best
        and not trial.collapse_reason
    ):
        comparison = compare_measurements(best.held_out, trial.held_out)
        difference = (comparison.difference, comparison.low, comparison.high)
    return LRPoint(
        trial.learning_rate,
        loss_score.value,
        loss_score.low,
        loss_score.high,
        trial.losses,
        trial.collapse_reason,
        difference,
    )


def _iter_caveats(
    best: LRTrial | None, rate_trials: Sequence[LRTrial], similar_rates: Sequence[float]
) -> Iterator[str]:
    if best is None:
        yield "every rate collapsed: start much lower, and look at the rows"
    elif best is rate_trials[-1]:
        yield "the highest rate that was tried is the best: a higher one may be better still"
    elif best is rate_trials[0]:
        yield "the lowest rate that was tried is the best: a lower one may be better still"
    if similar_rates:
        yield f"cannot be told from it: {', '.join(f'{rate:g}' for rate in similar_rates)}"
