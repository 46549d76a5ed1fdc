"""Find a learning rate: short runs at a few rates from the same start, compared on held-out rows.

    plan, inputs -> find_learning_rate -> each ShortRun as it ends, ShortRunTable

The rate with the lowest held-out loss is the table's reference. A rate has collapsed when a loss or
gradient is not finite, or the model is worse than before training; higher rates are not tried. The
runs are no `tunesmith train` processes: each would load the model and prove masks and packing
again, which takes longer than its few steps. `test_data` is not read. Left out: what a longer run
would prefer, which is often a slightly lower rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import CheckResult
from tunesmith.core.types import Comparison, Plan, PlanConfig, PlanValue
from tunesmith.evaluate.items import EvalItems, build_eval_items
from tunesmith.evaluate.measure import measure_eval_loss
from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score
from tunesmith.evaluate.seed_noise import add_seed_noise
from tunesmith.evaluate.statistics import judge_comparison
from tunesmith.model.adapters import copy_weights, restore_weights
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import open_session
from tunesmith.train.loop import TrainingLoop

STEPS = 40
RATE_FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)  # times the planned rate
HELD_OUT_TOKENS = 16_000


@dataclass(frozen=True, eq=False)
class ShortRun:
    """Training at a rate; without a name, the untrained model. `problem` says how it collapsed."""

    name: str
    held_out: MetricValues | None  # None if the weights are unusable
    problem: str = ""

    @property
    def loss(self) -> float:
        return math.inf if self.held_out is None else compute_score(self.held_out).value


@dataclass(frozen=True)
class ShortRunRow:
    name: str
    loss: float | None
    low: float | None
    high: float | None
    comparison: Comparison | None  # before: the reference, after: this one
    problem: str

    @property
    def verdict(self) -> str:
        """Compare with the reference: no difference shown, or that seeds may explain it."""
        return "" if self.comparison is None else judge_comparison(self.comparison)


@dataclass(frozen=True)
class ShortRunTable:
    metric: str
    steps: int
    batch_size: int | None
    items: int  # held-out rows
    base_loss: float  # before any training
    reference: str | None  # the rate that the others are compared with
    rows: tuple[ShortRunRow, ...]
    notes: tuple[str, ...] = ()


def find_learning_rate(
    plan: Plan, inputs: RunInputs, *, steps: int = STEPS
) -> Iterator[ShortRun | ShortRunTable]:
    """Yield the untrained model, the rates from low to high until one collapses, and the table.

    Raises InputError without held-out rows, and for preference pairs.
    """
    if plan.config.stage == "preference":
        message = "the held-out loss does not measure preference accuracy"
        fix = "start from the planned rate, and compare two runs"
        raise InputError(message, where="stage", fix=fix)
    steps = min(steps, plan.steps)
    runs = ShortRuns(plan, inputs)
    untrained = runs.measure_start()
    yield untrained
    rates = [float(f"{min(1, plan.config.learning_rate * each):.2g}") for each in RATE_FACTORS]
    trials: list[ShortRun] = []
    for rate in dict.fromkeys(rates):
        config = dataclasses.replace(plan.config, learning_rate=rate)
        trial = runs.train(f"{rate:g}", config, steps)
        if not trial.problem and trial.loss > untrained.loss:
            problem = f"held-out loss {trial.loss:.3f} is worse than before training"
            trial = dataclasses.replace(trial, problem=problem)
        trials.append(trial)
        yield trial
        if trial.problem:
            break
    yield choose_rate(plan, untrained, trials, steps)


def select_held_out(plan: Plan, inputs: RunInputs) -> EvalItems:
    """Return the first held-out rows, without metrics, since no answers are generated.

    Raises InputError if there are none."""
    no_metrics = PlanValue((), "rule", "no answers are graded")
    items = build_eval_items(plan.with_settings(metrics=no_metrics), inputs)
    if not items.has_training_eval:
        message = "no held-out rows: test_data is reserved for the final result"
        raise InputError(message, where="eval_data", fix="set eval_data, or --eval-split 0.1")
    tokens = end = 0
    while end < len(items.eval_documents) and tokens < HELD_OUT_TOKENS:
        tokens += len(items.eval_documents[end])
        end += 1
    return dataclasses.replace(items, eval_documents=items.eval_documents[:end])


class ShortRuns:
    """A model, the weights that every run starts from, and the held-out rows."""

    def __init__(self, plan: Plan, inputs: RunInputs) -> None:
        self._items = select_held_out(plan, inputs)
        self._session = open_session(plan, inputs, with_samples=False)
        self._start = copy_weights(self._session.model.network)

    def measure_start(self) -> ShortRun:
        return ShortRun("", measure_eval_loss(self._session, self._items))

    def train(self, name: str, config: PlanConfig, steps: int) -> ShortRun:
        """Train from the start, and measure the held-out loss."""
        model = self._session.model
        restore_weights(model.network, self._start)
        training = TrainingLoop(
            model, self._session.load_documents, config, steps=steps, warmup_steps=steps // 10
        )
        problem = ""
        try:
            for event in training:
                if isinstance(event, CheckResult) and event.kind == "non-finite":
                    problem = f"non-finite loss or gradient at step {event.step}"
        except GateError:
            return ShortRun(name, None, "non-finite loss or gradient")
        held_out = measure_eval_loss(self._session, self._items)
        if not all(map(math.isfinite, held_out.values)):
            return ShortRun(name, None, problem or "non-finite held-out loss")
        return ShortRun(name, held_out, problem)


# ---------------------------------------------------------------- table


def choose_rate(
    plan: Plan, untrained: ShortRun, trials: Sequence[ShortRun], steps: int
) -> ShortRunTable:
    """Return the table, whose reference is the best rate that did not collapse."""
    assert untrained.held_out is not None
    base_score = compute_score(untrained.held_out)
    sound = [trial for trial in trials if not trial.problem]
    best = min(sound, key=lambda trial: trial.loss, default=None)
    return ShortRunTable(
        metric=untrained.held_out.metric,
        steps=steps,
        batch_size=plan.config.batch_size,
        items=base_score.n,
        base_loss=base_score.value,
        reference=best.name if best else None,
        rows=tuple(_build_row(trial, best) for trial in trials),
        notes=tuple(_iter_notes(plan, best, trials)),
    )


def _build_row(trial: ShortRun, best: ShortRun | None) -> ShortRunRow:
    row = ShortRunRow(trial.name, None, None, None, None, trial.problem)
    if trial.held_out is None:
        return row
    score = compute_score(trial.held_out)
    row = dataclasses.replace(row, loss=score.value, low=score.low, high=score.high)
    if row.problem or best is None or best.held_out is None or trial is best:
        return row
    comparison = compare_measurements(best.held_out, trial.held_out)
    return dataclasses.replace(row, comparison=add_seed_noise(comparison, None, (1, 1)))


def _iter_notes(plan: Plan, best: ShortRun | None, trials: Sequence[ShortRun]) -> Iterator[str]:
    if best is None:
        yield "every rate collapsed: start much lower, and inspect the rows"
        return
    if best is trials[-1]:
        yield "the highest rate tried is the best: a higher one may be better"
    elif best is trials[0]:
        yield "the lowest rate tried is the best: a lower one may be better"
    if trials[-1].problem:
        yield f"the model collapses at {trials[-1].name}; higher rates were not tried"
    yield f"learning_rate: {best.name} (the plan had {plan.config.learning_rate:g})"
