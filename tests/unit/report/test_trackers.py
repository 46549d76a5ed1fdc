"""Trackers get every event of a run, and what goes wrong there is a warning."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import fake_runs
from tunesmith.cli import run as run_commands
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.events import StageStart
from tunesmith.core.run_dir import PLAN_FILE, RunFolder
from tunesmith.report import trackers
from tunesmith.report.trackers import RunTracker, export_run

# of the imports of the trackers' packages
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return name -> (step, value), as TensorBoard itself reads them."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    events = reader.EventAccumulator(str(run / "tensorboard")).Reload()
    scalars: dict[str, list[tuple[int, float]]] = {}
    for name in events.Tags()["scalars"]:
        scalars[name] = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
    return scalars


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    export_run(run, "tensorboard")
    export_run(run, "tensorboard")  # replaces the first export
    scalars = read_scalars(run)
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 31))
    assert scalars["train/loss"][3] == (4, 0.5)
    assert scalars["train/tokens_per_second"][0] == (1, 1500.0)
    assert [step for step, _ in scalars["eval/loss/low"]] == [10, 20, 30]


def test_stages_share_one_axis_of_steps(tmp_path: Path) -> None:
    run = fake_runs.write_stages(tmp_path / "run")
    export_run(run, "tensorboard")
    assert [step for step, _ in read_scalars(run)["train/loss"]] == list(range(1, 61))


def test_a_running_stage_continues_the_axis(tmp_path: Path) -> None:
    run = fake_runs.write_stages(tmp_path / "run")
    with RunTracker(run, "tensorboard") as tracker:
        tracker.send(StageStart(2, 2, "sft", 30, "stages/2-sft"))
        tracker.send(fake_runs.make_step(31))
    assert tracker.problem == ""
    assert [step for step, _ in read_scalars(run)["train/loss"]] == list(range(1, 62))


def test_a_run_is_tracked_while_it_trains(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunTracker(path, "tensorboard") as tracker, RunFolder.create(path) as folder:
        folder.write_json(PLAN_FILE, fake_runs.PLAN)
        tracker.send(fake_runs.make_step(1))
        deadline = time.monotonic() + 60
        while not list(path.glob("tensorboard/events*")) and time.monotonic() < deadline:
            time.sleep(0.2)  # it writes before the run ends
        assert list(path.glob("tensorboard/events*"))
        tracker.send(fake_runs.make_step(2))
    assert tracker.problem == ""
    assert [step for step, _ in read_scalars(path)["train/loss"]] == [1, 2]


def test_a_resumed_run_sends_its_history_once(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "run", events=[fake_runs.make_step(1)])
    with (run / "events.jsonl").open("a") as file:
        file.write('{"type": "st')  # cut off by a kill
    with RunTracker(run, "tensorboard") as tracker, RunFolder.open(run) as folder:
        folder.append_event(fake_runs.make_step(2))
        tracker.send(fake_runs.make_step(2))
    assert tracker.problem == ""
    assert [step for step, _ in read_scalars(run)["train/loss"]] == [1, 2]


def test_a_tracker_that_fails_is_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake_runs.write_run(tmp_path / "run")
    (run / "tensorboard").write_text("in the way")
    with run_commands._tracking(run, "tensorboard") as send_event:
        send_event(fake_runs.make_step(31))
    stderr = capsys.readouterr().err
    assert stderr.count("warning: tensorboard did not get everything: ") == 1
    assert "Error" in stderr
    assert stderr.endswith(f"  fix: tunesmith report {run} --track tensorboard\n")
    assert stderr.count("\n") == 2


def test_a_failing_run_is_not_hidden_by_its_tracker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake_runs.write_run(tmp_path / "run")
    (run / "tensorboard").write_text("in the way")

    def fail() -> None:
        with run_commands._tracking(run, "tensorboard") as send_event:
            send_event(fake_runs.make_step(31))
            raise MachineError("the disk is full")

    with pytest.raises(MachineError, match="the disk"):
        fail()
    assert "did not get everything: " in capsys.readouterr().err
    with pytest.raises(MachineError, match="tensorboard: "):
        export_run(run, "tensorboard")


def test_a_tracker_that_hangs_is_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    class HangingTracker(trackers.TensorBoard):
        def close(self) -> None:
            released.wait(60)
            super().close()

    run = fake_runs.write_run(tmp_path / "run")
    monkeypatch.setattr(trackers, "FLUSH_SECONDS", 0.0)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", (HangingTracker, "tensorboardX"))
    with RunTracker(run, "tensorboard") as tracker:
        pass
    assert "still sending" in tracker.problem
    released.set()
    tracker._thread.join()


def test_missing_and_unknown_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_runs.write_run(tmp_path / "run")
    with pytest.raises(InputError, match="use one of tensorboard, wandb"):
        RunTracker(run, "mlflow")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(InputError, match="wandb needs wandb, which is not installed") as caught:
        RunTracker(run, "wandb")
    assert "pip install '.[wandb]' in tunesmith's folder" in caught.value.fix
    with pytest.raises(InputError, match="not installed"):
        export_run(run, "wandb")
    with pytest.raises(InputError, match="not a run folder"):
        export_run(tmp_path, "tensorboard")


@pytest.mark.slow
def test_weights_and_biases_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # its own process has 30 s to start
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    export_run(run, "wandb")
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    names = (b"train/loss", b"eval/loss/low", b"tokens_per_second", b"learning_rate")
    deadline = time.monotonic() + 60  # W&B's own process may write after `finish` has returned
    while not all(name in file.read_bytes() for name in names) and time.monotonic() < deadline:
        time.sleep(0.1)
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    assert [name for name in names if name not in content] == []
