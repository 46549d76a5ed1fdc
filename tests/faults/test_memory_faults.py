"""Memory that runs out on the device: training goes on in smaller packs, measuring in smaller
batches.

There is no such device in these tests: the model refuses more tokens or rows than a bound, with
torch's own error."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from failing_backward import fail_in_backward
from plan_configs import make_config
from tiny_models import (
    compute_max_difference,
    make_tiny_document,
    make_tiny_documents,
    make_tiny_model,
)
from tiny_runs import make_tiny_recipe, plan_recipe, select_steps, train, write_eval_files
from tunesmith.core.errors import MachineError
from tunesmith.core.events import CheckResult, Event, TrainStep
from tunesmith.core.json_io import read_json
from tunesmith.core.types import Batch, GenerationRequest
from tunesmith.evaluate import shared_items
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.model.adapters import get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM, RunLayers
from tunesmith.model.generation.engine import generate, stream_answer
from tunesmith.model.machine_errors import OutOfMemory, machine_errors
from tunesmith.model.paged_cache import CacheRow, PagedKVCache
from tunesmith.train import loop, run
from tunesmith.train.loop import TrainingLoop

SETTINGS = make_config(pack_length=90, learning_rate=2e-3, weight_decay=0.01, seed=5)
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


def bounded(model: PackedCausalLM, most: int) -> PackedCausalLM:
    """The model on a device that has memory for packs of so many tokens."""
    hidden = model.compute_hidden

    def refusing(batch: Batch) -> Tensor:
        if batch.layout.num_tokens > most:
            hidden(batch)  # the error comes in the middle of the work
            raise torch.OutOfMemoryError(SAID)
        return hidden(batch)

    model.compute_hidden = refusing  # type: ignore[method-assign]
    return model


def trained(model: PackedCausalLM) -> tuple[list[Event], dict[str, Tensor]]:
    start = {
        name: p.detach().clone() for name, p in get_trainable_parameters(model.network).items()
    }
    training = TrainingLoop(
        model, lambda step: make_tiny_documents((31, 17, 13, 5, step)), SETTINGS, steps=4
    )
    events = list(training)
    return events, {
        name: p.detach() - start[name]
        for name, p in get_trainable_parameters(model.network).items()
    }


def verdicts(events: Sequence[Event]) -> list[CheckResult]:
    return [event for event in events if isinstance(event, CheckResult)]


def test_fault_28_a_step_that_does_not_fit_is_the_same_step_in_smaller_packs() -> None:
    (free, expected), (narrow, actual) = (
        trained(bounded(make_tiny_model(), most)) for most in (10**6, 35)
    )
    (warning,) = verdicts(narrow)
    assert narrow[0] == warning, "the first step, and never again"
    assert (warning.kind, warning.level, warning.step) == ("memory", "warn", 1)
    assert (
        warning.evidence
        == f"out of memory: {SAID}; packs of 67 tokens become packs of 33: same step, same update"
    )
    for item, other in zip(select_steps(free), select_steps(narrow), strict=True):
        assert (item.step, item.tokens, item.supervised_tokens) == (
            other.step,
            other.tokens,
            other.supervised_tokens,
        )
        assert item.loss == pytest.approx(other.loss, rel=1e-5)
    assert compute_max_difference(actual, expected) < 1e-4


def test_fault_28_gradients_of_a_backward_that_does_not_fit_are_dropped() -> None:
    """Those of the packs before it must not be added twice."""
    model = make_tiny_model()
    hidden = model.compute_hidden

    def refusing(batch: Batch) -> Tensor:
        out = hidden(batch)
        if batch.layout.num_tokens <= 35:
            return out
        return fail_in_backward(out, torch.OutOfMemoryError(SAID))

    model.compute_hidden = refusing  # type: ignore[method-assign]
    (free, expected), (narrow, actual) = (trained(m) for m in (make_tiny_model(), model))
    assert [warning.step for warning in verdicts(narrow)] == [1]
    for item, other in zip(select_steps(free), select_steps(narrow), strict=True):
        assert item.loss == pytest.approx(other.loss, rel=1e-5)
    assert compute_max_difference(actual, expected) < 1e-4


def test_fault_28_packs_are_halved_as_often_as_it_takes() -> None:
    """The document of 17 tokens is never split, and fits by itself."""
    training = TrainingLoop(
        bounded(make_tiny_model(), 17),
        lambda step: make_tiny_documents((17, 13, 13, 5, step)),
        SETTINGS,
        steps=4,
    )
    events, lengths = list[Event](), [training.pack_length]
    for event in training:
        events.append(event)
        lengths.append(training.pack_length)
    assert lengths[0] > lengths[1] > lengths[2] > 8
    assert len(set(lengths)) == len(verdicts(events)) + 1
    assert [step.step for step in select_steps(events)] == [1, 2, 3, 4]


def test_fault_28_one_document_that_does_not_fit_ends_the_run_with_advice() -> None:
    training = TrainingLoop(
        bounded(make_tiny_model(), 20),
        lambda step: make_tiny_documents((31, 17, 5, step)),
        SETTINGS,
        steps=4,
    )
    with pytest.raises(
        MachineError,
        match=r"each pack holds one document, the longest has 31 tokens\n  fix: lower max",
    ) as e:
        list(training)
    assert e.value.where == "step 1: rows:31.0"
    assert e.value.exit_code == 3
    assert training.step == 0
    assert all(p.grad is None for p in training.parameters.values())


def test_fault_28_the_choice_is_kept_in_checkpoints(tmp_path: Path) -> None:
    documents = lambda step: make_tiny_documents((31, 17, 13, 5, step))  # noqa: E731
    first = TrainingLoop(bounded(make_tiny_model(), 35), documents, SETTINGS, steps=4)
    assert [type(next(first)) for _ in range(3)] == [CheckResult, TrainStep, TrainStep]
    first.save(tmp_path)
    straight = list(first)
    second = TrainingLoop(bounded(make_tiny_model(), 35), documents, SETTINGS, steps=4)
    second.restore(tmp_path)
    assert second.pack_length == 33
    resumed = list(second)
    assert [event.loss for event in select_steps(resumed)] == [
        event.loss for event in select_steps(straight)
    ]
    assert not verdicts(resumed)


def test_fault_28_saving_between_the_error_and_the_second_try_loses_nothing(tmp_path: Path) -> None:
    training = TrainingLoop(
        bounded(make_tiny_model(), 35),
        lambda step: make_tiny_documents((31, 17, 13, 5, step)),
        SETTINGS,
        steps=4,
    )
    assert isinstance(next(training), CheckResult)
    assert not training.model.network.training
    training.save(tmp_path)
    training.restore(tmp_path)
    assert [step.step for step in select_steps(list(training))] == [1, 2, 3, 4]


def test_fault_28_the_rows_of_an_update_that_does_not_fit_are_not_to_blame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The optimizer's own state cannot be had in parts."""
    training = TrainingLoop(
        make_tiny_model(), lambda step: make_tiny_documents((31, step)), SETTINGS, steps=4
    )

    def refusing() -> None:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(training.optimizer, "step", refusing)
    with pytest.raises(OutOfMemory, match="lora_r"):
        next(training)


def test_the_error_of_the_cpu_is_known_too() -> None:
    with pytest.raises(OutOfMemory, match="can't allocate memory"), machine_errors():
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="must match"), machine_errors():
        torch.ones(2) + torch.ones(3)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'",
        "Triton Error [CUDA]: out of memory",
        "CUDA driver error: out of memory",
    ],
)
def test_the_errors_of_cuda_libraries_are_known_too(message: str) -> None:
    with pytest.raises(OutOfMemory, match=r"NCCL|CUDA"), machine_errors():
        raise RuntimeError(message)


def test_freed_blocks_are_returned_before_a_step_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch keeps them in the sizes of the larger packs."""
    calls: list[str] = []
    monkeypatch.setattr(loop, "release_memory", lambda: calls.append("training"))
    monkeypatch.setattr(shared_items, "release_memory", lambda: calls.append("measuring"))
    trained(bounded(make_tiny_model(), 50))
    list(compute_nll(bounded(make_tiny_model(), 31), make_tiny_documents((31, 17, 13)), 90))
    assert calls == ["training", "measuring"]


# ---------------------------------------------------------------- measuring


def test_fault_29_held_out_losses_are_those_of_smaller_packs() -> None:
    documents = [make_tiny_document(length) for length in (31, 17, 13, 5, 2)]
    free, narrow = (
        sorted(compute_nll(bounded(make_tiny_model(), most), documents, 90)) for most in (10**6, 31)
    )
    assert [(location, count) for location, _, count in free] == [
        (location, count) for location, _, count in narrow
    ]
    assert [nats for _, nats, _ in narrow] == pytest.approx([nats for _, nats, _ in free], rel=1e-5)
    with pytest.raises(OutOfMemory):
        list(compute_nll(bounded(make_tiny_model(), 30), documents, 90))


def few_rows(model: PackedCausalLM, most: int) -> tuple[PackedCausalLM, list[int]]:
    """The model on a device with memory for so many rows at once; and the rows of its forwards."""
    extend, seen = model.decode_step, list[int]()

    def refusing(
        rows: Sequence[CacheRow],
        tokens: Sequence[int],
        kv_cache: PagedKVCache,
        run_layers: RunLayers | None,
    ) -> Tensor:
        seen.append(kv_cache.slots)
        if len(tokens) > most:
            raise torch.OutOfMemoryError(SAID)
        return extend(rows, tokens, kv_cache, run_layers)

    model.decode_step = refusing  # type: ignore[method-assign]
    return model, seen


def spell(tokens: Sequence[int]) -> str:
    return "".join(chr(33 + token) for token in tokens)


def test_fault_29_answers_are_those_of_smaller_batches() -> None:
    prompts = [
        tuple(make_tiny_document(length).tokens_L.tolist())
        for length in (3, 17, 9, 1, 17, 12, 5, 30, 2)
    ]
    requests = [
        GenerationRequest(prompt, max_new_tokens=6, temperature=float(i % 2))
        for i, prompt in enumerate(prompts)
    ]
    free = dict(generate(make_tiny_model(), requests, decode=spell, end_ids=()))
    narrow, slots = few_rows(make_tiny_model(), 2)
    assert dict(generate(narrow, requests, decode=spell, end_ids=())) == free
    assert list(dict.fromkeys(slots)) == [9, 4, 2]


def test_fault_29_a_single_row_that_does_not_fit_is_the_machines_fault() -> None:
    narrow, _ = few_rows(make_tiny_model(), 0)
    request = GenerationRequest((5, 6, 7), max_new_tokens=6)
    with pytest.raises(MachineError, match="out of memory: CUDA"):
        list(generate(narrow, [request], decode=spell, end_ids=()))
    with pytest.raises(MachineError, match="out of memory: CUDA"):
        list(stream_answer(narrow, request, decode=spell, end_ids=()))


@pytest.mark.promise
def test_fault_29_what_measuring_cannot_hold_does_not_touch_training(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = PackedCausalLM.compute_hidden

    def refusing(self: PackedCausalLM, batch: Batch) -> Tensor:
        if len(batch.ids) > 1 and batch.ids[0].startswith(("eval", "test", "general")):
            raise torch.OutOfMemoryError(SAID)
        return hidden(self, batch)

    wishes = [
        make_tiny_recipe(tiny_folder, tmp_path / n, **write_eval_files(tmp_path / n), save_steps=2)
        for n in "ab"
    ]
    train(wishes[0])
    monkeypatch.setattr(PackedCausalLM, "compute_hidden", refusing)
    events = train(wishes[1])
    # four texts and three prompts are too few; the folder names another end than answers have
    unwatched = {verdict.kind for verdict in verdicts(events) if verdict.level != "ok"}
    assert unwatched == {"forgetting", "answers unlearned", "EOS is supervised"}
    actual = [read_json(tmp_path / n / "run" / "record.json") for n in "ab"]
    for item, other in zip(*(record["comparisons"] for record in actual), strict=True):
        assert item["after"]["value"] == pytest.approx(other["after"]["value"], rel=1e-5)
    files = [tmp_path / n / "run" / "adapter" / "adapter_model.safetensors" for n in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    position = read_json(tmp_path / "b" / "run" / "checkpoints" / "step-2" / "trainer_state.json")
    assert position["pack_length"] == plan_recipe(wishes[0]).config.pack_length


def test_fault_28_a_whole_run_on_a_small_device(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = PackedCausalLM.compute_hidden

    def refusing(self: PackedCausalLM, batch: Batch) -> Tensor:
        if self.network.training and batch.layout.num_tokens > 60:
            raise torch.OutOfMemoryError(SAID)
        return hidden(self, batch)

    monkeypatch.setattr(PackedCausalLM, "compute_hidden", refusing)
    events = train(make_tiny_recipe(tiny_folder, tmp_path, save_steps=1))
    assert [verdict.step for verdict in verdicts(events) if verdict.kind == "memory"] == [1]
    assert [step.step for step in select_steps(events)] == [1, 2, 3]
    written = (tmp_path / "run" / "events.jsonl").read_text()
    assert "packs of 80 tokens become packs of 40" in written
    assert (
        read_json(tmp_path / "run" / "checkpoints" / "step-2" / "trainer_state.json")["pack_length"]
        == 40
    )


def test_fault_28_on_a_cpu_the_estimate_refuses_before_anything_is_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_recipe(make_tiny_recipe(tiny_folder, tmp_path))
    small = dataclasses.replace(
        plan, machine=dataclasses.replace(plan.machine, available_bytes=10**8)
    )
    monkeypatch.setattr(run, "open_session", lambda *_: pytest.fail("nothing is loaded"))
    with pytest.raises(MachineError, match=r"0\.1 GB are free"):
        next(run.train(small))
    assert not (tmp_path / "run").exists()
