"""The last step: cross-entropy of supervised positions only, in chunks, never a [tokens,
vocabulary] tensor.

In: hidden states [S, H] of the positions that predict a target, the head's weight. Out: the loss of
each target [S] and the weighted sum. A frozen head costs two matrix products a chunk (logits,
gradient of the hidden states), both in the forward; the backward only scales. Of a trained one, or
of its new rows, there is a third. Legend: S targets, H hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.kernels import ops
from tunesmith.model.new_embeddings import NewTokenRows

CHUNK_TARGETS = 128  # logits of a chunk: 128 x 49k bf16 = 12.6 MB, inside a common last-level cache


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = squash(scale * hidden @ weight.T + bias), squash(z) = cap * tanh(z / cap) where cap
    > 0."""

    weight: Tensor  # [V, H]
    bias: Tensor | None
    scale: float = 1.0
    softcap: float = 0.0
    # rows of the weight that are trained although it is frozen
    new_rows: NewTokenRows | None = None

    @property
    def trainable_weight(self) -> Tensor:
        """What may be trained of the weight: all of it, or the new rows."""
        return self.weight if self.new_rows is None else self.new_rows.rows_KH

    @property
    def trainable_slice(self) -> slice:
        """Which rows of the weight those are."""
        return slice(None) if self.new_rows is None else self.new_rows.span

    def compute_raw_logits(self, hidden: Tensor) -> Tensor:
        """hidden @ weight.T + bias: [..., H] -> [..., V], in the dtype of the hidden states."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] in fp32 (fp64 for fp64 hidden states)."""
        accum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        z = self.compute_raw_logits(hidden).to(accum_dtype) * self.scale
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z


class _SupervisedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        trainable_weight: Tensor,
        head: LMHead,
        targets: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        cast_weight = head.weight.detach().to(hidden.dtype)
        bias = None if head.bias is None else head.bias.detach().to(hidden.dtype)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(trainable_weight) if ctx.needs_input_grad[1] else None
        losses = []
        for start in range(0, len(hidden), CHUNK_TARGETS):
            rows = slice(start, start + CHUNK_TARGETS)
            logits = torch.nn.functional.linear(hidden[rows], cast_weight, bias)
            chunk_losses, dlogits = ops.cross_entropy(
                logits, targets[rows], weights[rows], head.scale, head.softcap
            )
            losses.append(chunk_losses)
            torch.mm(dlogits, cast_weight, out=dhidden[rows])
            if dweight is not None:
                dweight += (dlogits[:, head.trainable_slice].t() @ hidden[rows]).to(dweight.dtype)
        losses_S = torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)
        ctx.save_for_backward(dhidden, dweight)
        ctx.mark_non_differentiable(losses_S)
        return (losses_S * weights.to(losses_S.dtype)).sum(), losses_S

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        dloss, _ = gradients
        dhidden, dweight = ctx.saved_tensors
        return dhidden.mul(dloss), None if dweight is None else dweight.mul(dloss), None, None, None


def compute_supervised_loss(
    hidden_SH: Tensor, head: LMHead, targets_S: Tensor, weights_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of weight * loss over the targets (differentiable), and each target's own loss [S]. A
    trainable bias is not supported; no family that tunesmith accepts has one."""
    return _SupervisedLoss.apply(hidden_SH, head.trainable_weight, head, targets_S, weights_S)


class _TargetLosses(torch.autograd.Function):
    """Each target's loss with a gradient of its own. That of the hidden states is prepared in the
    forward and scaled row by row in the backward; a trained head is multiplied again there, since
    its gradient sums over the rows."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, trainable_weight: Tensor, head: LMHead, targets: Tensor
    ) -> Tensor:
        ctx.head, dhidden = head, torch.empty_like(hidden)
        losses = [hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
        cast_weight = head.weight.detach().to(hidden.dtype)
        for rows, chunk_losses, dlogits in _iter_loss_chunks(
            hidden, cast_weight, head, targets, None
        ):
            losses.append(chunk_losses)
            torch.mm(dlogits, cast_weight, out=dhidden[rows])
        ctx.save_for_backward(
            hidden if ctx.needs_input_grad[1] else None, trainable_weight, targets, dhidden
        )
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, trainable_weight, targets, dhidden = ctx.saved_tensors
        (dlosses_S,) = gradients
        dweight = None
        if hidden is not None:
            dweight = torch.zeros_like(trainable_weight)
            cast_weight = ctx.head.weight.detach().to(hidden.dtype)
            for rows, _, dlogits in _iter_loss_chunks(
                hidden, cast_weight, ctx.head, targets, dlosses_S.contiguous()
            ):
                dweight += (dlogits[:, ctx.head.trainable_slice].t() @ hidden[rows]).to(
                    dweight.dtype
                )
        return dhidden * dlosses_S[:, None].to(dhidden.dtype), dweight, None, None


def _iter_loss_chunks(
    hidden: Tensor, cast_weight: Tensor, head: LMHead, targets: Tensor, weights: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their losses, gradient of their logits times `weights`) in chunks."""
    bias = None if head.bias is None else head.bias.detach().to(hidden.dtype)
    weights = torch.ones(len(hidden), device=hidden.device) if weights is None else weights
    for start in range(0, len(hidden), CHUNK_TARGETS):
        rows = slice(start, start + CHUNK_TARGETS)
        logits = torch.nn.functional.linear(hidden[rows], cast_weight, bias)
        losses, dlogits = ops.cross_entropy(
            logits, targets[rows], weights[rows], head.scale, head.softcap
        )
        yield rows, losses, dlogits


def compute_target_losses(hidden_SH: Tensor, head: LMHead, targets_S: Tensor) -> Tensor:
    """Each target's loss [S], differentiable one by one: for losses that are no weighted sum of
    them."""
    return _TargetLosses.apply(hidden_SH, head.trainable_weight, head, targets_S)


@torch.no_grad()
def measure_target_losses(hidden_SH: Tensor, head: LMHead, targets_S: Tensor) -> Tensor:
    """Each target's loss [S], for measuring: no gradient is prepared."""
    weight = head.weight.to(hidden_SH.dtype)
    bias = None if head.bias is None else head.bias.to(hidden_SH.dtype)
    losses = [hidden_SH.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(hidden_SH), CHUNK_TARGETS):
        rows = slice(start, start + CHUNK_TARGETS)
        logits = torch.nn.functional.linear(hidden_SH[rows], weight, bias)
        ones = torch.ones(len(logits), device=logits.device)
        losses.append(ops.cross_entropy(logits, targets_S[rows], ones, head.scale, head.softcap)[0])
    return torch.cat(losses)
