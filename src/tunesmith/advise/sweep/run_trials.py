"""The trials of a sweep until the minutes are up, one after the other or several at once.

    yield from Trials(recorder, deadline, [runner]).run_all()
    yield from Trials(recorder, deadline, workers).run_at_once(workers)

No trial starts that would end after the deadline, judged by those that have ended. Left out: which
is next (trial_study.py), and running one (run_trial.py, trial_worker.py).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

from tunesmith.advise.sweep import summary
from tunesmith.advise.sweep.run_trial import TrialRecorder, TrialRunner
from tunesmith.advise.sweep.trial_worker import TrialWorker, stop_trials, wait_for_news
from tunesmith.core.errors import InputError, Interrupted, SharedMachineError
from tunesmith.core.events import TrainStep
from tunesmith.core.sweep_record import (
    SweepEvent,
    TrialEnd,
    TrialEvent,
    TrialRecord,
    TrialSpec,
    TrialStart,
)
from tunesmith.train.signals import GracefulStop

LENGTH_KEYS = ("max_steps", "num_train_epochs")  # a trial takes as long as they say
JUDGED_STEPS = 5  # of the first trial, before its time is predicted
RESUME_FIX = "continue with the same command"


@dataclasses.dataclass(frozen=True, eq=False)
class _RunningTrial:
    number: int
    runner: TrialRunner | TrialWorker
    events: Generator[SweepEvent | None]


class Trials:
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
            except (Interrupted, SharedMachineError):
                stop_trials(workers)
                raise

    def _start_trials(self) -> int:
        """Give each idle runner a trial; return how many trials run."""
        busy = [trial.runner for trial in self.running]
        for runner in [runner for runner in self.runners if runner not in busy]:
            if isinstance(runner, TrialWorker):
                runner.restart_if_ended()
            numbers = [trial.number for trial in self.running]
            spec = self.study.choose_next(numbers)
            if spec is not None and self._has_time(spec):
                self.study.start(spec)
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

    def _has_time(self, spec: TrialSpec) -> bool:
        """Return whether a trial would end in the minutes if it were as slow as the slowest. The
        first may start: it is judged by its steps."""
        if math.isinf(self.deadline):
            return True
        speeds = self._list_speeds()
        remaining = self.deadline - time.monotonic()
        return not speeds or max(speeds) * get_length(spec) <= remaining

    def _run_trial(
        self, spec: TrialSpec, runner: TrialRunner | TrialWorker
    ) -> Generator[SweepEvent | None]:
        is_first = not self._list_speeds()
        start = time.monotonic()
        yield TrialStart(spec, self._count_max_trials())
        step_seconds: list[float] = []
        last_step = 0
        try:
            with closing(self.recorder.record(spec, runner.start_trial(spec))) as events:
                for event in events:
                    if event is None or isinstance(runner, TrialRunner):
                        yield event
                    else:
                        yield TrialEvent(spec.number, event)
                    if isinstance(event, TrainStep):
                        step_seconds.append(event.seconds)
                        last_step = event.step
                    if is_first:
                        self._refuse_small_budget(spec, start, step_seconds, last_step)
        except Interrupted as error:
            error.fix = RESUME_FIX
            raise
        except SharedMachineError as error:
            error.fix = f"{error.fix.partition(', then ')[0]}, then {RESUME_FIX}"
            raise
        trial = self.study.list_trials()[spec.number]
        record = summary.build_trial(self.recorder.folder, trial)
        yield TrialEnd(record, *self._predict_rest(record))

    def _predict_rest(self, last: TrialRecord) -> tuple[int, float | None]:
        """Return how many trials may come and how long they would take, no longer than the minutes
        left; None if no trial has shown how long one takes."""
        trials = self._count_max_trials() - self.study.count_finished()
        seconds = [trial.seconds for trial in self._list_complete()]
        if not seconds and last.state == "pruned":
            seconds = [last.seconds * last.planned_steps / max(1, last.steps)]
        if not seconds:
            return trials, None
        predicted = trials * sum(seconds) / len(seconds) / len(self.runners)
        return trials, min(predicted, max(0.0, self.deadline - time.monotonic()))

    def _refuse_small_budget(
        self, spec: TrialSpec, start: float, step_seconds: Sequence[float], last_step: int
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
        expected_seconds = now - start + mean * (steps - last_step)
        is_judged = len(step_seconds) >= JUDGED_STEPS and len(self.runners) == 1
        if now > self.deadline or (is_judged and start + expected_seconds > self.deadline):
            raise InputError(
                f"too few for one trial, which takes about {expected_seconds / 60:.1f} minutes",
                where="--minutes",
                fix=f"allow at least {math.ceil(1.2 * expected_seconds / 60)}; {RESUME_FIX}",
            )

    def _list_complete(self) -> list[TrialRecord]:
        """Return the trials that reached their end, of earlier processes too."""
        trials = self.study.list_trials()
        complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
        return [summary.build_trial(self.recorder.folder, trial) for trial in complete]

    def _list_speeds(self) -> list[float]:
        """Return the seconds of each trial that reached its end, per unit of its length."""
        return [trial.seconds / get_length(trial) for trial in self._list_complete()]

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


def get_length(trial: TrialSpec | TrialRecord) -> float:
    """Return the steps or epochs of a trial if they are swept, else 1."""
    return next((float(trial.settings[key]) for key in LENGTH_KEYS if key in trial.settings), 1.0)
