"""Training, measuring and answering on every device: a CPU, and with `-m gpu` a GPU.

On a CPU the numbers are compared with themselves, which shows that the tests run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from plan_configs import make_config
from tiny_loop import (
    SETTINGS,
    STEPS,
    are_equal,
    copy_weights,
    make_step_documents,
    run_straight_and_resumed,
    select_steps,
)
from tiny_models import make_branching_documents, make_tiny_documents, make_tiny_model
from tunesmith.core.types import Document, GenerationRequest
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.model.generation.engine import generate
from tunesmith.session.session import set_deterministic
from tunesmith.train.loop import TrainingLoop

FAMILIES = ("llama", "qwen3", "gemma2", "qwen3_5", "mixtral")


def make_loop(device: str, family: str = "llama", **settings: Any) -> TrainingLoop:
    model = make_tiny_model(family, device=device, **settings)
    return TrainingLoop(model, make_step_documents, SETTINGS, steps=STEPS)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_trains_as_on_a_cpu(device: str, family: str) -> None:
    steps, expected = (select_steps(list(make_loop(d, family))) for d in (device, "cpu"))
    assert len(steps) == STEPS
    for step, other in zip(steps, expected, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=1e-4)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_train_like_fp32(device: str, dtype: torch.dtype) -> None:
    steps, expected = (
        select_steps(list(loop)) for loop in (make_loop(device, dtype=dtype), make_loop("cpu"))
    )
    for step, other in zip(steps, expected, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shared_prefixes_change_no_loss(device: str, dtype: torch.dtype) -> None:
    losses: list[float] = []
    for should_share in (True, False):
        config = make_config(pack_length=400, share_prefixes=should_share)
        loop = TrainingLoop(
            make_tiny_model(dtype=dtype, device=device), _load_branches, config, steps=1
        )
        (step,) = select_steps(list(loop))
        losses.append(step.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 0.02)


def _load_branches(_step: int) -> Sequence[Document]:
    return make_branching_documents()


def test_a_resumed_run_has_the_same_bits_in_deterministic_mode(device: str, tmp_path: Path) -> None:
    set_deterministic(True)
    try:
        straight, resumed = run_straight_and_resumed(lambda: make_loop(device), tmp_path)
    finally:
        set_deterministic(False)
    assert are_equal(copy_weights(straight.model), copy_weights(resumed.model))


def test_likelihoods_and_answers_are_those_of_a_cpu(device: str) -> None:
    results: list[Any] = []
    for name in (device, "cpu"):
        model = make_tiny_model(device=name)
        model.network.eval()
        nll = sorted(compute_nll(model, make_tiny_documents((17, 9, 5)), 90))
        requests = [GenerationRequest((5, 6, token), max_new_tokens=6) for token in range(4)]
        answers = dict(generate(model, requests, decode=str, end_ids=()))
        results.append((nll, answers))
    assert results[0][1] == results[1][1]
    for ours, other in zip(results[0][0], results[1][0], strict=True):
        assert ours == pytest.approx(other, rel=1e-4)


@pytest.mark.gpu
def test_a_step_reads_the_gpu_once() -> None:
    """torch raises at every other wait; the read of loss and norm is `tolist`."""
    loop = make_loop("cuda", dtype=torch.bfloat16)
    next(loop)  # kernels are compiled
    tolist = torch.Tensor.tolist
    reads: list[int] = []

    def read(tensor: torch.Tensor) -> Any:
        if tensor.is_cuda:
            reads.append(tensor.numel())
            torch.cuda.set_sync_debug_mode("default")
        values = tolist(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", read)
        torch.cuda.set_sync_debug_mode("error")
        try:
            next(loop)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert reads == [2]
