"""The learning-rate test: short runs at a few rates from the same start, picked by the held-out loss.

    points = list(try_rates(plan, facts))      one base load; each rate starts from the same weights
    conclude(base, points) -> RateTest          which rate, and from which on the model collapses

A rate collapses when its loss is not finite, rises by a fifth above the lowest it had, its gradient is ten times the
usual one, or the held-out loss is worse than the untrained model's. Higher ones are not tried. `test_data` is not
looked at. Left out: printing and drawing (curve.py), and what a longer run would prefer, which is often a little less.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import StepResult, Verdict
from tunesmith.core.types import Choice, Plan
from tunesmith.evaluate.measure import Items, eval_measurement, items_of
from tunesmith.evaluate.results import Measurement, compare, score
from tunesmith.model.adapters import put_back, weights_of
from tunesmith.session.inputs import Facts
from tunesmith.session.session import Workbench, set_up
from tunesmith.train.loop import Settings, Training

STEPS = 40
FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)  # of the plan's rate
HELD_OUT_TOKENS = 8_000
SMOOTHING, RISE, JUMP = 0.2, 1.2, 10.0
SETTLED = 5  # steps after which a loss and a gradient have a usual size


@dataclass(frozen=True, eq=False)
class Trial:
    """One rate; rate 0 is the model before any training."""

    rate: float
    losses: tuple[float, ...]  # of each step
    held_out: Measurement | None  # none when the weights are of no use
    collapsed: str = ""  # how it shows


@dataclass(frozen=True)
class RatePoint:
    """One rate as it is reported. `change`: of the held-out loss against the chosen rate's, paired by row, with its
    interval; empty for the chosen one and for those that collapsed."""

    rate: float
    loss: float | None
    low: float | None
    high: float | None
    losses: tuple[float, ...]
    collapsed: str
    change: tuple[float, ...] = ()


@dataclass(frozen=True)
class RateTest:
    """`chosen`: that of the lowest held-out loss, none when every rate collapsed. `as_good`: what cannot be told from
    it."""

    metric: str
    steps: int
    rows: int
    base: float
    points: tuple[RatePoint, ...]
    chosen: float | None
    as_good: tuple[float, ...]
    collapse_from: float | None
    planned: float
    doubts: tuple[str, ...] = ()


def selecting_items(plan: Plan, facts: Facts) -> Items:
    """What short trainings are told apart by; no answer is graded, so no metric is asked for."""
    nothing = Choice((), "rule", "no answers are looked at")
    return items_of(dataclasses.replace(plan, choices={**plan.choices, "metrics": nothing}), facts)


def try_rates(plan: Plan, facts: Facts, *, steps: int = STEPS) -> Iterator[Trial]:
    """The untrained model first, then the rates from low to high. Raises InputError without held-out rows."""
    if plan["stage"] == "preference":
        fix = "start from the plan's rate, and compare two runs"
        raise InputError("a held-out loss does not say how well pairs are told apart", where="stage", fix=fix)
    items = selecting_items(plan, facts)
    if not items.selecting:
        what = "no held-out rows to pick by; test_data is for the end"
        raise InputError(what, where="eval_data", fix="give eval_data, or --eval-split 0.1")
    items = some_of(items, HELD_OUT_TOKENS)
    bench = set_up(plan, facts)
    start = weights_of(bench.model.network)
    yield Trial(0.0, (), eval_measurement(bench, items))
    for factor in FACTORS:
        rate = float(f"{min(1.0, plan['learning_rate'] * factor):.2g}")
        trial = _trial(bench, items, rate, min(steps, plan.steps))
        yield trial
        if trial.collapsed:
            return
        put_back(bench.model.network, start)


def some_of(items: Items, most: int) -> Items:
    """Of the rows to select by, the first ones, until they have so many tokens."""
    tokens, end = 0, 0
    while end < len(items.eval_documents) and tokens < most:
        tokens += len(items.eval_documents[end])
        end += 1
    return dataclasses.replace(items, eval_documents=items.eval_documents[:end])


def _trial(bench: Workbench, items: Items, rate: float, steps: int) -> Trial:
    settings = dataclasses.replace(Settings.of(bench.plan), steps=steps, learning_rate=rate, warmup_steps=steps // 10)
    training = Training(bench.model, bench.documents_of, settings)
    taken: list[StepResult] = []
    broken = ""
    try:
        for event in training:
            if isinstance(event, StepResult):
                taken.append(event)
            elif isinstance(event, Verdict) and event.kind == "non-finite":
                broken = f"loss or gradient not finite at step {event.step}"
    except GateError:
        return Trial(rate, _losses(taken), None, "loss or gradient not finite")
    broken = broken or symptom(taken)
    return Trial(rate, _losses(taken), eval_measurement(bench, items), broken)


def _losses(taken: Sequence[StepResult]) -> tuple[float, ...]:
    return tuple(step.loss for step in taken)


def symptom(taken: Sequence[StepResult]) -> str:
    """What in the course of the steps shows a collapse, or nothing. Losses are smoothed: steps differ in their rows."""
    smooth, lowest = 0.0, float("inf")
    for index, step in enumerate(taken):
        smooth = step.loss if index == 0 else (1 - SMOOTHING) * smooth + SMOOTHING * step.loss
        if index < SETTLED:
            continue
        usual = statistics.median(one.grad_norm for one in taken[:index])
        if step.grad_norm > JUMP * usual > 0:
            return f"the gradient is {step.grad_norm / usual:.0f} times the usual one at step {step.step}"
        lowest = min(lowest, smooth)
        if smooth > RISE * lowest and smooth - lowest > 0.05:  # nats: near 0 a fifth is nothing
            return f"the loss rises from {lowest:.3f} to {smooth:.3f} at step {step.step}"
    return ""


def conclude(plan: Plan, trials: Sequence[Trial]) -> RateTest:
    """`trials` as `try_rates` gave them."""
    untrained, *tried = trials
    assert untrained.held_out is not None
    base = score(untrained.held_out)
    tried = [_against(trial, base.value) for trial in tried]
    sound = [trial for trial in tried if trial.held_out is not None and not trial.collapsed]
    best = min(sound, key=_value, default=None)
    points = tuple(_point(trial, best) for trial in tried)
    as_good = tuple(one.rate for one in points if one.change and one.change[1] <= 0 <= one.change[2])
    collapse = next((trial.rate for trial in tried if trial.collapsed), None)
    return RateTest(
        metric=untrained.held_out.metric,
        steps=len(tried[0].losses),
        rows=base.n,
        base=base.value,
        points=points,
        chosen=None if best is None else best.rate,
        as_good=as_good,
        collapse_from=collapse,
        planned=plan["learning_rate"],
        doubts=tuple(_doubts(best, tried, as_good)),
    )


def _against(trial: Trial, base: float) -> Trial:
    """A rate after which the model is worse than before has collapsed too."""
    if trial.collapsed or trial.held_out is None or _value(trial) <= base:
        return trial
    return dataclasses.replace(trial, collapsed=f"held out, it is worse than before training ({_value(trial):.3f})")


def _value(trial: Trial) -> float:
    assert trial.held_out is not None
    return score(trial.held_out).value


def _point(trial: Trial, best: Trial | None) -> RatePoint:
    if trial.held_out is None:
        return RatePoint(trial.rate, None, None, None, trial.losses, trial.collapsed)
    measured, change = score(trial.held_out), ()
    if best is not None and best.held_out is not None and trial is not best and not trial.collapsed:
        found = compare(best.held_out, trial.held_out)
        change = (found.difference, found.low, found.high)
    return RatePoint(trial.rate, measured.value, measured.low, measured.high, trial.losses, trial.collapsed, change)


def _doubts(best: Trial | None, tried: Sequence[Trial], as_good: Sequence[float]) -> Iterator[str]:
    if best is None:
        yield "every rate collapsed: start much lower, and look at the rows"
    elif best is tried[-1]:
        yield "the highest rate that was tried is the best: a higher one may be better still"
    elif best is tried[0]:
        yield "the lowest rate that was tried is the best: a lower one may be better still"
    if as_good:
        yield f"cannot be told from it: {', '.join(f'{rate:g}' for rate in as_good)}"
