"""Updates on the way of a backward: the same bytes as updates after it, no gradient kept, and no
step half taken in silence."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tiny_loop import (
    SETTINGS,
    STEPS,
    are_equal,
    copy_weights,
    make_step_documents,
    run_straight_and_resumed,
    select_steps,
)
from tiny_models import make_tiny_model
from tunesmith.core.errors import GateError, MachineError
from tunesmith.core.events import CheckResult, TrainStep
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.train.loop import TrainingLoop

UNCLIPPED = dataclasses.replace(SETTINGS, max_grad_norm=0.0, pack_length=10**6)


def make_training(
    *, in_backward: bool = True, name: str = "llama-64", **changed: object
) -> TrainingLoop:
    settings = dataclasses.replace(UNCLIPPED, step_in_backward=in_backward, **changed)  # type: ignore[arg-type]
    return TrainingLoop(
        make_tiny_model(name, method="full"), make_step_documents, settings, steps=STEPS
    )


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("pack_length", [10**6, 60], ids=["one pack", "several"])
def test_updates_on_the_way_are_those_after_it(optim: str, pack_length: int) -> None:
    """Of a step of several packs, whose gradients are summed up, too."""
    runs = [
        make_training(in_backward=way, optim=optim, pack_length=pack_length)
        for way in (True, False)
    ]
    events = [select_steps(list(run)) for run in runs]
    assert [e.loss for e in events[0]] == [e.loss for e in events[1]]
    assert [e.grad_norm for e in events[0]] == pytest.approx(
        [e.grad_norm for e in events[1]], rel=1e-5
    )
    assert are_equal(copy_weights(runs[0].model), copy_weights(runs[1].model))
    assert not are_equal(
        copy_weights(runs[0].model), copy_weights(make_tiny_model("llama-64", method="full"))
    ), "it has learnt"


def test_no_gradient_is_kept() -> None:
    """When one arrives, those before it are gone."""
    run, held = make_training(), list[int]()
    for parameter in run.parameters.values():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad is not None for p in run.parameters.values()))
        )
    next(run)
    assert len(held) == len(run.parameters)
    assert max(held) == 1


def test_a_resumed_run_is_bitwise_the_straight_one(tmp_path: Path) -> None:
    straight, second = run_straight_and_resumed(make_training, tmp_path)
    assert are_equal(copy_weights(straight.model), copy_weights(second.model))


def test_a_loss_that_is_no_number_updates_nothing() -> None:
    run = make_training()
    next(run)
    remaining, hidden = copy_weights(run.model), PackedCausalLM.compute_hidden
    run.model.compute_hidden = lambda batch: hidden(run.model, batch) * math.nan  # type: ignore[method-assign]
    event = next(run)
    assert isinstance(event, CheckResult)
    assert event.kind == "non-finite"
    assert are_equal(copy_weights(run.model), remaining)
    del run.model.compute_hidden
    assert isinstance(next(run), TrainStep)


def test_a_gradient_that_is_no_number_ends_the_run() -> None:
    """Weights behind it have been updated: the step cannot be left out."""
    run = make_training()
    name = next(iter(run.parameters))
    run.parameters[name].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(GateError, match=rf"step 1: the gradient of {name} is not finite"):
        next(run)
    assert all(bool(p.isfinite().all()) for p in run.parameters.values())


def test_memory_that_runs_out_on_the_way_ends_the_run() -> None:
    run = make_training()
    parameter = next(iter(run.parameters.values()))

    def raise_out_of_memory(_: torch.Tensor) -> Sequence[torch.Tensor]:
        raise torch.OutOfMemoryError("no room")

    parameter.register_hook(raise_out_of_memory)
    with pytest.raises(MachineError, match=r"step 1: .*in the middle of an update"):
        next(run)
