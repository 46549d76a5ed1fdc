"""A sweep: trials over the values of a recipe's `sweep`, one after the other or, with `gpus`,
several at once; read this first.

    inputs, folder -> SweepStart, (TrialStart, TrialScore ..., TrialEnd) ..., SweepRecord

Trials select on eval_data and never see test_data: the winner is measured on it once, at the end.
The folder holds Optuna's journal (trial_study.py) and the run folders of the trials
(trial_process.py), so that a sweep that was killed goes on when it is run again. Left out: the
folder's own files (sweep_folder.py), and what follows from the trials (summary.py).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

from tunesmith.advise.sweep import summary
from tunesmith.advise.sweep.records import (
    SweepEvent,
    SweepStart,
    TrialEnd,
    TrialRecord,
    TrialScore,
    TrialSpec,
    TrialStart,
)
from tunesmith.advise.sweep.sweep_folder import build_identity, check_identity, lock_folder
from tunesmith.advise.sweep.trial_process import Share, TrialProcess, make_trial_recipe
from tunesmith.advise.sweep.trial_study import TrialStudy
from tunesmith.core.errors import InputError, Interrupted, MachineError
from tunesmith.core.events import EVAL_TASK
from tunesmith.core.hardware import read_free_disk
from tunesmith.core.ranks import refuse_processes
from tunesmith.core.run_dir import EVAL_AFTER_FILE, read_run_record
from tunesmith.core.types import Plan
from tunesmith.evaluate.custom_metric import format_metric_name
from tunesmith.evaluate.results import compute_score
from tunesmith.plan.build import refuse_if_too_large
from tunesmith.recipe.fields import NO_DATA
from tunesmith.recipe.schema import Recipe
from tunesmith.recipe.sweep import SweepConfig
from tunesmith.session.inputs import RunInputs
from tunesmith.session.planner import make_plan
from tunesmith.train.run import check_run
from tunesmith.train.signals import GracefulStop

STAGE_METRICS = {"sft": "loss", "cpt": "bits_per_byte", "preference": "preference_accuracy"}
LOWER_IS_BETTER = ("loss", "bits_per_byte")
LENGTH_KEYS = ("max_steps", "num_train_epochs")  # a trial takes as long as they say
POLL_SECONDS = 0.2
RESUME_FIX = "continue with the same command"


def run_sweep(
    inputs: RunInputs,
    folder: Path,
    *,
    minutes: float = math.inf,
    gpus: int | None = None,
    allow_code: bool = False,
) -> Iterator[SweepEvent]:
    """Run the trials that fit in the minutes, select on eval_data, measure the winner on test_data.

    gpus: trials that run at once, each with a GPU of its own, or a share of the cores where there
    is no GPU. Raises InputError for a recipe without sweep, eval_data or test_data, for the folder
    of another sweep, and for minutes in which no trial ends; GateError if every trial fails.
    """
    deadline = time.monotonic() + 60 * minutes
    sweep = refuse_unusable(inputs, minutes)
    num_processes = gpus or 1
    refuse_processes(num_processes)
    trial_inputs = _build_trial_inputs(inputs, num_processes)
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
        yield SweepStart(
            str(folder),
            plan.model.name,
            metric,
            study.num_configurations,
            study.seeds,
            study.count_finished(),
        )
        eval_tasks = list_eval_tasks(trial_inputs)
        runner = _TrialRunner(
            folder, study, trial_inputs.recipe, plan, metric, eval_tasks, deadline, allow_code
        )
        yield from runner.run_trials(num_processes)
        yield summary.summarize(study, metric, eval_tasks, inputs, folder, allow_code=allow_code)


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


def _build_trial_inputs(inputs: RunInputs, num_processes: int) -> RunInputs:
    """Return the inputs without test_data and sweep, and a process's share of a CPU."""
    datasets = {role: rows for role, rows in inputs.datasets.items() if role != "test_data"}
    values = inputs.recipe.model_dump(mode="json", exclude_unset=True)
    values |= {"test_data": NO_DATA, "sweep": None}
    recipe = Recipe.model_validate(values)
    machine = inputs.machine
    if machine.device == "cpu":
        machine = dataclasses.replace(
            machine,
            cores=max(1, machine.cores // num_processes),
            available_bytes=machine.available_bytes // num_processes,
        )
    return dataclasses.replace(inputs, recipe=recipe, datasets=datasets, machine=machine)


def list_eval_tasks(inputs: RunInputs) -> tuple[str, ...]:
    """Return the tasks of scores that are of eval_data as a whole: of named tasks, the mean of
    those that are trained, or of all if none is."""
    names = list(inputs.datasets["eval_data"].tasks)
    if not names:
        return (EVAL_TASK,)
    trained = [name for name in names if name in inputs.datasets["data"].tasks]
    if trained:
        label = trained[0] if len(trained) == 1 else "mean of tasks"
    else:
        label = f"{names[0]} (held out)" if len(names) == 1 else "mean of held-out tasks"
    return (f"{EVAL_TASK}: {label}",)


# ---------------------------------------------------------------- trials


@dataclasses.dataclass(frozen=True)
class _TrialRunner:
    """Starts trials, judges their evaluations and writes the journal."""

    folder: Path
    study: TrialStudy
    recipe: Recipe
    plan: Plan  # of the recipe without its sweep
    metric: str
    eval_tasks: tuple[str, ...]
    deadline: float
    allow_code: bool

    def run_trials(self, num_processes: int) -> Iterator[SweepEvent]:
        """Run trials while one more fits in the remaining time. Raises Interrupted after a signal,
        once each trial has saved a checkpoint."""
        running: dict[int, TrialProcess] = {}
        with GracefulStop(RESUME_FIX) as stop:
            try:
                while True:
                    for index in range(num_processes):
                        if index not in running:
                            share = Share(index, num_processes)
                            yield from self._start_next(running, share)
                    if not running:
                        break
                    time.sleep(POLL_SECONDS)
                    stop.raise_if_requested()
                    self._refuse_few_minutes()
                    for index in list(running):
                        yield from self._check_trial(running, index)
            except (Interrupted, InputError, MachineError):
                for process in running.values():
                    process.request_stop()
                for process in running.values():
                    process.stop()
                raise
            finally:  # a caller may stop in the middle
                for process in running.values():
                    process.kill()

    def _start_next(self, running: dict[int, TrialProcess], share: Share) -> Iterator[SweepEvent]:
        """Start a trial, if there is one and time for it; of those that contradict the recipe,
        record why."""
        while True:
            numbers = [process.spec.number for process in running.values()]
            spec = self.study.choose_next(numbers)
            if spec is None or not self._has_time(spec):
                return
            self._refuse_full_disk()
            self.study.start(spec)
            yield TrialStart(spec, self.study.count_max_trials())
            path = str(self.folder / spec.name)
            try:
                recipe = make_trial_recipe(self.recipe, spec, test_data=NO_DATA, output_dir=path)
            except InputError as error:
                yield self._fail(spec, f"{error.where}: {error.message}")
                continue
            running[share.index] = TrialProcess(
                self.folder, spec, recipe, share=share, allow_code=self.allow_code
            )
            return

    def _check_trial(self, running: dict[int, TrialProcess], index: int) -> Iterator[SweepEvent]:
        """Judge the evaluations of a trial; end one that is hopeless, and record its end."""
        process = running[index]
        spec = process.spec
        has_ended = process.has_ended()  # before the events are read, so that none is missed
        for score in process.list_scores():
            if not self._is_judged(score.task, score.metric, score.value, score.step):
                continue
            percent = 100 * score.step // process.steps
            if percent in process.judged:
                continue
            process.judged.add(percent)
            yield TrialScore(spec, score)
            self.study.add_value(spec.number, percent, score.value)
            if score.step < process.steps and self.study.is_hopeless(spec.number):
                process.kill()
                del running[index]
                reason = f"{self.study.sweep.pruner} pruner, at {percent}% of the steps"
                self.study.finish(spec.number, "pruned", reason=reason)
                yield TrialEnd(self._read_trial(spec))
                return
        if has_ended:
            del running[index]
            yield self._record_end(process)

    def _is_judged(self, task: str, metric: str, value: float, step: int) -> bool:
        """Return whether a score is one of eval_data during training; one that is not finite is the
        guard's to judge."""
        is_selecting = metric == self.metric and task in self.eval_tasks
        return is_selecting and step > 0 and math.isfinite(value)

    def _record_end(self, process: TrialProcess) -> TrialEnd:
        spec = process.spec
        if process.was_interrupted():
            raise Interrupted(f"{spec.name} was stopped by a signal", fix=RESUME_FIX)
        if not process.is_complete:
            self._refuse_full_disk()
            return self._fail(spec, process.read_problem())
        file = process.path / EVAL_AFTER_FILE
        measured = summary.read_eval_values(file, self.metric, self.eval_tasks)
        if measured is None or not all(map(math.isfinite, measured.values)):
            return self._fail(spec, f"{self.metric} is not finite after training")
        record = read_run_record(process.path)
        reason = ""
        if record.selected_step is not None and record.selected_step < record.steps:
            reason = f"checkpoint of step {record.selected_step}"
        self.study.finish(spec.number, "complete", compute_score(measured).value, reason)
        return TrialEnd(self._read_trial(spec))

    def _fail(self, spec: TrialSpec, reason: str) -> TrialEnd:
        self.study.finish(spec.number, "failed", reason=reason)
        return TrialEnd(self._read_trial(spec))

    def _read_trial(self, spec: TrialSpec) -> TrialRecord:
        return summary.build_trial(self.folder, self.study.list_trials()[spec.number])

    def _refuse_full_disk(self) -> None:
        """Raise DiskError if the next trial does not fit: all that follow would fail."""
        machine = dataclasses.replace(
            self.plan.machine, disk_free_bytes=read_free_disk(self.folder)
        )
        try:
            refuse_if_too_large(dataclasses.replace(self.plan, machine=machine))
        except MachineError as error:
            error.fix = f"{error.fix}, then {RESUME_FIX}"
            raise

    # ------------------------------------------------------------ time

    def _list_speeds(self) -> list[float]:
        """Return the seconds of each trial that reached its end, per unit of its length."""
        trials = [t for t in self.study.list_trials() if t.state.name == "COMPLETE"]
        records = [summary.build_trial(self.folder, trial) for trial in trials]
        return [record.seconds / get_length(record) for record in records]

    def _has_time(self, spec: TrialSpec) -> bool:
        """Return whether a trial would end in the minutes if it were as slow as the slowest."""
        if math.isinf(self.deadline):
            return True
        remaining = self.deadline - time.monotonic()
        speeds = self._list_speeds()
        return not speeds or max(speeds) * get_length(spec) <= remaining

    def _refuse_few_minutes(self) -> None:
        """Raise InputError if no trial has ended when the minutes are up."""
        if time.monotonic() > self.deadline and not self._list_speeds():
            fix = f"allow more, or fewer steps; {RESUME_FIX}"
            raise InputError("too few for one trial", where="--minutes", fix=fix)


def get_length(trial: TrialSpec | TrialRecord) -> float:
    """Return the steps or epochs of a trial if they are swept, else 1."""
    return next((float(trial.settings[key]) for key in LENGTH_KEYS if key in trial.settings), 1.0)
