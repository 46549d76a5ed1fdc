"""SIGINT and SIGTERM at any moment of a run: nothing is half-written, and it goes on to the same
bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tiny_runs import (
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    save_model_folder,
    select_steps,
    train,
    write_eval_files,
)
from tunesmith.core.errors import Interrupted
from tunesmith.core.events import CheckpointSaved, Event, Score
from tunesmith.core.types import Batch
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.recipe.schema import Recipe
from tunesmith.train import base_reference, run
from tunesmith.train.guard import guarded_loop


@pytest.fixture(scope="module")
def straight(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that nothing stopped."""
    wish = wished(tiny_folder, tmp_path_factory.mktemp("straight"))
    train(wish)
    return read_adapter_bytes(wish)


def wished(model: Path, folder: Path) -> Recipe:
    """Three steps, two packs each, evaluated and saved after the second."""
    length = {"max_length": 60, "pack_length": 60}
    return make_tiny_recipe(
        model,
        folder,
        **write_eval_files(folder),
        **length,
        metrics=["bits_per_byte"],
        save_steps=2,
        eval_steps=2,
        lora_dropout=0.1,
    )


def follow(wish: Recipe) -> tuple[list[Event], Interrupted]:
    """The events of a run that a signal ends, and how it ends."""
    seen: list[Event] = []
    with pytest.raises(Interrupted, match="continue with: tunesmith resume") as stopped:
        seen.extend(event for event in run.train(plan_recipe(wish)))
    return seen, stopped.value


def went_on(folder: Path) -> tuple[list[Event], bytes]:
    """The events of the second attempt, and the adapter."""
    leftovers = [path.name for path in folder.rglob(".t*")]
    assert leftovers == []
    events = list(run.resume(folder))
    return events, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def at_forward(number: int, act: Callable[[], None], patch: pytest.MonkeyPatch) -> list[int]:
    """`act` in the `number`-th forward of training; returns the list of forwards so far."""
    forwards: list[int] = []
    hidden = PackedCausalLM.compute_hidden

    def acting(self: PackedCausalLM, batch: Batch) -> Tensor:
        if self.network.training:
            forwards.append(batch.layout.num_tokens)
            if len(forwards) == number:
                act()
        return hidden(self, batch)

    patch.setattr(PackedCausalLM, "compute_hidden", acting)
    return forwards


@pytest.mark.promise
def test_fault_23_a_signal_between_two_packs_of_a_step(
    tiny_folder: Path, straight: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        forwards = at_forward(3, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        events, stopped = follow(wished(tiny_folder, tmp_path))
    assert len(forwards) == 4, "the signal came in the first of two packs of the second step"
    assert stopped.exit_code == 143
    assert [step.step for step in select_steps(events)] == [1, 2]
    assert isinstance(events[-1], CheckpointSaved)
    events, actual = went_on(tmp_path / "run")
    assert [step.step for step in select_steps(events)] == [3]
    assert actual == straight


@pytest.mark.promise
def test_fault_23_a_second_signal_does_not_wait_for_the_step(
    tiny_folder: Path, straight: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish, seen = wished(tiny_folder, tmp_path), list[Event]()

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    def watched() -> None:
        for event in run.train(plan_recipe(wish)):
            seen.append(event)

    with monkeypatch.context() as patch:
        at_forward(3, twice, patch)
        with pytest.raises(KeyboardInterrupt):
            watched()
    assert [step.step for step in select_steps(seen)] == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert went_on(tmp_path / "run")[1] == straight


@pytest.mark.promise
@pytest.mark.parametrize(
    "stage",
    [
        "open_session",
        "run_preflight",
        "measure_items",
        "eval_during_training",
        "measure_items again",
    ],
)
def test_fault_23_a_signal_outside_of_steps_is_obeyed_at_once(
    stage: str, tiny_folder: Path, straight: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish, name = wished(tiny_folder, tmp_path), stage.partition(" ")[0]
    location: Any = {
        "eval_during_training": guarded_loop,
        "measure_items": base_reference,
    }.get(stage, run)

    def signalled(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the signal comes before the work is done")

    def signalled_at_first_result(*_: Any, **__: Any) -> Iterator[None]:
        yield signalled()

    is_iterator = name == "eval_during_training"
    with monkeypatch.context() as patch:
        patch.setattr(location, name, signalled_at_first_result if is_iterator else signalled)
        events, stopped = follow(wish)
    assert stopped.exit_code == 130
    done = {"eval_during_training": [1, 2], "measure_items again": [1, 2, 3]}.get(stage, [])
    assert [step.step for step in select_steps(events)] == done
    assert not done or (isinstance(events[-1], CheckpointSaved) and events[-1].step == done[-1])
    events, actual = went_on(tmp_path / "run")
    assert [step.step for step in select_steps(events)] == [
        step for step in (1, 2, 3) if step not in done
    ]
    assert any(isinstance(event, Score) and event.step == 3 for event in events)
    assert actual == straight


@pytest.mark.slow
@pytest.mark.promise
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fault_23_the_command_says_how_to_go_on(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    model = save_model_folder(tmp_path / "model")
    wish = make_tiny_recipe(model, tmp_path, num_train_epochs=4000, max_steps=4000, save_steps=9000)
    flags = [
        f"--{key}={value}"
        for key, value in wish.model_dump(mode="json", exclude_unset=True).items()
    ]
    flags = [flag for flag in flags if not flag.startswith("--data")] + [
        f"--data={tmp_path / 'train.jsonl'}"
    ]
    command = [sys.executable, "-m", "tunesmith.cli.app", "train", *flags]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        messages = ""
        while "step 80/4000" not in messages:
            messages = process.stderr.readline()
            assert messages, "the process ended before that step"
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == code
    assert f"stopped by {number.name}" in rest
    assert f"tunesmith resume {tmp_path / 'run'}" in rest
    checkpoints = (tmp_path / "run" / "checkpoints").iterdir()
    start, saved = sorted(int(path.name.removeprefix("step-")) for path in checkpoints)
    assert start == 0
    assert saved >= 80
