"""A sweep whose trials run at once: the same runs, and nothing is lost when a process ends."""

import dataclasses
import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest

from tiny_sweeps import make_sweep_recipe, sweep
from tunesmith.advise.sweep import trial_worker
from tunesmith.advise.sweep.run_sweep import run_sweep
from tunesmith.advise.sweep.run_trial import TrialRunner
from tunesmith.advise.sweep.trial_worker import (
    Problem,
    TrialWorker,
    WorkerSettings,
    _WorkerProcess,
    list_variables,
    open_workers,
)
from tunesmith.core import ranks
from tunesmith.core.errors import (
    DiskError,
    GateError,
    InputError,
    Interrupted,
    MachineError,
    SharedMachineError,
)
from tunesmith.core.events import Event, Score, TrainStep
from tunesmith.core.hardware import count_cores
from tunesmith.core.sweep_record import (
    SweepEvent,
    SweepRecord,
    TrialEnd,
    TrialEvent,
    TrialSpec,
    TrialStart,
    read_sweep,
)
from tunesmith.data.readers.invalid_row import InvalidRow
from tunesmith.recipe.load import dump_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs

ALL_TRIALS = {"learning_rate": [0.0001, 0.01], "seeds": 2, "pruner": "none"}
needs_two_cores = pytest.mark.skipif(count_cores() < 2, reason="one core")


def read_results(record: SweepRecord) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Return what each trial measured and the bytes of its adapter, by settings and seed: which
    trial has which number depends on which ends first."""
    results: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for trial in record.trials:
        adapter = Path(record.folder) / trial.folder / "adapter" / "adapter_model.safetensors"
        key = (trial.settings["learning_rate"], trial.seed)
        results[key] = (trial.state, trial.value, trial.curve, adapter.read_bytes())
    return results


def describe_winner(record: SweepRecord) -> tuple[Any, ...]:
    assert record.winner is not None
    return record.configurations[record.winner].settings, record.test


def list_worker_processes(process: psutil.Process) -> list[psutil.Process]:
    """Return the workers of a sweep, in the order in which they were started."""
    children = sorted(process.children(), key=lambda child: child.create_time())
    return [child for child in children if trial_worker.__name__ in " ".join(child.cmdline())]


def load_settings(recipe: Recipe, folder: Path, num_workers: int) -> WorkerSettings:
    loaded = inputs.load_inputs(recipe.model_copy(update={"sweep": None}))
    return WorkerSettings.from_inputs(loaded, folder, allow_code=False, num_workers=num_workers)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> SweepRecord:
    """All trials, one after the other."""
    folder = tmp_path_factory.mktemp("straight")
    return sweep(make_sweep_recipe(tiny_folder, folder, ALL_TRIALS), folder / "sweep")


@needs_two_cores
def test_trials_at_once_are_the_same_runs(
    straight: SweepRecord, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, ALL_TRIALS)
    events: list[SweepEvent] = list(
        run_sweep(inputs.load_inputs(recipe), tmp_path / "sweep", gpus=2)
    )
    record = events[-1]
    assert isinstance(record, SweepRecord)
    assert read_results(record) == read_results(straight)
    assert describe_winner(record) == describe_winner(straight)
    starts = [index for index, event in enumerate(events) if isinstance(event, TrialStart)]
    ends = [index for index, event in enumerate(events) if isinstance(event, TrialEnd)]
    assert len(starts) == len(ends) == 4
    assert starts[1] < ends[0], "two run at once"
    of_runs = events[starts[0] + 1 : ends[-1]]
    assert not [event for event in of_runs if isinstance(event, Score | TrainStep)]
    own = [event for event in of_runs if isinstance(event, TrialEvent)]
    for number in range(4):
        steps = [
            each.event.step
            for each in own
            if each.number == number and isinstance(each.event, TrainStep)
        ]
        assert steps == [1, 2, 3, 4]
    assert not list_worker_processes(psutil.Process())


@pytest.mark.slow
@needs_two_cores
def test_a_trial_whose_process_is_killed_is_told_and_the_others_go_on(
    tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, ALL_TRIALS)
    events = run_sweep(inputs.load_inputs(recipe), tmp_path / "sweep", gpus=2)
    killed = None
    record = None
    for event in events:
        if killed is None and isinstance(event, TrialEvent):
            killed = event.number
            list_worker_processes(psutil.Process())[killed].kill()
        record = event
    assert isinstance(record, SweepRecord)
    failed = [trial for trial in record.trials if trial.state == "failed"]
    assert [trial.number for trial in failed] == [killed]
    assert failed[0].reason == (
        "--gpus: its process was ended by signal 9 during the trial: memory may have run out, use "
        "fewer --gpus"
    )
    assert record.count_trials("complete") >= 2
    assert record.winner is not None


def test_a_hopeless_trial_stops_at_its_score_and_its_process_takes_the_next(
    tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path)
    with open_workers(load_settings(recipe, tmp_path / "sweep", 1)) as workers:
        (worker,) = workers
        for number in range(2):
            spec = TrialSpec(number, number, 1, {"learning_rate": 0.001 * (number + 1)})
            events = worker.start_trial(spec)
            steps: list[int] = []
            for event in events:
                if isinstance(event, TrainStep):
                    steps.append(event.step)
                if isinstance(event, Score) and event.step == 2:
                    break
            events.close()
            assert steps == [1, 2]
            assert not worker.is_busy
            logged = (tmp_path / "sweep" / f"trial-{number:03d}" / "events.jsonl").read_text()
            assert '"step": 3' not in logged


def test_an_error_of_a_trial_keeps_its_kind_place_and_fix() -> None:
    for error in (
        InputError("bad", where="x.jsonl:3", fix="mend it"),
        GateError("diverged", where="step 3"),
        MachineError("too slow"),
        SharedMachineError("too many open files", fix="ulimit -n"),
        DiskError("full", fix="free some disk space"),
    ):
        sent = pickle.loads(pickle.dumps(Problem.from_error(error))).to_error()
        assert type(sent) is type(error)
        assert str(sent) == str(error)
    stopped = Interrupted("stopped by SIGTERM")
    stopped.exit_code = 143
    assert Problem.from_error(stopped).to_error().exit_code == 143
    sent = Problem.from_error(InvalidRow("empty text", "bad row")).to_error()
    assert isinstance(sent, InputError)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskError), (errno.EMFILE, SharedMachineError)]
)
def test_an_error_that_every_trial_would_meet_is_no_end_of_its_process(
    number: int, kind: type[MachineError]
) -> None:
    class FailingMachine(TrialRunner):
        def start_trial(self, spec: TrialSpec) -> Generator[Event]:  # noqa: ARG002
            raise OSError(number, os.strerror(number))
            yield

    runner = object.__new__(FailingMachine)
    spec = TrialSpec(0, 0, 0, {})
    news = _WorkerProcess().run_trial(runner, spec, Pipe()[0])
    assert news.problem is not None
    assert type(news.problem.to_error()) is kind


@pytest.mark.parametrize("change", ["removed", "changed"])
def test_a_worker_that_finds_other_rows_ends_the_sweep_and_fails_no_trial(
    change: str, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = load_settings(make_sweep_recipe(tiny_folder, tmp_path), tmp_path / "sweep", 1)
    rows = tmp_path / "train.jsonl"
    expected = "data: changed since the sweep was started"
    if change == "removed":
        rows.unlink()
        expected = r"train\.jsonl"
    else:
        rows.write_text(rows.read_text().replace("1", "2"))
    with pytest.raises(InputError, match=expected), open_workers(settings):
        pass
    assert not (tmp_path / "sweep").exists()


@needs_two_cores
def test_a_model_that_fits_once_but_not_twice_is_refused_before_the_first_trial(
    tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, ALL_TRIALS)
    loaded = inputs.load_inputs(recipe)
    plan = inputs.make_plan(loaded)
    machine = dataclasses.replace(
        loaded.machine, available_bytes=int(plan.memory_bytes["peak"] * 1.5)
    )
    loaded = dataclasses.replace(loaded, machine=machine)
    with pytest.raises(MachineError):
        list(run_sweep(loaded, tmp_path / "sweep", gpus=2))
    assert not (tmp_path / "sweep").exists()


def test_a_worker_that_ended_is_started_again(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path)
    with open_workers(load_settings(recipe, tmp_path / "sweep", 1)) as workers:
        (worker,) = workers
        events = worker.start_trial(TrialSpec(0, 0, 1, {}))
        next(events)
        worker.process.kill()
        with pytest.raises(MachineError, match="was ended by signal 9"):
            list(events)
        worker.restart_if_ended()
        steps = [event for event in worker.start_trial(TrialSpec(1, 1, 1, {})) if event]
    assert any(isinstance(event, TrainStep) for event in steps)


# ---------------------------------------------------------------- killed

SWEEP_PROGRAM = """\
import sys
from tunesmith import api
from tunesmith.core.errors import TunesmithError
try:
    for event in api.tune_sweep(sys.argv[1], gpus=2):
        print(type(getattr(event, "event", event)).__name__, flush=True)
except TunesmithError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start_sweep(recipe: Recipe, folder: Path) -> subprocess.Popen[str]:
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(recipe.model_copy(update={"output_dir": folder / "sweep"})))
    command = [sys.executable, "-c", SWEEP_PROGRAM, str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == "TrainStep\n":
            return
    raise AssertionError("it ended before the first step")


def are_gone(processes: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + 60
    while any(each.is_running() and each.status() != "zombie" for each in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
@needs_two_cores
@pytest.mark.skipif(sys.platform != "linux", reason="a worker ends with its parent on Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_leaves_no_process_and_ends_with_the_same_results(
    number: signal.Signals, straight: SweepRecord, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, ALL_TRIALS)
    with start_sweep(recipe, tmp_path) as process:
        wait_for_step(process)
        workers = list_worker_processes(psutil.Process(process.pid))
        assert len(workers) == 2
        process.send_signal(number)
        assert process.stdout is not None
        process.stdout.read()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert are_gone(workers)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert "fix: continue with the same command" in errors
    record = sweep(recipe, tmp_path / "sweep", gpus=2)
    assert read_results(record) == read_results(straight)
    assert read_sweep(tmp_path / "sweep") == record


# ---------------------------------------------------------------- devices


@pytest.fixture
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("_no_variables")
def test_a_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_worker, "count_gpus", lambda: 4)
    monkeypatch.setattr(trial_worker, "count_cores", lambda: 16)
    assert list_variables(2, 4) == {"CUDA_VISIBLE_DEVICES": "2", "OMP_NUM_THREADS": "4"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,5,7")
    assert list_variables(2, 4)["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.usefixtures("_no_variables")
def test_without_a_gpu_a_worker_has_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial_worker, "count_gpus", lambda: 0)
    monkeypatch.setattr(trial_worker, "count_cores", lambda: 8)
    assert list_variables(1, 3) == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert list_variables(1, 3) == {"OMP_NUM_THREADS": "1"}


def test_more_trials_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path)
    monkeypatch.setattr(ranks, "count_gpus", lambda: 2)
    with pytest.raises(InputError, match="3 GPUs requested, but this machine has 2 GPUs"):
        sweep(recipe, tmp_path / "sweep", gpus=3)
    assert not (tmp_path / "sweep").exists()


def test_a_worker_is_started_with_its_variables(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = load_settings(make_sweep_recipe(tiny_folder, tmp_path), tmp_path / "sweep", 2)
    monkeypatch.setattr(trial_worker, "list_variables", lambda *_: {"TUNESMITH_TEST": "here"})
    worker = TrialWorker(settings, 1)
    try:
        assert psutil.Process(worker.process.pid).environ()["TUNESMITH_TEST"] == "here"
    finally:
        worker.stop()


def test_a_worker_does_not_control_the_terminal() -> None:
    """Its stderr is that of the sweep: warnings, log records and tracebacks quote configs."""
    program = (
        "import logging, warnings\n"
        f"from {trial_worker.__name__} import main\n"
        "import sys\n"
        f"worker = sys.modules[{trial_worker.__name__!r}]\n"
        "def fail(*_):\n"
        "    logging.getLogger('some.library').warning('log \\x1b[2J')\n"
        "    warnings.warn('warning \\x1b[2J')\n"
        "    raise ValueError('error \\x1b[2J')\n"
        "worker.load_runner = fail\n"
        "main()\n"
    )
    connection, child_end = Pipe()
    with connection, child_end:
        connection.send((None, 0))
        handle = child_end.fileno()
        command = [sys.executable, "-P", "-c", program, str(handle)]
        done = subprocess.run(command, pass_fds=[handle], stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert b"\x1b" not in done.stderr
    for word in (b"log", b"warning", b"ValueError: error"):
        assert word + b" \\u{1b}[2J" in done.stderr
