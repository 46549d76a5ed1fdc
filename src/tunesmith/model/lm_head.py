"""Cross-entropy of the supervised positions, in chunks: never a [tokens, vocabulary] tensor.

In: hidden states [S, H] of the positions that predict a target, and the head. Out: the loss of each
target [S] and the weighted sum. A frozen head costs two matrix products per chunk (logits, gradient
of the hidden states), both in the forward; the backward only scales. A trained head, or its rows of
new tokens, costs a third. Legend: S targets, H hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.model.kernels import matmul, ops
from tunesmith.model.kernels.matmul import BlockedMatrix
from tunesmith.model.new_embeddings import NewTokenRows

CHUNK_TARGETS = 128  # logits of a chunk: 128 x 49k bf16 = 12.6 MB, inside a common last-level cache
# enough for a GPU to compute longer than it reads the weight; the reference has 14 bytes per logit
TRITON_CHUNK_TARGETS = 2048
MAX_BLOCKED_BYTES = 2**29  # of a second copy of the weight


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = squash(scale * (hidden @ weight.T + bias)), squash(z) = cap * tanh(z / cap) if
    cap > 0."""

    weight: Tensor  # [V, H]
    bias: Tensor | None
    scale: float = 1.0
    softcap: float = 0.0
    # trainable rows of an otherwise frozen weight
    new_rows: NewTokenRows | None = None
    blocks: BlockedMatrix | None = None  # the weight as `block` has found it

    @property
    def trainable_weight(self) -> Tensor:
        """The part of the weight that may be trained: all of it, or the rows of new tokens."""
        return self.weight if self.new_rows is None else self.new_rows.rows_KH

    @property
    def trainable_slice(self) -> slice:
        """The rows of the weight that `trainable_weight` covers."""
        return slice(None) if self.new_rows is None else self.new_rows.span

    def block(self, dtype: torch.dtype) -> LMHead:
        """Return the head with a second copy of its weight, which makes the logits of a few rows in
        half of the time; the same head where matmul.c does not apply, or for a copy of over 512 MB.

        Later changes of the weight are not in the copy."""
        is_small = self.weight.numel() * dtype.itemsize <= MAX_BLOCKED_BYTES
        if not is_small or self.weight.device.type != "cpu":
            return self
        weight = self.weight.detach().to(dtype)
        if not matmul.is_supported(weight):
            return self
        return replace(self, blocks=BlockedMatrix(weight))

    def compute_raw_logits(self, hidden: Tensor) -> Tensor:
        """Return hidden @ weight.T + bias [..., V], in the dtype of the hidden states [..., H]."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        if self.blocks is not None and hidden.dtype == self.blocks.dtype:
            logits = self.blocks.multiply(hidden.reshape(-1, hidden.shape[-1]), bias, None)
            return logits.view(*hidden.shape[:-1], -1)
        return F.linear(hidden, self.weight.to(hidden.dtype), bias)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] in fp32 (fp64 for fp64 hidden states) from [..., H]."""
        accum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        z = self.compute_raw_logits(hidden).to(accum_dtype)
        if self.scale != 1:
            z = z * self.scale
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z


def _iter_loss_chunks(
    hidden: Tensor,
    cast_weight: Tensor,
    head: LMHead,
    targets: Tensor,
    weights: Tensor,
    label_smoothing: float = 0.0,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield, chunk by chunk, its rows, their losses, and the gradient of their logits times
    `weights`. `cast_weight` is the head's weight in the dtype of the hidden states.

    Who reads a gradient deletes its name before the next one, or two are in memory at a time."""
    bias = None if head.bias is None else head.bias.detach().to(hidden.dtype)
    chunk_targets = TRITON_CHUNK_TARGETS if ops.find_triton(hidden) else CHUNK_TARGETS
    for start in range(0, len(hidden), chunk_targets):
        rows = slice(start, start + chunk_targets)
        logits = F.linear(hidden[rows], cast_weight, bias)
        losses, dlogits = ops.cross_entropy(
            logits, targets[rows], weights[rows], head.scale, head.softcap, label_smoothing
        )
        yield rows, losses, dlogits
        del logits, dlogits


class _SupervisedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        trainable_weight: Tensor,
        bias: Tensor | None,
        head: LMHead,
        targets: Tensor,
        weights: Tensor,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        cast_weight = head.weight.detach().to(hidden.dtype)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(trainable_weight) if ctx.needs_input_grad[1] else None
        dbias = None
        if bias is not None and ctx.needs_input_grad[2]:
            dbias = torch.zeros_like(bias)
        losses: list[Tensor] = []
        chunks = _iter_loss_chunks(hidden, cast_weight, head, targets, weights, label_smoothing)
        for rows, chunk_losses, dlogits in chunks:
            losses.append(chunk_losses)
            torch.mm(dlogits, cast_weight, out=dhidden[rows])
            if dweight is not None:
                dchunk = dlogits[:, head.trainable_slice].t() @ hidden[rows]
                dweight += dchunk.to(dweight.dtype)
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=dbias.dtype)
            del dlogits
        losses_S = torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.mark_non_differentiable(losses_S)
        return (losses_S * weights.to(losses_S.dtype)).sum(), losses_S

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dloss, _ = gradients
        dhidden, dweight, dbias = ctx.saved_tensors
        if dweight is not None:
            dweight = dweight.mul(dloss)
        if dbias is not None:
            dbias = dbias.mul(dloss)
        return dhidden.mul(dloss), dweight, dbias, None, None, None, None


def compute_supervised_loss(
    hidden_SH: Tensor,
    head: LMHead,
    targets_S: Tensor,
    weights_S: Tensor,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the sum of weight * loss over the targets (differentiable), and the loss of each
    target [S]."""
    parameters = (head.trainable_weight, head.bias)
    return _SupervisedLoss.apply(
        hidden_SH, *parameters, head, targets_S, weights_S, label_smoothing
    )


class _TargetLosses(torch.autograd.Function):
    """Losses that are differentiable one by one.

    The forward prepares the gradient of the hidden states and the backward scales its rows. A
    trained head is multiplied again in the backward, since its gradient sums over the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        trainable_weight: Tensor,
        bias: Tensor | None,
        head: LMHead,
        targets: Tensor,
    ) -> Tensor:
        dhidden = torch.empty_like(hidden)
        losses = [hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
        cast_weight = head.weight.detach().to(hidden.dtype)
        ones = torch.ones(len(hidden), dtype=torch.float32, device=hidden.device)
        chunks = _iter_loss_chunks(hidden, cast_weight, head, targets, ones)
        for rows, chunk_losses, dlogits in chunks:
            losses.append(chunk_losses)
            torch.mm(dlogits, cast_weight, out=dhidden[rows])
            del dlogits
        ctx.head = head
        saved_hidden = hidden if ctx.needs_input_grad[1] else None
        trained_bias = bias if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(saved_hidden, trainable_weight, trained_bias, targets, dhidden)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, trainable_weight, bias, targets, dhidden = ctx.saved_tensors
        dlosses_S = gradients[0]
        dweight = None
        dbias = None if bias is None else torch.zeros_like(bias)
        if hidden is not None:
            dweight = torch.zeros_like(trainable_weight)
            head: LMHead = ctx.head
            cast_weight = head.weight.detach().to(hidden.dtype)
            weights = dlosses_S.contiguous()
            for rows, _, dlogits in _iter_loss_chunks(hidden, cast_weight, head, targets, weights):
                dchunk = dlogits[:, head.trainable_slice].t() @ hidden[rows]
                dweight += dchunk.to(dweight.dtype)
                if dbias is not None:
                    dbias += dlogits.sum(0, dtype=dbias.dtype)
                del dlogits
        dhidden = dhidden * dlosses_S[:, None].to(dhidden.dtype)
        return dhidden, dweight, dbias, None, None


def compute_target_losses(hidden_SH: Tensor, head: LMHead, targets_S: Tensor) -> Tensor:
    """Return the loss of each target [S], differentiable one by one: for losses that are not a
    weighted sum of them."""
    return _TargetLosses.apply(hidden_SH, head.trainable_weight, head.bias, head, targets_S)


@torch.no_grad()
def measure_target_losses(hidden_SH: Tensor, head: LMHead, targets_S: Tensor) -> Tensor:
    """Return the loss of each target [S] without a gradient."""
    losses = [hidden_SH.new_zeros(0, dtype=torch.float32)]
    ones = torch.ones(len(hidden_SH), dtype=torch.float32, device=hidden_SH.device)
    cast_weight = head.weight.to(hidden_SH.dtype)
    chunks = _iter_loss_chunks(hidden_SH, cast_weight, head, targets_S, ones)
    for _, chunk_losses, dlogits in chunks:
        losses.append(chunk_losses)
        del dlogits
    return torch.cat(losses)
