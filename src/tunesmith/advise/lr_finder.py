"""Find a learning rate: short runs at a few rates from the same start, compared on held-out rows.

    plan, inputs -> find_learning_rate -> each ShortRun as it ends, ShortRunTable

The rate with the lowest held-out loss is the table's reference. A rate has collapsed when a loss or
gradient is not finite, or the model is worse than before training; higher rates are not tried. Left
out: what a longer run would prefer, which is often a slightly lower rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from tunesmith.advise.short_runs import ShortRun, ShortRuns, ShortRunTable, build_table
from tunesmith.core.errors import InputError
from tunesmith.core.types import Plan
from tunesmith.session.inputs import RunInputs

STEPS = 40
RATE_FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)  # times the planned rate


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
        trial = runs.train(f"{rate:g}", config, runs.session.load_documents, steps)
        if not trial.problem and trial.loss > untrained.loss:
            problem = f"held-out loss {trial.loss:.3f} is worse than before training"
            trial = dataclasses.replace(trial, problem=problem)
        trials.append(trial)
        yield trial
        if trial.problem:
            break
    yield choose_rate(plan, untrained, trials, steps)


def choose_rate(
    plan: Plan, untrained: ShortRun, trials: Sequence[ShortRun], steps: int
) -> ShortRunTable:
    """Return the table, whose reference is the best rate that did not collapse."""
    sound = [trial for trial in trials if not trial.problem]
    best = min(sound, key=lambda trial: trial.loss, default=None)
    reference = best.name if best else None
    notes = list(_iter_notes(plan, best, trials))
    return build_table(plan, untrained, trials, reference, steps, notes)


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
