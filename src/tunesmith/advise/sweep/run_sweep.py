"""A sweep: trials over the values of a recipe's `sweep`, one after the other or, with `gpus`, one
per GPU at a time; read this first.

    inputs, folder -> SweepStart, (TrialStart, the events of the run, TrialEnd) ..., SweepRecord

Trials select on eval_data and never see test_data: the winner is measured on it once, at the end.
A sweep that was killed goes on where it stopped, when it is run again: its folder (sweep_folder.py)
holds the journal of the trials (trial_study.py) and their run folders. Left out: trials until the
minutes are up (run_trials.py), one trial (run_trial.py), processes for several (trial_worker.py),
what follows from them (summary.py).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.advise.sweep import summary
from tunesmith.advise.sweep.run_trial import TrialRecorder, TrialRunner, list_eval_tasks
from tunesmith.advise.sweep.run_trials import Trials
from tunesmith.advise.sweep.sweep_folder import (
    build_identity,
    check_identity,
    lock_folder,
    restore_day,
)
from tunesmith.advise.sweep.trial_study import TrialStudy
from tunesmith.advise.sweep.trial_worker import WorkerSettings, open_workers, share_machine
from tunesmith.advise.sweep.winner import measure_winner, write_winner
from tunesmith.core.atomic import write_file
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.ranks import refuse_processes
from tunesmith.core.sealed_json import seal_json
from tunesmith.core.sweep_record import (
    SWEEP_FILE,
    SWEEP_FORMAT,
    SweepEvent,
    SweepRecord,
    SweepStart,
    TrialSpec,
)
from tunesmith.core.types import Plan, __version__
from tunesmith.evaluate.custom_metric import format_metric_name
from tunesmith.recipe.fields import NO_TEST_DATA
from tunesmith.recipe.schema import Recipe
from tunesmith.recipe.sweep import SweepConfig
from tunesmith.session.inputs import RunInputs, make_plan
from tunesmith.train.run import check_run

STAGE_METRICS = {"sft": "loss", "cpt": "bits_per_byte", "preference": "preference_accuracy"}
LOWER_IS_BETTER = ("loss", "bits_per_byte")


def run_sweep(
    inputs: RunInputs,
    folder: Path,
    *,
    minutes: float = math.inf,
    gpus: int | None = None,
    allow_code: bool = False,
) -> Iterator[SweepEvent]:
    """Run the trials that fit in the minutes, select on eval_data, measure the winner on test_data.

    gpus: trials that run at once, each in a process with a GPU of its own, or a share of the cores
    where there is no GPU; their events are TrialEvents. None runs one at a time in this process.
    Raises InputError for a recipe without sweep, eval_data or test_data, for the folder of another
    sweep, and for minutes in which not even the first trial ends; GateError if every trial fails.
    """
    deadline = time.monotonic() + 60 * minutes
    sweep = refuse_unusable(inputs, minutes)
    inputs = restore_day(inputs, folder)
    test_rows = inputs.datasets["test_data"]
    trial_inputs = _build_trial_inputs(inputs)
    if gpus is not None:
        refuse_processes(gpus)
        trial_inputs = share_machine(trial_inputs, gpus)
    plan = make_plan(trial_inputs)
    check_run(plan, trial_inputs, allow_code=allow_code)  # refuses what every trial would
    metric = choose_metric(sweep, plan)
    with lock_folder(folder):
        check_identity(folder, build_identity(plan, inputs, metric))
        study = TrialStudy.open(
            folder,
            sweep,
            sweep.list_seeds(inputs.recipe.seed),
            higher_is_better=metric not in LOWER_IS_BETTER,
            sampler_seed=inputs.recipe.seed,
        )
        recorder = TrialRecorder(folder, study, metric, list_eval_tasks(trial_inputs))
        yield SweepStart(
            str(folder),
            plan.model.name,
            metric,
            study.num_configurations,
            study.seeds,
            study.count_finished(),
        )
        if gpus is None:
            runner = TrialRunner(trial_inputs, folder, allow_code)
            yield from Trials(recorder, deadline, [runner]).run_all()
        else:
            settings = WorkerSettings.from_inputs(
                trial_inputs, folder, allow_code=allow_code, num_workers=gpus
            )
            with open_workers(settings) as workers:
                yield from Trials(recorder, deadline, workers).run_at_once(workers)
        yield _summarize(inputs, recorder, plan, test_rows, allow_code=allow_code)


def refuse_unusable(inputs: RunInputs, minutes: float) -> SweepConfig:
    """Return the sweep of a recipe that has what a sweep needs."""
    recipe = inputs.recipe
    if recipe.sweep is None:
        fix = "list values: sweep: {learning_rate: [1e-4, 3e-4, 1e-3], seeds: 2}"
        raise InputError("the recipe has no sweep", where="sweep", fix=fix)
    if not recipe.eval_data:
        message = "trials are compared on eval_data, which is not set"
        if recipe.eval_split is not None:
            message = "eval_split holds out other rows with each seed, so trials do not compare"
        fix = "name files; `tunesmith data split` writes train, eval and test"
        raise InputError(message, where="eval_data", fix=fix)
    if not recipe.test_data or recipe.has_no_test:
        message = "the winner is measured on test_data, which is not set"
        fix = "name a file that no trial reads; `tunesmith data split` writes one"
        raise InputError(message, where="test_data", fix=fix)
    if not minutes > 0:
        raise InputError("must be a positive number", where="--minutes", fix="--minutes 60")
    return recipe.sweep


def choose_metric(sweep: SweepConfig, plan: Plan) -> str:
    """Return the metric that selects. Raises InputError for one that no evaluation measures."""
    default = STAGE_METRICS[plan.config.stage]
    measured = (default, *map(format_metric_name, plan.config.metrics))
    if sweep.metric == "auto":
        return default
    if sweep.metric not in measured:
        message = f"sweep: metric: {sweep.metric!r:.60} is not measured on eval_data"
        raise InputError(message, where="sweep", fix=f"use {', '.join(measured)}")
    return sweep.metric


def _build_trial_inputs(inputs: RunInputs) -> RunInputs:
    """Return the inputs without test_data and sweep."""
    datasets = {role: rows for role, rows in inputs.datasets.items() if role != "test_data"}
    values = inputs.recipe.model_dump(mode="json", exclude_unset=True)
    values |= {"test_data": NO_TEST_DATA, "sweep": None}
    recipe = Recipe.model_validate(values)
    return dataclasses.replace(inputs, recipe=recipe, datasets=datasets)


# ---------------------------------------------------------------- result


def _summarize(
    inputs: RunInputs, recorder: TrialRecorder, plan: Plan, test_rows: Any, *, allow_code: bool
) -> SweepRecord:
    """Select the winner, measure it on test_data, and write sweep.json and winner.yaml."""
    folder = recorder.folder
    study = recorder.study
    sweep = study.sweep
    metric = recorder.metric
    trials = tuple(summary.build_trial(folder, trial) for trial in study.list_trials())
    measured = summary.MeasuredTrials.read(folder, trials, metric, recorder.eval_tasks)
    configurations, winner = summary.build_configurations(measured)
    if winner is None and trials and all(trial.state == "failed" for trial in trials):
        raise GateError(f"every trial failed; the first: {trials[0].reason}", where=str(folder))
    record = SweepRecord(
        version=__version__,
        format=SWEEP_FORMAT,
        model=plan.model.name,
        metric=metric,
        higher_is_better=metric not in LOWER_IS_BETTER,
        search=sweep.search,
        pruner=sweep.pruner,
        seeds=study.seeds,
        planned_configurations=study.num_configurations,
        rows=len(next(iter(measured.values.values())).ids) if measured.values else 0,
        base_value=summary.read_base_value(folder, metric, recorder.eval_tasks),
        trials=trials,
        configurations=tuple(configurations),
        effects=(),
        winner=winner,
        winner_trial=None,
        test=(),
        test_reads=0,
        caveats=(),
        folder=str(folder),
    )
    if winner is not None:
        number = summary.choose_trial(measured, winner)
        test, test_reads = measure_winner(folder, number, test_rows, allow_code=allow_code)
        trial = trials[number]
        spec = TrialSpec(number, winner, trial.seed, trial.settings)
        write_winner(folder, inputs.recipe, spec)
        record = dataclasses.replace(
            record,
            effects=tuple(summary.list_effects(sweep, measured, winner)),
            winner_trial=number,
            test=test,
            test_reads=test_reads,
        )
    caveats = (*summary.list_caveats(record, sweep), *summary.list_forgetting(record))
    record = dataclasses.replace(record, caveats=caveats)
    write_file(folder / SWEEP_FILE, seal_json(record))
    return record
