"""What is no number never reaches a weight or a file; when it keeps coming it ends the run, and
everyone is told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tunesmith
from plan_configs import make_config
from tiny_models import make_tiny_document, make_tiny_model
from tiny_runs import make_tiny_recipe, read_adapter_bytes, select_steps, train, write_eval_files
from tunesmith.core.atomic import verify_dir
from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult, Event, TrainStep
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import RunFolder, read_all_events, read_events, read_failure
from tunesmith.core.types import RUN_FORMAT, Batch
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.safetensors_io import find_nonfinite, write_tensors
from tunesmith.session.reopen import load_trained_session
from tunesmith.train import run
from tunesmith.train.loop import TrainingLoop

SETTINGS = make_config(pack_length=60, learning_rate=2e-3, lr_scheduler_type="constant", seed=5)


def poison(steps: set[int], patch: pytest.MonkeyPatch) -> None:
    """NaN in the hidden states of these training steps, one pack each."""
    forwards: list[int] = []
    hidden = PackedCausalLM.compute_hidden

    def poisoned(self: PackedCausalLM, batch: Batch) -> Tensor:
        actual = hidden(self, batch)
        if self.network.training:
            forwards.append(len(forwards) + 1)
            return actual * (math.nan if forwards[-1] in steps else 1)
        return actual

    patch.setattr(PackedCausalLM, "compute_hidden", poisoned)


def followed(events: Callable[[], object], folder: Path) -> GateError:
    with pytest.raises(GateError) as stop:
        events()
    assert stop.value.exit_code == 4
    assert not (folder / "adapter").exists()
    assert not (folder / "record.json").exists()
    return stop.value


@pytest.mark.promise
def test_fault_27_three_steps_in_a_row_that_are_no_number_fail_the_run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = make_tiny_recipe(
        tiny_folder, tmp_path / "straight", num_train_epochs=3, save_steps=2
    )
    wish, folder = (
        make_tiny_recipe(tiny_folder, tmp_path, num_train_epochs=3, save_steps=2, guard="off"),
        tmp_path / "run",
    )
    train(straight)
    with monkeypatch.context() as patch:
        poison({4, 5, 6}, patch)
        error = followed(lambda: train(wish), folder)
    assert "3 consecutive non-finite steps" in error.message

    events = [logged.event for logged in read_all_events(folder)]
    bad = [e for e in events if isinstance(e, CheckResult) and e.kind == "non-finite"]
    assert [event.step for event in bad] == [4, 5], "the third is the failure itself"
    assert all("rows: train.jsonl:" in event.evidence for event in bad)
    last = events[-1]
    assert isinstance(last, CheckResult)
    assert (last.kind, last.level) == ("failed", "stop")
    assert "step 6: loss nan" in last.evidence
    assert "train.jsonl:" in last.evidence

    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == "step-2"
    assert verify_dir(checkpoint) == ""
    assert find_nonfinite(load_file(checkpoint / "state.safetensors")) == ""

    for use in (
        load_trained_session,
        tunesmith.evaluate,
        lambda path: next(tunesmith.chat(path, ["hello"])),
    ):
        with pytest.raises(GateError, match="this run failed: 3 consecutive non-finite steps"):
            use(folder)

    events = list(run.resume(folder))
    (messages,) = [
        event
        for event in events
        if isinstance(event, CheckResult) and event.kind == "earlier attempt"
    ]
    assert "3 consecutive non-finite steps" in messages.evidence
    assert [step.step for step in select_steps(events)] == list(range(3, 10))
    assert read_failure(folder) == ""
    assert read_adapter_bytes(wish) == read_adapter_bytes(straight)


def test_fault_27_under_guard_it_goes_back_and_on_with_half_the_rate(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison({4, 5, 6}, monkeypatch)
    events = train(make_tiny_recipe(tiny_folder, tmp_path, num_train_epochs=3, save_steps=2))
    (back,) = [
        event for event in events if isinstance(event, CheckResult) and event.level == "rollback"
    ]
    assert (back.kind, back.step) == ("non-finite", 6)
    assert "back to step 2, continuing with 0.5 times the learning rate" in back.evidence
    rates = {step.step: step.learning_rate for step in select_steps(events)}
    assert rates[3] == pytest.approx(0.5 * 0.01 * 7 / 9)
    assert [
        event.step for event in read_events(tmp_path / "run") if isinstance(event, TrainStep)
    ] == list(range(1, 10))


def test_fault_27_one_bad_step_is_skipped_and_its_rows_are_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison({2}, monkeypatch)
    events = train(make_tiny_recipe(tiny_folder, tmp_path))
    verdicts = [e for e in events if isinstance(e, CheckResult) and e.level != "ok"]
    (verdict,) = [each for each in verdicts if each.kind != "EOS is supervised"]
    assert (verdict.step, verdict.level) == (2, "warn")
    assert verdict.evidence.count("train.jsonl:") == 2
    assert [step.step for step in select_steps(events)] == [1, 3]
    assert read_json(tmp_path / "run" / "record.json")["steps"] == 2


def test_fault_27_a_gate_that_says_no_after_training_fails_the_run_too(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = make_tiny_recipe(tiny_folder, tmp_path, **write_eval_files(tmp_path))
    measure = run.measure_items

    def refusing(*arguments: object, step: int, **more: object) -> object:
        if step:
            raise GateError("the model's logits are not finite")
        return measure(*arguments, step=step, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "measure_items", refusing)
    with pytest.raises(GateError):
        train(wish)
    with pytest.raises(GateError, match="this run failed: the model's logits"):
        load_trained_session(tmp_path / "run")


# ---------------------------------------------------------------- nothing of it is written


def documents(step: int) -> list:
    return [make_tiny_document(9, step)]


def test_fault_27_weights_that_an_update_breaks_are_named_and_never_saved(tmp_path: Path) -> None:
    training = TrainingLoop(
        make_tiny_model(), documents, dataclasses.replace(SETTINGS, learning_rate=math.inf), steps=6
    )
    with RunFolder.create(tmp_path) as folder:
        folder.write_json("plan.json", {"format": RUN_FORMAT})
        with folder.checkpoint(0, metadata={}) as target:
            training.save(target)
        assert isinstance(next(training), TrainStep), "the loss and the gradient were finite"
        with (
            pytest.raises(GateError, match="NaN or infinite values: nothing is written"),
            folder.checkpoint(1, metadata={}) as target,
        ):
            training.save(target)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0"]
    with pytest.raises(
        GateError, match=r"lora_A is not finite since the previous update; the rows of this step"
    ):
        next(training)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fault_27_a_tensor_with_such_a_value_is_not_written(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    good, bad = torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype)
    write_tensors(
        {"good": good, "none": torch.empty(0), "count": torch.tensor([1, 2])},
        tmp_path / "a.safetensors",
    )
    bad[2, 3] = value
    with pytest.raises(GateError, match="bad holds NaN or infinite values"):
        write_tensors({"good": good, "bad": bad}, tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(load_file(tmp_path / "a.safetensors")["good"], good)


def test_weights_are_readable_for_whom_their_folder_is(tmp_path: Path) -> None:
    """The writer of safetensors gives its files to their owner alone."""
    tmp_path.chmod(0o755)
    write_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_moments_are_checked_like_weights(tmp_path: Path) -> None:
    training = TrainingLoop(make_tiny_model(), documents, SETTINGS, steps=6)
    events: list[Event] = [next(training)]
    assert events
    parameter = next(iter(training.parameters.values()))
    training.optimizer.state[parameter]["exp_avg_sq"][0, 0] = math.inf
    with pytest.raises(GateError, match=r"exp_avg_sq\."):
        training.save(tmp_path)
