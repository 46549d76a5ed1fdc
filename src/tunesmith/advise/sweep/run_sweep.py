"""A sweep: trials over the values of a recipe's `sweep`, one after the other or, with `gpus`, one
per GPU at a time; read this first.

    inputs, folder -> SweepStart, (TrialStart, the events of the run, TrialEnd) ..., SweepRecord

Trials select on eval_data and never see test_data: the winner is measured on it once, at the end.
A sweep that was killed goes on where it stopped, when it is run again: its folder holds the journal
of the trials (trial_study.py) and their run folders. Left out: one trial (run_trial.py), processes
for several (trial_worker.py), what follows from them (summary.py).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tunesmith.advise.sweep import summary
from tunesmith.advise.sweep.run_trial import TrialRecorder, TrialRunner, list_eval_tasks
from tunesmith.advise.sweep.trial_study import TrialStudy
from tunesmith.advise.sweep.trial_worker import (
    TrialWorker,
    WorkerSettings,
    open_workers,
    share_machine,
    stop_trials,
    wait_for_news,
)
from tunesmith.advise.sweep.winner import measure_winner, write_winner
from tunesmith.core.atomic import make_dirs, refuse_links, write_file
from tunesmith.core.errors import GateError, InputError, Interrupted
from tunesmith.core.events import TrainStep
from tunesmith.core.json_io import dump_json, read_json
from tunesmith.core.ranks import refuse_processes
from tunesmith.core.sealed_json import seal_json
from tunesmith.core.sweep_record import (
    SWEEP_FILE,
    SWEEP_FORMAT,
    SweepEvent,
    SweepRecord,
    SweepStart,
    TrialEnd,
    TrialEvent,
    TrialSpec,
    TrialStart,
    refuse_other_sweep_format,
)
from tunesmith.core.types import Json, Plan, __version__
from tunesmith.evaluate.custom_metric import format_metric_name
from tunesmith.recipe.fields import NO_TEST_DATA
from tunesmith.recipe.schema import Recipe
from tunesmith.recipe.sweep import SweepConfig
from tunesmith.session.inputs import RunInputs, make_plan
from tunesmith.session.provenance import hash_weight_files
from tunesmith.train.run import check_run
from tunesmith.train.signals import GracefulStop

IDENTITY_FILE = "settings.json"  # what the trials depend on, written before the first
LOCK_FILE = ".lock"
STAGE_METRICS = {"sft": "loss", "cpt": "bits_per_byte", "preference": "preference_accuracy"}
LOWER_IS_BETTER = ("loss", "bits_per_byte")
JUDGED_STEPS = 5  # of the first trial, before its time is predicted
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

    gpus: trials that run at once, each in a process with a GPU of its own, or a share of the cores
    where there is no GPU; their events are TrialEvents. None runs one at a time in this process.
    Raises InputError for a recipe without sweep, eval_data or test_data, for the folder of another
    sweep, and for minutes in which not even the first trial ends; GateError if every trial fails.
    """
    deadline = time.monotonic() + 60 * minutes
    sweep = refuse_unusable(inputs, minutes)
    test_rows = inputs.datasets["test_data"]
    trial_inputs = _build_trial_inputs(inputs)
    if gpus is not None:
        refuse_processes(gpus)
        trial_inputs = share_machine(trial_inputs, gpus)
    plan = make_plan(trial_inputs)
    check_run(plan, trial_inputs, allow_code=allow_code)  # refuses what every trial would
    metric = choose_metric(sweep, plan)
    with _locked(folder):
        _check_identity(folder, build_identity(inputs, metric))
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
            yield from _Trials(recorder, deadline, [runner]).run_all()
        else:
            settings = WorkerSettings.from_inputs(
                trial_inputs, folder, allow_code=allow_code, num_workers=gpus
            )
            with open_workers(settings) as workers:
                yield from _Trials(recorder, deadline, workers).run_at_once(workers)
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


# ---------------------------------------------------------------- the folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and lock it. Raises InputError if another process sweeps in it."""
    if folder.exists() and not folder.is_dir():
        raise InputError("not a folder", where=str(folder), fix="choose another output_dir")
    make_dirs(folder)
    refuse_links(folder)
    lock = FileLock(folder / LOCK_FILE, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = "another process runs this sweep"
        raise InputError(message, where=str(folder), fix="wait for it, or stop it") from None
    with lock:
        yield


def build_identity(inputs: RunInputs, metric: str) -> Json:
    """Return everything that trials and their comparison depend on. More trials of a search are
    the same sweep, and so is another folder."""
    recipe = inputs.recipe.model_dump(mode="json", exclude_unset=True)
    recipe.pop("output_dir", None)
    recipe["sweep"].pop("trials", None)
    rows = {role: data.fingerprint for role, data in inputs.datasets.items()}
    return {
        "format": SWEEP_FORMAT,
        "recipe": recipe,
        "metric": metric,
        "rows": rows,
        "model": hash_weight_files(inputs.model.path),
        "renderer": inputs.renderer.fingerprint,
        "day": inputs.now.date().isoformat() if inputs.renderer.has_date else "",
    }


def _check_identity(folder: Path, identity: Json) -> None:
    """Raise InputError if the folder holds a sweep of another recipe, or of another version."""
    file = folder / IDENTITY_FILE
    if not file.exists():
        if names := sorted(path.name for path in folder.iterdir() if path.name != LOCK_FILE):
            message = f"the folder is not empty and is not a sweep: {', '.join(names[:3])}"
            raise InputError(message, where=str(folder), fix="choose another output_dir")
        write_file(file, dump_json(identity))
        return
    stored: Json = read_json(file)
    refuse_other_sweep_format(stored, file)
    parts = [key for key in identity if key not in ("format", "recipe")]
    changed = [key for key in parts if stored.get(key) != identity[key]]
    keys = {**stored["recipe"], **identity["recipe"]}
    changed += [key for key in keys if stored["recipe"].get(key) != identity["recipe"].get(key)]
    if changed:
        message = f"holds a sweep with other settings: {', '.join(dict.fromkeys(changed))}"
        fix = "choose another output_dir, or go back to its settings"
        raise InputError(message, where=str(folder), fix=fix)


# ---------------------------------------------------------------- trials


@dataclasses.dataclass(frozen=True, eq=False)
class _RunningTrial:
    number: int
    runner: TrialRunner | TrialWorker
    events: Generator[SweepEvent | None]


class _Trials:
    """The trials of a sweep, until a deadline. Each runner runs one at a time."""

    def __init__(
        self,
        recorder: TrialRecorder,
        deadline: float,
        runners: Sequence[TrialRunner | TrialWorker],
    ) -> None:
        self.recorder = recorder
        self.study = recorder.study
        self.deadline = deadline
        self.minutes = (deadline - time.monotonic()) / 60
        self.runners = runners
        self.running: list[_RunningTrial] = []

    def run_all(self) -> Iterator[SweepEvent]:
        """Run trials in this process while one more fits in the remaining time."""
        while self._start_trials():
            with closing(self.running[0].events):  # a caller may stop in the middle
                yield from self._read_news()

    def run_at_once(self, workers: Sequence[TrialWorker]) -> Iterator[SweepEvent]:
        """Run trials in the workers while one more fits in the remaining time. Raises Interrupted
        after a signal, once each trial has saved a checkpoint."""
        with GracefulStop(RESUME_FIX) as stop:
            try:
                while num_started := self._start_trials():
                    yield from self._read_news()
                    while len(self.running) == num_started:
                        wait_for_news([each for each in workers if each.is_busy], stop)
                        stop.raise_if_requested()
                        yield from self._read_news()
                stop.raise_if_requested()
            except Interrupted:
                stop_trials(workers)
                raise

    def _start_trials(self) -> int:
        """Give each idle runner a trial; return how many trials run."""
        busy = [trial.runner for trial in self.running]
        for runner in [runner for runner in self.runners if runner not in busy]:
            if isinstance(runner, TrialWorker):
                runner.restart_if_ended()
            numbers = [trial.number for trial in self.running]
            spec = self.study.start_next(numbers) if self._has_time() else None
            if spec is not None:
                events = self._run_trial(spec, runner)
                self.running.append(_RunningTrial(spec.number, runner, events))
        return len(self.running)

    def _read_news(self) -> Iterator[SweepEvent]:
        """Yield the events that are there; forget the trials that have ended."""
        for trial in list(self.running):
            for event in trial.events:
                if event is None:
                    break
                yield event
            else:
                self.running.remove(trial)

    def _has_time(self) -> bool:
        if math.isinf(self.deadline):
            return True
        seconds = self._list_seconds()
        remaining = self.deadline - time.monotonic()
        return not seconds or max(seconds) <= remaining

    def _run_trial(
        self, spec: TrialSpec, runner: TrialRunner | TrialWorker
    ) -> Generator[SweepEvent | None]:
        is_first = not self._list_seconds()
        start = time.monotonic()
        yield TrialStart(spec, self._count_max_trials())
        step_seconds: list[float] = []
        try:
            with closing(self.recorder.record(spec, runner.start_trial(spec))) as events:
                for event in events:
                    if event is None or isinstance(runner, TrialRunner):
                        yield event
                    else:
                        yield TrialEvent(spec.number, event)
                    if isinstance(event, TrainStep):
                        step_seconds.append(event.seconds)
                    if is_first:
                        self._refuse_small_budget(spec, start, step_seconds)
        except Interrupted as error:
            error.fix = RESUME_FIX
            raise
        trial = self.study.list_trials()[spec.number]
        record = summary.build_trial(self.recorder.folder, trial)
        remaining = self._count_max_trials() - self.study.count_finished()
        seconds = self._list_seconds() or [time.monotonic() - start]
        mean = sum(seconds) / len(seconds)
        yield TrialEnd(record, remaining, remaining * mean / len(self.runners))

    def _refuse_small_budget(
        self, spec: TrialSpec, start: float, step_seconds: list[float]
    ) -> None:
        """Raise InputError if the first trial does not end in the minutes. Of several that run at
        once, the first to end counts."""
        if math.isinf(self.minutes) or any(
            trial.state.name == "COMPLETE" for trial in self.study.list_trials()
        ):
            return
        now = time.monotonic()
        steps = self.recorder.read_planned_steps(spec)
        mean = sum(step_seconds) / max(1, len(step_seconds))
        expected_seconds = now - start + mean * (steps - len(step_seconds))
        is_judged = len(step_seconds) >= JUDGED_STEPS and len(self.runners) == 1
        if now > self.deadline or (is_judged and start + expected_seconds > self.deadline):
            raise InputError(
                f"too few for one trial, which takes about {expected_seconds / 60:.1f} minutes",
                where="--minutes",
                fix=f"allow at least {math.ceil(1.2 * expected_seconds / 60)}; {RESUME_FIX}",
            )

    def _list_seconds(self) -> list[float]:
        """Return the seconds of each trial that reached its end, of earlier processes too."""
        seconds: list[float] = []
        for trial in self.study.list_trials():
            if trial.state.name == "COMPLETE":
                seconds.append(summary.build_trial(self.recorder.folder, trial).seconds)
        return seconds

    def _count_max_trials(self) -> int:
        """Return the trials there will be if none that is to come fails or stops early."""
        trials = self.study.list_trials()
        first_seed = self.study.seeds[0]
        ended = [
            trial
            for trial in trials
            if trial.state.name in ("PRUNED", "FAIL") and trial.user_attrs["seed"] == first_seed
        ]
        configurations = self.study.num_configurations
        return configurations + (configurations - len(ended)) * (len(self.study.seeds) - 1)


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
