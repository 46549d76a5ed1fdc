"""One trial of a sweep: an ordinary run in a folder of its own, which may stop early.

    events = TrialRunner(...).start_trial(spec)    trains, or goes on where a killed process stopped
    TrialRecorder(...).record(spec, events)        judges each evaluation, and writes the journal

A trial is planned and trained as any run, with `test_data: none`, and measured on eval_data. It
shares the rows of the sweep, and of earlier trials the measures before training and, if only the
schedule differs, the checks of preflight. A trial that fails is recorded with its reason; a disk
that fails ends the sweep. Left out: which trial is next (trial_study.py), and trials in processes
of their own (trial_worker.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tunesmith.advise.sweep.trial_study import TrialStudy
from tunesmith.core.errors import GateError, InputError, MachineError, SharedMachineError
from tunesmith.core.events import EVAL_TASK, CheckResult, Event, Score
from tunesmith.core.hardware import read_free_disk
from tunesmith.core.json_io import parse_as
from tunesmith.core.run_dir import (
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    PREFLIGHT_FILE,
    RECORD_FILE,
    is_run,
    read_events,
    read_failure,
    read_run_plan,
    read_run_record,
)
from tunesmith.core.sealed_json import read_sealed_as, read_sealed_json
from tunesmith.core.sweep_record import TrialSpec, name_trial
from tunesmith.core.types import Json, Plan, PlanConfig
from tunesmith.evaluate.results import EvalResults, MetricValues, compute_score
from tunesmith.recipe.fields import NO_TEST_DATA
from tunesmith.recipe.load import read_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session.inputs import RunInputs, make_plan
from tunesmith.train import run

# Settings that the measures before training depend on, of those that a trial may change.
BASE_SETTINGS = ("dtype", "attention", "pack_length", "share_prefixes", "metrics")
# Settings that no check before the first step depends on.
STEP_SETTINGS = frozenset(
    {
        *("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm"),
        *("num_train_epochs", "eval_steps", "save_steps", "probe_steps", "output_dir"),
        "memory_factor",
    }
)
# What computes, so that a sweep that goes on elsewhere is checked there.
MACHINE_FACTS = ("device", "device_name", "has_bf16_matmul", "compiler", "versions")


@dataclasses.dataclass(frozen=True)
class TrialRunner:
    """Runs trials in this process. `inputs` are those of the sweep, without test_data."""

    inputs: RunInputs
    folder: Path
    allow_code: bool = False

    def start_trial(self, spec: TrialSpec) -> Generator[Event]:
        """Yield the events to come, of a new run or of one to resume. Raises the run's errors, and
        Interrupted after a signal."""
        path = find_trial_folder(self.folder, spec.number)
        if is_run(path):
            if failure := read_failure(path):
                raise GateError(failure)
            yield from run.resume(path, allow_code=self.allow_code)
            return
        plan, trial_inputs = self._plan_trial(spec, path)
        yield from run.train(
            plan,
            trial_inputs,
            allow_code=self.allow_code,
            before=self._find_base_results(plan, spec.number),
            preflight=self._find_preflight(plan, spec.number),
        )

    def _plan_trial(self, spec: TrialSpec, path: Path) -> tuple[Plan, RunInputs]:
        """Plan a trial as the run that it is. Raises InputError for settings that contradict."""
        recipe = make_trial_recipe(
            self.inputs.recipe, spec, test_data=NO_TEST_DATA, output_dir=str(path)
        )
        machine = dataclasses.replace(
            self.inputs.machine, disk_free_bytes=read_free_disk(self.folder)
        )
        trial_inputs = dataclasses.replace(
            self.inputs, recipe=recipe, output_dir=path, machine=machine
        )
        return make_plan(trial_inputs), trial_inputs

    def _find_base_results(self, plan: Plan, number: int) -> EvalResults | None:
        """Return the measures before training of the first trial with the same base."""
        for earlier in range(number):
            path = find_trial_folder(self.folder, earlier)
            file = path / EVAL_BEFORE_FILE
            if file.exists() and is_run(path) and has_same_base(read_run_plan(path), plan):
                return read_sealed_as(EvalResults, file)
        return None

    def _find_preflight(self, plan: Plan, number: int) -> tuple[CheckResult, ...]:
        """Return the checks of the first trial that passed them and whose model, rows and adapter
        at the start are the same, after a word on where they are from; nothing if there is none."""
        for earlier in range(number):
            path = find_trial_folder(self.folder, earlier)
            file = path / PREFLIGHT_FILE
            if file.exists() and has_same_start(read_run_plan(path), plan):
                stored = read_sealed_json(file).get("checks")
                checks = parse_as(tuple[CheckResult, ...], stored, where=str(file))
                evidence = f"{len(checks)} checks are those of {path.name}, which starts the same"
                return (CheckResult("preflight", "ok", evidence, num_checked=len(checks)), *checks)
        return ()


@dataclasses.dataclass(frozen=True)
class TrialRecorder:
    """Writes trials into the journal. `eval_tasks` are those of scores that are of eval_data as a
    whole."""

    folder: Path
    study: TrialStudy
    metric: str
    eval_tasks: tuple[str, ...]

    def record(self, spec: TrialSpec, events: Generator[Event | None]) -> Generator[Event | None]:
        """Yield the events of a trial, which stops early if it is hopeless, and record its end. A
        failure is recorded with its reason. Interrupted is raised, and so is SharedMachineError: it
        is no fault of the settings, and the trial can go on when it is mended."""
        try:
            with closing(events):
                yield from self._judge_events(spec, events)
        except SharedMachineError:
            raise
        except (InputError, GateError, MachineError) as error:
            where = f"{error.where}: " if error.where else ""
            self.study.finish(spec.number, "failed", reason=f"{where}{error.message}")

    def read_planned_steps(self, spec: TrialSpec) -> int:
        """Return the steps of a trial that has begun, 0 before its plan is written."""
        path = find_trial_folder(self.folder, spec.number)
        return read_run_plan(path).steps if is_run(path) else 0

    def _judge_events(
        self, spec: TrialSpec, events: Generator[Event | None]
    ) -> Generator[Event | None]:
        path = find_trial_folder(self.folder, spec.number)
        if not (path / RECORD_FILE).exists():
            for event in read_events(path) if is_run(path) else ():
                if self._is_stopped_by(spec, event):
                    return
            for event in events:
                yield event
                if event is not None and self._is_stopped_by(spec, event):
                    return
        measured = read_eval_values(path / EVAL_AFTER_FILE, self.metric, self.eval_tasks)
        if measured is None or not all(map(math.isfinite, measured.values)):
            raise GateError(f"{self.metric} is not finite after training")
        record = read_run_record(path)
        reason = ""
        if record.selected_step is not None and record.selected_step < record.steps:
            reason = f"checkpoint of step {record.selected_step}"
        self.study.finish(spec.number, "complete", compute_score(measured).value, reason)

    def _is_stopped_by(self, spec: TrialSpec, event: Event) -> bool:
        """Record an evaluation, and stop the trial if it is hopeless."""
        if not isinstance(event, Score) or event.task not in self.eval_tasks or event.step == 0:
            return False
        if event.metric != self.metric or not math.isfinite(event.value):
            return False  # the guard's to judge
        steps = self.read_planned_steps(spec)
        percent = 100 * event.step // steps
        self.study.add_value(spec.number, percent, event.value)
        if event.step == steps or not self.study.is_hopeless(spec.number):
            return False
        reason = f"{self.study.sweep.pruner} pruner, at {percent}% of the steps"
        self.study.finish(spec.number, "pruned", reason=reason)
        return True


def has_same_start(first: Plan, second: Plan) -> bool:
    """Return whether two plans on the same files compute the same at the first step: packs,
    weights, adapter, and what computes."""
    settings = {field.name for field in dataclasses.fields(PlanConfig)} - STEP_SETTINGS
    is_same = all(getattr(first.config, key) == getattr(second.config, key) for key in settings)
    return is_same and all(
        getattr(first.machine, fact) == getattr(second.machine, fact) for fact in MACHINE_FACTS
    )


def has_same_base(first: Plan, second: Plan) -> bool:
    """Return whether two plans on the same model and items measure the same before training."""
    is_quantized = {plan.config.method == "qlora" for plan in (first, second)}
    return len(is_quantized) == 1 and all(
        getattr(first.config, key) == getattr(second.config, key) for key in BASE_SETTINGS
    )


def make_trial_recipe(recipe: Recipe, spec: TrialSpec, **changes: Any) -> Recipe:
    """Return the recipe of a trial, without its sweep. Raises InputError for a contradiction."""
    values: Json = recipe.model_dump(mode="json", exclude_unset=True)
    values.pop("sweep", None)
    trial_recipe = read_recipe(values, **spec.settings, seed=spec.seed, **changes)
    assert isinstance(trial_recipe, Recipe), "stages are refused before"
    return trial_recipe


def find_trial_folder(folder: Path, number: int) -> Path:
    return folder / name_trial(number)


def list_eval_tasks(inputs: RunInputs) -> tuple[str, ...]:
    """Return the tasks of scores that are of eval_data as a whole: of named tasks, the mean of
    those that are trained, or of all if none is."""
    names = list(inputs.datasets["eval_data"].tasks)
    if not names:
        return (EVAL_TASK,)
    trained = [name for name in names if name in inputs.datasets["data"].tasks]
    if len(trained) > 1:
        return (f"{EVAL_TASK}: mean of tasks",)
    if len(trained) == 1:
        return (f"{EVAL_TASK}: {trained[0]}",)
    if len(names) > 1:
        return (f"{EVAL_TASK}: mean of held-out tasks",)
    return (f"{EVAL_TASK}: {names[0]} (held out)",)


def read_eval_values(file: Path, metric: str, tasks: Sequence[str]) -> MetricValues | None:
    """Return the values of a metric on eval_data, item by item, from a file of results."""
    results = read_sealed_as(EvalResults, file)
    for measurement in results.measurements:
        if measurement.metric == metric and measurement.task in tasks:
            return measurement
    return None
