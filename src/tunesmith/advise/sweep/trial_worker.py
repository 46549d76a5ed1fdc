"""A process that runs trials, so that several run at once: one per GPU, or per share of the cores.

    with open_workers(settings) as workers:
        events = workers[0].start_trial(spec)     TrialRunner's events, None while there is none
        wait_for_news(workers, stop)

The sweep's own process starts the workers, reads their events and writes the journal. A worker
loads the inputs once, writes the run folders of its trials, and ends with its parent. It waits
after each score until the sweep has judged it. A worker that cannot load ends the sweep: that is no
failure of a trial. Left out: which trial is next (trial_study.py), and which stops early
(run_trial.py).
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FrameType

import psutil

from tunesmith.advise.sweep.run_trial import TrialRunner
from tunesmith.core.errors import (
    MACHINE_ERRNOS,
    DiskError,
    GateError,
    InputError,
    Interrupted,
    MachineError,
    SharedMachineError,
    TunesmithError,
    to_machine_error,
)
from tunesmith.core.events import Event, Score
from tunesmith.core.hardware import count_cores, count_gpus
from tunesmith.core.library_output import escape_library_output
from tunesmith.core.ranks import THREADS_VARIABLE
from tunesmith.core.sweep_record import TrialSpec
from tunesmith.core.types import Machine
from tunesmith.recipe.schema import Recipe
from tunesmith.session.inputs import RunInputs, load_inputs
from tunesmith.train.signals import GracefulStop

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
EXIT_TERMINATED = 128 + signal.SIGTERM
END_SECONDS = 30  # for a worker to end after its last trial
POLL_SECONDS = 1.0  # a signal waits as long
PROBLEM_KINDS = (
    *(InputError, DiskError, SharedMachineError, MachineError),
    *(GateError, Interrupted, TunesmithError),
)
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """Tell a worker what to load, and let it see that it is what the sweep has loaded."""

    recipe: Recipe  # without test_data
    folder: Path  # of the sweep
    machine: Machine  # a worker's share
    fingerprints: dict[str, str]
    now: datetime
    allow_code: bool
    num_workers: int

    @classmethod
    def from_inputs(
        cls, inputs: RunInputs, folder: Path, *, allow_code: bool, num_workers: int
    ) -> WorkerSettings:
        """Return the settings for inputs whose machine is the share of one worker."""
        fingerprints = list_fingerprints(inputs)
        return cls(
            *(inputs.recipe, folder, inputs.machine, fingerprints, inputs.now),
            allow_code=allow_code,
            num_workers=num_workers,
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """An error as a worker sends it: some kinds cannot be pickled."""

    kind: type[TunesmithError]
    exit_code: int
    message: str
    where: str
    fix: str

    @classmethod
    def from_error(cls, error: TunesmithError) -> Problem:
        kind = next(kind for kind in PROBLEM_KINDS if isinstance(error, kind))
        return cls(kind, error.exit_code, error.message, error.where, error.fix)

    def to_error(self) -> TunesmithError:
        error = self.kind(self.message, where=self.where, fix=self.fix)
        error.exit_code = self.exit_code
        return error


@dataclasses.dataclass(frozen=True)
class TrialNews:
    """Carry an event from a worker, or the end of a trial and why it failed. The first news says
    that the worker has loaded its inputs, or why it has not."""

    event: Event | None = None
    problem: Problem | None = None


def make_interrupted() -> Interrupted:
    error = Interrupted("stopped by SIGTERM")
    error.exit_code = EXIT_TERMINATED
    return error


def share_machine(inputs: RunInputs, num_workers: int) -> RunInputs:
    """Return the inputs with a worker's share of a machine without GPUs."""
    machine = inputs.machine
    if machine.device != "cpu":
        return inputs
    share = dataclasses.replace(
        machine,
        cores=max(1, machine.cores // num_workers),
        available_bytes=machine.available_bytes // num_workers,
    )
    return dataclasses.replace(inputs, machine=share)


def list_fingerprints(inputs: RunInputs) -> dict[str, str]:
    rows = {role: rows.fingerprint for role, rows in inputs.datasets.items()}
    return {**rows, "template": inputs.renderer.fingerprint}


# ---------------------------------------------------------------- in the process of the sweep


class TrialWorker:
    """The handle of a worker. `index` is its GPU, of those that are visible, or its share of the
    cores."""

    def __init__(self, settings: WorkerSettings, index: int) -> None:
        self.settings = settings
        self.index = index
        self.is_busy = False
        self._start()

    def _start(self) -> None:
        self.connection, child_end = Pipe()
        handle = child_end.fileno()
        with child_end:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import main; main()", str(handle)],
                pass_fds=[handle],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **list_variables(self.index, self.settings.num_workers)},
                start_new_session=True,  # Ctrl-C is for the sweep, which interrupts its workers
            )
        with suppress(ConnectionError):  # told when the first news is read
            self.connection.send((self.settings, self.index))

    def wait_until_loaded(self) -> None:
        """Raise the error of a worker that cannot load its inputs."""
        if (problem := self._receive("before it was ready").problem) is not None:
            raise problem.to_error()

    def restart_if_ended(self) -> None:
        if self.process.poll() is not None:
            self.connection.close()
            self._start()
            self.wait_until_loaded()

    def start_trial(self, spec: TrialSpec) -> Generator[Event | None]:
        """Yield the events of a trial, None while there is no new one. Closed after a score, it
        stops the trial. Raises the error of the trial, MachineError if the process ended."""
        with suppress(ConnectionError):  # told when the first news is read
            self.connection.send(spec)
        self.is_busy = True
        while True:
            if not self.connection.poll():
                yield None
                continue
            news = self._receive("during the trial")
            if news.problem is not None:
                raise news.problem.to_error()
            if news.event is None:
                return
            should_go_on = False
            try:
                yield news.event
                should_go_on = True
            finally:
                self._answer(news.event, should_go_on=should_go_on)

    def _receive(self, when: str) -> TrialNews:
        """Return the next news. Raises MachineError if the process has ended, Interrupted if it was
        asked to."""
        try:
            news: TrialNews = self.connection.recv()
        except (EOFError, OSError):
            self.is_busy = False
            code = self.process.wait()
            if code in (-signal.SIGTERM, EXIT_TERMINATED):
                raise make_interrupted() from None
            end = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            hint = ": memory may have run out, use fewer --gpus" * (code == -signal.SIGKILL)
            raise MachineError(f"its process {end} {when}{hint}", where="--gpus") from None
        self.is_busy = news.event is not None
        return news

    def _answer(self, event: Event, *, should_go_on: bool) -> None:
        """Let the worker go on after a score, or end the trial there."""
        if not isinstance(event, Score):
            return
        with suppress(ConnectionError):  # told when the next news is read
            self.connection.send(should_go_on)
        if not should_go_on:
            self.finish_trial()

    def finish_trial(self) -> None:
        """Read what the trial still sends, up to its end."""
        with suppress(MachineError, Interrupted, ConnectionError):
            while self.is_busy:
                news = self._receive("while it was stopped")
                if isinstance(news.event, Score):
                    self.connection.send(True)

    def request_stop(self) -> None:
        """Ask the process to save a checkpoint of its trial and to stop it."""
        self.process.terminate()

    def end(self) -> None:
        """Let the process end, or kill it."""
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        self.stop()

    def stop(self) -> None:
        """Kill the process if it runs."""
        self.process.kill()
        self.process.wait()


@contextmanager
def open_workers(settings: WorkerSettings) -> Iterator[list[TrialWorker]]:
    """Start the workers and end them; kill them after an error."""
    workers: list[TrialWorker] = []
    try:
        for index in range(settings.num_workers):
            workers.append(TrialWorker(settings, index))
        for worker in workers:
            worker.wait_until_loaded()
        yield workers
        for worker in workers:
            worker.end()
    finally:
        for worker in workers:
            worker.stop()


def wait_for_news(workers: Sequence[TrialWorker], stop: GracefulStop) -> None:
    """Wait until one of the busy workers has news, or for a signal."""
    connections = [worker.connection for worker in workers]
    while not wait(connections, POLL_SECONDS) and not stop.signal_number:
        pass


def stop_trials(workers: Sequence[TrialWorker]) -> None:
    """Let each trial save a checkpoint."""
    busy = [worker for worker in workers if worker.is_busy]
    for worker in busy:
        worker.request_stop()
    for worker in busy:
        worker.finish_trial()


def list_variables(index: int, num_workers: int) -> dict[str, str]:
    """Return the environment variables that give a worker its GPU and its threads."""
    threads = os.environ.get(THREADS_VARIABLE, str(max(1, count_cores() // num_workers)))
    variables = {THREADS_VARIABLE: threads}
    if count_gpus():
        visible = os.environ.get(DEVICES_VARIABLE)
        variables[DEVICES_VARIABLE] = visible.split(",")[index] if visible else str(index)
    return variables


# ---------------------------------------------------------------- in the process of a worker


def main() -> None:
    """Run the trials that the sweep sends over a connection, until it closes it."""
    escape_library_output()  # stderr is that of the sweep
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    process = _WorkerProcess()
    signal.signal(signal.SIGTERM, process.handle_signal)
    with Connection(int(sys.argv[1])) as connection, suppress(EOFError, ConnectionError):
        settings, index = connection.recv()
        try:
            runner = load_runner(settings, index)
        except TunesmithError as error:
            connection.send(TrialNews(problem=Problem.from_error(error)))
            return
        connection.send(TrialNews())
        while True:
            spec: TrialSpec = connection.recv()
            connection.send(process.run_trial(runner, spec, connection))


class _WorkerProcess:
    """A trial answers a first SIGTERM itself, with a checkpoint; nothing answers a second one.
    Where there is nothing to save, the process ends."""

    def __init__(self) -> None:
        self.is_training = False

    def handle_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self.is_training:
            sys.exit(EXIT_TERMINATED)

    def run_trial(self, runner: TrialRunner, spec: TrialSpec, connection: Connection) -> TrialNews:
        """Send the events of a trial until the sweep stops it; return its end."""
        try:
            with closing(runner.start_trial(spec)) as events:
                for event in events:
                    self.is_training = True
                    connection.send(TrialNews(event))
                    if isinstance(event, Score) and not connection.recv():
                        break
        except TunesmithError as error:
            return TrialNews(problem=Problem.from_error(error))
        except OSError as error:
            if error.errno not in MACHINE_ERRNOS:
                raise
            problem = Problem.from_error(to_machine_error(error, "cannot access a file"))
            return TrialNews(problem=problem)
        finally:
            self.is_training = False
        return TrialNews()


def load_runner(settings: WorkerSettings, index: int) -> TrialRunner:
    """Load the inputs. Raises InputError if they are not those of the sweep, MachineError without
    its kind of GPU."""
    inputs = load_inputs(settings.recipe, now=settings.now, output_dir=settings.folder)
    fingerprints = list_fingerprints(inputs)
    for role, fingerprint in settings.fingerprints.items():
        if fingerprints.get(role) != fingerprint:
            message = "changed since the sweep was started"
            raise InputError(message, where=role, fix="restore it, or use another output_dir")
    machine = inputs.machine
    expected = (settings.machine.device, settings.machine.device_name)
    if (machine.device, machine.device_name) != expected:
        message = f"process {index + 1} has {machine.device_name}, the sweep {expected[1]}"
        raise MachineError(message, where="--gpus", fix="let each process use a GPU of that kind")
    if machine.device == "cpu":
        machine = settings.machine
        process = psutil.Process()
        if hasattr(process, "cpu_affinity"):  # macOS has none
            process.cpu_affinity(process.cpu_affinity()[index :: settings.num_workers])
    inputs = dataclasses.replace(inputs, machine=machine)
    return TrialRunner(inputs, settings.folder, settings.allow_code)
