"""The chunked head equals torch's cross-entropy over all logits."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from tunesmith.model import lm_head as head_module
from tunesmith.model.lm_head import (
    LMHead,
    compute_supervised_loss,
    compute_target_losses,
    measure_target_losses,
)

TARGETS, HIDDEN, VOCABULARY = 20, 12, 31
SHAPES = {"plain": (1.0, 0.0), "scaled": (0.3, 0.0), "capped": (1.0, 4.0), "both": (0.3, 2.0)}


def inputs(
    dtype: torch.dtype = torch.float64, targets: int = TARGETS, vocabulary: int = VOCABULARY
) -> tuple[Tensor, ...]:
    """Return hidden states, head weight, targets and weights, some of them zero."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(targets, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.randint(0, 4, (targets,), generator=generator) * 0.5
    return hidden, weight, torch.randint(vocabulary, (targets,), generator=generator), weights


def expected(head: LMHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each target."""
    z = head.scale * F.linear(hidden, head.weight, head.bias)
    return F.cross_entropy(
        head.softcap * torch.tanh(z / head.softcap) if head.softcap else z,
        targets,
        reduction="none",
    )


@pytest.mark.parametrize("chunk", [1, 7, 128, TARGETS])
@pytest.mark.parametrize(("scale", "cap"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_cross_entropy(
    chunk: int, scale: float, cap: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_TARGETS", chunk)
    hidden, weight, targets, weights = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    head = LMHead(
        weight, torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64) if bias else None, scale, cap
    )
    total, losses = compute_supervised_loss(hidden, head, targets, weights)
    each = expected(head, hidden, targets)
    torch.testing.assert_close(losses, each.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        measure_target_losses(hidden, head, targets), each.detach(), rtol=1e-12, atol=1e-12
    )
    grads = torch.autograd.grad(total * 0.7, (hidden, weight))
    truth = torch.autograd.grad((each * weights).sum() * 0.7, (hidden, weight))
    for actual, other in zip(
        (total.detach(), *grads), ((each * weights).sum().detach(), *truth), strict=True
    ):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_TARGETS", 3)
    hidden, weight, targets, weights = inputs(targets=5, vocabulary=7)
    head = LMHead(weight.requires_grad_(), None, 0.6, 3.0)
    assert gradcheck(
        lambda h, _: compute_supervised_loss(h, head, targets, weights)[0],
        (hidden.requires_grad_(), weight),
    )


def test_no_target_is_a_loss_of_zero() -> None:
    hidden, weight, targets, weights = inputs(targets=0)
    head = LMHead(weight.requires_grad_(), None)
    total, losses = compute_supervised_loss(hidden.requires_grad_(), head, targets, weights)
    total.backward()
    assert float(total.detach()) == 0
    assert losses.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_weights_of_zero_leave_no_gradient() -> None:
    hidden, weight, targets, _ = inputs()
    total, losses = compute_supervised_loss(
        hidden.requires_grad_(), LMHead(weight, None), targets, torch.zeros(TARGETS)
    )
    (gradient,) = torch.autograd.grad(total, hidden)
    assert float(total.detach()) == 0
    assert (losses > 0).all()
    assert not gradient.any()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets, weights = inputs()
    compute_supervised_loss(hidden.requires_grad_(), LMHead(weight, None), targets, weights)[
        0
    ].backward()
    assert weight.grad is None


@pytest.mark.parametrize(("scale", "cap"), SHAPES.values(), ids=SHAPES)
def test_in_bf16_it_is_as_near_as_bf16_logits_allow(scale: float, cap: float) -> None:
    """The factor of the backward, 1 / count, is not a bf16 number and must not be rounded to
    one."""
    hidden, weight, targets, weights = inputs(torch.bfloat16, targets=300)
    leaves = hidden.clone().requires_grad_(), weight.float().requires_grad_()
    total, losses = compute_supervised_loss(
        leaves[0], LMHead(leaves[1], None, scale, cap), targets, weights
    )
    wide = hidden.double().requires_grad_(), weight.double().requires_grad_()
    each = expected(LMHead(wide[1], None, scale, cap), wide[0], targets)
    torch.testing.assert_close(losses.double(), each.detach(), rtol=2e-2, atol=2e-2)
    count = 257.5
    grads = torch.autograd.grad(total / count, leaves)
    truth = torch.autograd.grad((each * weights).sum() / count, wide)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    for actual, other in zip(grads, truth, strict=True):
        assert float((actual.double() - other).norm() / other.norm()) < 1e-2
        assert abs(float((actual.double() * other).sum() / other.norm() ** 2) - 1) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_logits_are_wide(dtype: torch.dtype) -> None:
    hidden, weight, *_ = inputs(dtype)
    logits = LMHead(weight, None, 0.5, 3.0).compute_logits(hidden)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = 3.0 * torch.tanh(0.5 * hidden.double() @ weight.double().t() / 3.0)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-2, atol=1e-2)
    assert (logits.abs() < 3).all()


def test_a_nan_is_seen_in_the_loss() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight, targets, weights = inputs(dtype)
        hidden[3, 2], weights[3] = float("nan"), 1.0
        total, losses = compute_supervised_loss(
            hidden.requires_grad_(), LMHead(weight, None), targets, weights
        )
        (gradient,) = torch.autograd.grad(total, hidden)
        assert total.isnan()
        assert losses.isnan().nonzero().flatten().tolist() == [3]
        assert gradient[3].isnan().any(), (
            "its neighbors may have actual too, as the matrix product has it"
        )


def test_one_chunk_of_logits_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of a large vocabulary is half a gigabyte on a GPU."""
    monkeypatch.setattr(head_module, "CHUNK_TARGETS", 7)
    hidden, weight, targets, weights = inputs()
    head = LMHead(weight.requires_grad_(), None)
    earlier: list[weakref.ref[Tensor]] = []
    cross_entropy = head_module.ops.cross_entropy

    def compute(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        assert not any(reference() is not None for reference in earlier)
        losses, dlogits = cross_entropy(logits, *arguments)
        earlier.extend((weakref.ref(logits), weakref.ref(dlogits)))
        return losses, dlogits

    monkeypatch.setattr(head_module.ops, "cross_entropy", compute)
    num_chunks = -(-len(targets) // 7)
    compute_supervised_loss(hidden.requires_grad_(), head, targets, weights)
    measure_target_losses(hidden, head, targets)
    compute_target_losses(hidden, head, targets).sum().backward()
    assert len(earlier) == 2 * 4 * num_chunks
    assert num_chunks > 1
