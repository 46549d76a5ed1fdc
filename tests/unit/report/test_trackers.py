"""Trackers get the events of a run from a process of their own, and what goes wrong there is a
warning."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fake_runs
from tunesmith.cli import run as run_commands
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.run_dir import RunFolder
from tunesmith.report import trackers
from tunesmith.report.trackers import EventTail, TrackerProcess, follow_run, send_events

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of the trackers' own imports


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard itself reads them."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    found = reader.EventAccumulator(str(run / "tensorboard")).Reload()
    return {
        name: [(one.step, one.value) for one in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the process does, in this one: its standard input has ended."""
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield


@pytest.mark.usefixtures("here")
def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.record_of())
    follow_run(run, "tensorboard")
    follow_run(run, "tensorboard")  # anew, not twice
    found = scalars(run)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 31))
    assert found["train/loss"][3] == (4, 0.5)
    assert found["train/tokens_a_second"][0] == (1, 1500.0)
    assert [step for step, _ in found["eval/loss/low"]] == [10, 20, 30]


@pytest.mark.usefixtures("here")
def test_stages_are_one_line_of_steps(tmp_path: Path) -> None:
    run = fake_runs.write_stages(tmp_path / "run")
    follow_run(run, "tensorboard")
    assert [step for step, _ in scalars(run)["train/loss"]] == list(range(1, 61))


def test_a_run_is_followed_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with TrackerProcess(path, "tensorboard") as tracked, RunFolder.create(path) as folder:
        folder.write_json("plan.json", fake_runs.PLAN)
        folder.append_event(fake_runs.step(1))
        deadline = time.monotonic() + 60
        while not list(path.glob("tensorboard/events*")) and time.monotonic() < deadline:
            time.sleep(0.2)  # it writes while the run goes on
        folder.append_event(fake_runs.step(2))
    assert tracked.problem == ""
    assert [step for step, _ in scalars(path)["train/loss"]] == [1, 2]


def test_what_is_new_is_read_once_and_whole(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "run", happened=[fake_runs.step(1)])
    reader = EventTail(run)
    assert [event["step"] for _, event in reader.read_new_events()] == [1]
    with (run / "events.jsonl").open("a") as file:
        file.write('{"type": "step", "step": 2}\n{"type": "st')
    assert [event["step"] for _, event in reader.read_new_events()] == [2]
    assert list(reader.read_new_events()) == []
    with (run / "events.jsonl").open("a") as file:
        file.write('ep", "step": 3}\n')
    assert [event["step"] for _, event in reader.read_new_events()] == [3]


def test_a_tracker_that_fails_is_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake_runs.write_run(tmp_path / "run")
    (run / "tensorboard").write_text("in the way")
    with run_commands._tracking(run, "tensorboard"):
        pass
    said = capsys.readouterr().err
    assert said.count("warning: tensorboard has not got everything: ") == 1
    assert "Error" in said
    assert said.count("\n") == 1


def test_a_run_that_breaks_is_not_hidden_by_its_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with (
        pytest.raises(MachineError, match="the disk"),
        run_commands._tracking(tmp_path, "tensorboard"),
    ):
        raise MachineError("the disk is full")
    assert "has not got everything: it is not installed" in capsys.readouterr().err
    with pytest.raises(MachineError, match="tensorboard: it is not installed"):
        send_events(fake_runs.write_run(tmp_path / "run"), "tensorboard")


def test_a_tracker_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_runs.write_run(tmp_path / "run")
    monkeypatch.setattr(trackers, "FLUSH_SECONDS", 0.0)
    with TrackerProcess(run, "tensorboard") as tracked:
        pass
    assert "still sending" in tracked.problem


def test_trackers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_runs.write_run(tmp_path / "run")
    with pytest.raises(InputError, match="use one of tensorboard, wandb"):
        TrackerProcess(run, "mlflow")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else name)
    with TrackerProcess(run, "wandb") as tracked:
        pass
    assert tracked.problem == "it is not installed: pip install 'tunesmith[wandb]'"
    with pytest.raises(InputError, match="not a run folder"):
        send_events(tmp_path, "tensorboard")


@pytest.mark.slow
def test_weights_and_biases_gets_it_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.record_of())
    send_events(run, "wandb")
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    for name in (b"train/loss", b"eval/loss/low", b"tokens_a_second", b"learning_rate"):
        assert name in content, name
