"""A process that runs trials, so that several run at once: one per GPU, or per share of the cores.

    with open_workers(settings) as workers:
        events = workers[0].start_trial(spec)     TrialRunner's events, None while there is none
        wait_for_news(workers, stop)

The sweep's own process starts the workers, reads their events and writes the journal. A worker
loads the inputs once, writes the run folders of its trials, and ends with its parent. It waits
after each score until the sweep has judged it. Left out: which trial is next (run_sweep.py), and
which stops early (run_trial.py).
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from functools import cache, partial
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import psutil

from tunesmith.advise.sweep.run_trial import TrialRunner
from tunesmith.core.errors import MachineError, TunesmithError
from tunesmith.core.events import Event, Score
from tunesmith.core.hardware import count_cores, count_gpus
from tunesmith.core.ranks import THREADS_VARIABLE
from tunesmith.core.sweep_record import TrialSpec
from tunesmith.recipe.schema import Recipe
from tunesmith.session.inputs import load_inputs
from tunesmith.train.signals import GracefulStop

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
END_SECONDS = 30  # for a worker to end after its last trial
POLL_SECONDS = 1.0  # a signal waits as long
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to load the inputs of the sweep."""

    recipe: Recipe  # without test_data
    folder: Path  # of the sweep
    now: datetime
    allow_code: bool
    num_workers: int


@dataclasses.dataclass(frozen=True)
class TrialNews:
    """What a worker sends: an event, or the end of a trial and why it failed."""

    event: Event | None = None
    error: tuple[type[TunesmithError], str, str, str] | None = None  # message, where, fix


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

    def start_trial(self, spec: TrialSpec) -> Generator[Event | None]:
        """Yield the events of a trial, None while there is no new one. Closed after a score, it
        stops the trial. Raises the error of the trial, MachineError if the process ended."""
        if self.process.poll() is not None:
            self.connection.close()
            self._start()
        with suppress(ConnectionError):
            self.connection.send(spec)
        self.is_busy = True
        while True:
            if not self.connection.poll():
                yield None
                continue
            news = self._receive()
            if news.error is not None:
                kind, message, where, fix = news.error
                raise kind(message, where=where, fix=fix)
            if news.event is None:
                return
            should_go_on = False
            try:
                yield news.event
                should_go_on = True
            finally:
                self._answer(news.event, should_go_on=should_go_on)

    def _receive(self) -> TrialNews:
        try:
            news: TrialNews = self.connection.recv()
        except (EOFError, ConnectionError):
            self.is_busy = False
            code = self.process.wait()
            end = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            fix = "with signal 9, memory may have run out: use fewer --gpus"
            raise MachineError(f"the process of the trial {end}", fix=fix) from None
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
        with suppress(MachineError):
            while self.is_busy:
                news = self._receive()
                if isinstance(news.event, Score):
                    self.connection.send(True)

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
        yield workers
        for worker in workers:
            worker.end()
    finally:
        for worker in workers:
            worker.stop()


def wait_for_news(workers: Sequence[TrialWorker], stop: GracefulStop) -> None:
    """Wait until one of the busy workers has news. After a signal, let each trial save a checkpoint
    and raise Interrupted."""
    connections = [worker.connection for worker in workers]
    while not wait(connections, POLL_SECONDS):
        if stop.signal_number:
            break
    if stop.signal_number:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.finish_trial()
    stop.raise_if_requested()


def list_variables(index: int, num_workers: int) -> dict[str, str]:
    """Return the environment variables that give a worker its GPU, or its threads."""
    if count_gpus():
        visible = os.environ.get(DEVICES_VARIABLE)
        return {DEVICES_VARIABLE: visible.split(",")[index] if visible else str(index)}
    threads = os.environ.get(THREADS_VARIABLE, str(max(1, count_cores() // num_workers)))
    return {THREADS_VARIABLE: threads}


# ---------------------------------------------------------------- in the process of a worker


def main() -> None:
    """Run the trials that the sweep sends over a connection, until it closes it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with Connection(int(sys.argv[1])) as connection, suppress(EOFError, ConnectionError):
        settings, index = connection.recv()
        load = cache(partial(load_runner, settings, index))
        while True:
            spec: TrialSpec = connection.recv()
            connection.send(_run_trial(load, spec, connection))


def load_runner(settings: WorkerSettings, index: int) -> TrialRunner:
    """Load the inputs for a share of the machine: one GPU, or a part of the cores and of the
    memory."""
    inputs = load_inputs(settings.recipe, now=settings.now, output_dir=settings.folder)
    machine = inputs.machine
    if machine.device == "cpu":
        share = machine.available_bytes // settings.num_workers
        machine = dataclasses.replace(machine, available_bytes=share)
        process = psutil.Process()
        if hasattr(process, "cpu_affinity"):  # macOS has none
            process.cpu_affinity(process.cpu_affinity()[index :: settings.num_workers])
            machine = dataclasses.replace(machine, cores=count_cores())
    inputs = dataclasses.replace(inputs, machine=machine)
    return TrialRunner(inputs, settings.folder, settings.allow_code)


def _run_trial(
    load: Callable[[], TrialRunner], spec: TrialSpec, connection: Connection
) -> TrialNews:
    """Send the events of a trial until the sweep stops it; return its end."""
    try:
        with closing(load().start_trial(spec)) as events:
            for event in events:
                connection.send(TrialNews(event))
                if isinstance(event, Score) and not connection.recv():
                    break
    except TunesmithError as error:
        return TrialNews(error=(type(error), error.message, error.where, error.fix))
    return TrialNews()
