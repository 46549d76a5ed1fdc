"""The short convolution and the recurrence of Gated DeltaNet and Mamba2 as one node of autograd.

In: what a mixer projects from the hidden states of a pack. Out: what it reads from its state, per
token: silu of the convolution (convolution.py), divided into q, k and v, then the recurrence
(recurrence.py) in fp32 or wider. The forward saves its inputs only; the backward runs both again,
some heads at a time. The torch path here is the reference: bf16 on the CPU runs through C kernels
(model/kernels/scan.py), and the delta rule on a GPU through flash-linear-attention where it is
installed (fla_rule.py). `continue_rows` is for rows of generation. Left out: projections, gates and
norms (gated_delta.py, mamba2.py).

Legend: T tokens, C channels of the convolution, K its taps, G heads of q and k, R heads of v for
each of them, H = G * R, D key size, E value size, B rows of generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.types import PackLayout
from tunesmith.model.kernels import scan as kernels
from tunesmith.model.kernels.scan import ScanHeads
from tunesmith.model.mixers import fla_rule
from tunesmith.model.mixers.convolution import (
    compute_weight_grad,
    continue_convolution,
    convolve,
    convolve_backward,
)
from tunesmith.model.mixers.recurrence import (
    ChunkedLayout,
    cut_chunks,
    find_edges,
    list_taps,
    run_chunks,
    run_chunks_backward,
    step_rows,
)

CHUNK_SIZE = 32
# of what the backward recomputes at once: fewer heads for more tokens
SCAN_BYTES = 2**27
NORM_EPS = 1e-6  # of q and k under the delta rule


@dataclass(frozen=True)
class ScanShape(ScanHeads):
    """The heads of a mixer, and how many of them the torch path computes at once."""

    chunk_size: int = CHUNK_SIZE

    def split_channels(self, x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of q, k [T, G, D] and v [T, G, R, E]."""
        keys = self.num_groups * self.key_size
        values = self.num_heads * self.value_size
        if self.is_delta_rule:
            q, k, v = x_TC.split((keys, keys, values), -1)
        else:
            v, k, q = x_TC.split((values, keys, keys), -1)
        q = q.unflatten(-1, (self.num_groups, self.key_size))
        k = k.unflatten(-1, (self.num_groups, self.key_size))
        return q, k, v.unflatten(-1, (self.num_groups, self.heads_per_group, self.value_size))

    def split_heads(self, x: Tensor) -> Tensor:
        """Return a view [..., G, R] of [..., H]."""
        return x.unflatten(-1, (self.num_groups, self.heads_per_group))

    def count_state_values(self) -> int:
        return self.num_heads * self.key_size * self.value_size

    def count_scan_values(self) -> int:
        """Return the values per token and head that exist at once in the backward: vectors of the
        token, its row in matrices of its chunk, its part of the state before it."""
        vectors = 16 * max(self.key_size, self.value_size)
        return vectors + 6 * self.chunk_size + self.key_size * self.value_size // self.chunk_size

    def iter_pieces(self, num_tokens: int) -> Iterator[tuple[slice, slice]]:
        """Yield slices of G and of R that together hold every head, each small enough for
        SCAN_BYTES."""
        max_heads = max(1, SCAN_BYTES // (4 * self.count_scan_values() * num_tokens))
        max_groups = max(1, max_heads // self.heads_per_group)
        for group in range(0, self.num_groups, max_groups):
            groups = slice(group, group + max_groups)
            for head in range(0, self.heads_per_group, max_heads):
                yield groups, slice(head, head + max_heads)


@dataclass(frozen=True, eq=False)
class ScanInputs:
    """The inputs of a layer's convolution and recurrence, of a pack or of new tokens of rows."""

    mixed_TC: Tensor  # before the convolution
    weight_CK: Tensor
    bias_C: Tensor | None
    decay_TH: Tensor  # g: logarithms, at most 0
    beta_TH: Tensor
    skip_H: Tensor | None  # factor of v that is added to the output


# ---------------------------------------------------------------- some heads


def _run_heads(
    qkv: Sequence[Tensor],
    decay_TGR: Tensor,
    beta_TGR: Tensor,
    skip_GR: Tensor | None,
    chunks: ChunkedLayout,
    is_delta_rule: bool,
) -> Tensor:
    """Return the outputs [T, G, R, E] of some heads, in fp32 or wider."""
    q, k, v = (x.to(decay_TGR.dtype) for x in qkv)
    if is_delta_rule:
        q, k = normalize_qk(q, k)
    out, _ = run_chunks((q, k, v), decay_TGR, beta_TGR, chunks, is_delta_rule)
    return out if skip_GR is None else out + skip_GR[..., None] * v


def normalize_qk(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k of length 1, and q divided by the root of its size."""
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + NORM_EPS) * q.shape[-1] ** -0.5
    return q, k * torch.rsqrt(k.square().sum(-1, keepdim=True) + NORM_EPS)


# ---------------------------------------------------------------- training


class _ConvolutionScan(torch.autograd.Function):
    """silu(convolution), then the recurrence. Saves its inputs."""

    @staticmethod
    def forward(ctx: Any, shape: ScanShape, layout: PackLayout, *operands: Tensor | None) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.shape = shape
        ctx.layout = layout
        inputs = ScanInputs(*operands)  # pyright: ignore[reportArgumentType]
        if kernels.is_supported(inputs.mixed_TC, shape):
            return _run_kernels(inputs, shape, layout)
        return _run_reference(inputs, shape, layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ScanInputs(*ctx.saved_tensors)
        are_weights_trained = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        has_kernels = kernels.is_supported(inputs.mixed_TC, ctx.shape)
        run = _run_kernels_backward if has_kernels else _run_reference_backward
        grads = run(gradients[0], inputs, ctx.shape, ctx.layout, are_weights_trained)
        return None, None, *grads


def _run_kernels(inputs: ScanInputs, shape: ScanShape, layout: PackLayout) -> Tensor:
    active_TC = _make_taps(inputs, layout).convolve(inputs.mixed_TC.contiguous())
    scalars = (inputs.decay_TH.contiguous(), inputs.beta_TH.contiguous(), inputs.skip_H)
    return kernels.run_recurrence(active_TC, *scalars, layout, shape)


def _run_kernels_backward(
    dout_TV: Tensor,
    inputs: ScanInputs,
    shape: ScanShape,
    layout: PackLayout,
    are_weights_trained: bool,
) -> tuple[Tensor | None, ...]:
    taps = _make_taps(inputs, layout)
    mixed_TC = inputs.mixed_TC.contiguous()
    active_TC = taps.convolve(mixed_TC)
    scalars = (inputs.decay_TH.contiguous(), inputs.beta_TH.contiguous(), inputs.skip_H)
    dout_TV = dout_TV.contiguous()
    dactive_TC, ddecay_TH, dbeta_TH = kernels.run_recurrence_backward(
        dout_TV, active_TC, *scalars, layout, shape
    )
    dskip_H = None
    if inputs.skip_H is not None:
        v = shape.split_channels(active_TC)[2].flatten(1, 2)
        dskip_H = (dout_TV.view(v.shape) * v.float()).sum((0, 2))
    dmixed_TC, dweight_KC, dbias_C = taps.backward(
        mixed_TC, dactive_TC, should_add_weights=are_weights_trained
    )
    dweight_CK = None
    if dweight_KC is not None:
        dweight_CK = dweight_KC.flip(0).t().to(inputs.weight_CK.dtype)
    if dbias_C is not None and inputs.bias_C is not None:
        dbias_C = dbias_C.to(inputs.bias_C.dtype)
    return dmixed_TC, dweight_CK, dbias_C, ddecay_TH, dbeta_TH, dskip_H


def _make_taps(inputs: ScanInputs, layout: PackLayout) -> kernels.Taps:
    back_TK = list_taps(layout, inputs.weight_CK.shape[1])
    weight_KC = inputs.weight_CK.float().flip(1).t().contiguous()
    bias_C = None if inputs.bias_C is None else inputs.bias_C.float()
    return kernels.Taps(back_TK, weight_KC, bias_C)


def _run_reference(inputs: ScanInputs, shape: ScanShape, layout: PackLayout) -> Tensor:
    mixed_TC = inputs.mixed_TC
    edges = find_edges(layout, inputs.weight_CK.shape[1], mixed_TC.device)
    convolved_TC = convolve(mixed_TC, inputs.weight_CK, inputs.bias_C, edges)
    active_TC = F.silu(convolved_TC).to(mixed_TC.dtype)
    if fla_rule.is_supported(active_TC, shape):
        return _run_fla(active_TC, inputs.decay_TH, inputs.beta_TH, shape, layout)
    values = (shape.num_groups, shape.heads_per_group, shape.value_size)
    out = active_TC.new_empty(len(mixed_TC), *values)
    for piece in _iter_inputs(shape, layout, active_TC, inputs):
        out[:, *piece.heads] = _run_heads(*piece.tensors, piece.chunks, shape.is_delta_rule)
    return out.flatten(1)


def _run_reference_backward(
    dout_TV: Tensor,
    inputs: ScanInputs,
    shape: ScanShape,
    layout: PackLayout,
    are_weights_trained: bool,
) -> tuple[Tensor | None, ...]:
    mixed_TC = inputs.mixed_TC
    num_taps = inputs.weight_CK.shape[1]
    edges = find_edges(layout, num_taps, mixed_TC.device)
    convolved_TC = convolve(mixed_TC, inputs.weight_CK, inputs.bias_C, edges)
    active_TC = F.silu(convolved_TC).to(mixed_TC.dtype)
    compute = _compute_recurrence_grads
    if fla_rule.is_supported(active_TC, shape):
        compute = _compute_fla_grads
    dactive_TC, ddecay_TH, dbeta_TH, dskip_H = compute(dout_TV, active_TC, inputs, shape, layout)
    dconvolved_TC = torch.ops.aten.silu_backward(dactive_TC.to(convolved_TC.dtype), convolved_TC)
    dmixed_TC = convolve_backward(dconvolved_TC, inputs.weight_CK, edges).to(mixed_TC.dtype)
    dweight_CK = None
    dbias_C = None
    if are_weights_trained:
        dweight_CK = compute_weight_grad(dconvolved_TC, mixed_TC, num_taps, edges)
        dweight_CK = dweight_CK.to(inputs.weight_CK.dtype)
        if inputs.bias_C is not None:
            dbias_C = dconvolved_TC.sum(0).to(inputs.bias_C.dtype)
    return dmixed_TC, dweight_CK, dbias_C, ddecay_TH, dbeta_TH, dskip_H


Grads = tuple[Tensor, Tensor, Tensor, Tensor | None]  # of the active inputs, decay, beta, skip


def _compute_recurrence_grads(
    dout_TV: Tensor, active_TC: Tensor, inputs: ScanInputs, shape: ScanShape, layout: PackLayout
) -> Grads:
    dout = dout_TV.unflatten(-1, (shape.num_groups, shape.heads_per_group, -1))
    dactive_TC = torch.zeros_like(active_TC, dtype=inputs.decay_TH.dtype)
    dq, dk, dv = shape.split_channels(dactive_TC)
    ddecay_TH = torch.empty_like(inputs.decay_TH)
    dbeta_TH = torch.empty_like(inputs.beta_TH)
    dskip_H = None if inputs.skip_H is None else torch.empty_like(inputs.skip_H)
    for piece in _iter_inputs(shape, layout, active_TC, inputs):
        groups = piece.heads[0]
        grads = piece.compute_grads(dout, shape.is_delta_rule)
        dq[:, groups] += grads[0]
        dk[:, groups] += grads[1]
        dv[:, *piece.heads] = grads[2]
        shape.split_heads(ddecay_TH)[:, *piece.heads] = grads[3]
        shape.split_heads(dbeta_TH)[:, *piece.heads] = grads[4]
        if dskip_H is not None:
            shape.split_heads(dskip_H)[piece.heads] = grads[5]
    return dactive_TC, ddecay_TH, dbeta_TH, dskip_H


def _run_fla(
    active_TC: Tensor, decay_TH: Tensor, beta_TH: Tensor, shape: ScanShape, layout: PackLayout
) -> Tensor:
    scalars = (shape.split_heads(decay_TH), shape.split_heads(beta_TH))
    return fla_rule.run_delta_rule(shape.split_channels(active_TC), *scalars, layout).flatten(1)


def _compute_fla_grads(
    dout_TV: Tensor, active_TC: Tensor, inputs: ScanInputs, shape: ScanShape, layout: PackLayout
) -> Grads:
    leaves = (active_TC.detach(), inputs.decay_TH.detach(), inputs.beta_TH.detach())
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        out = _run_fla(*leaves, shape, layout)
    dactive_TC, ddecay_TH, dbeta_TH = torch.autograd.grad(out, leaves, dout_TV)
    return dactive_TC, ddecay_TH, dbeta_TH, None


@dataclass(frozen=True, eq=False)
class _Piece:
    """The inputs of some heads."""

    heads: tuple[slice, slice]  # of G and R
    tensors: tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor | None]
    chunks: ChunkedLayout

    def compute_grads(self, dout_TGRE: Tensor, is_delta_rule: bool) -> tuple[Tensor, ...]:
        """Run the recurrence again, and return the gradients of q, k, v, decay, beta and, if there
        is one, of skip."""
        qkv, decay, beta, skip = self.tensors
        dout = dout_TGRE[:, *self.heads].to(decay.dtype)
        q, k, v = (x.detach().to(decay.dtype) for x in qkv)
        normed = (q, k)
        if is_delta_rule:
            with torch.enable_grad():
                q.requires_grad_()
                k.requires_grad_()
                normed = normalize_qk(q, k)
        inputs = (normed[0].detach(), normed[1].detach(), v)
        dq, dk, dv, ddecay, dbeta = run_chunks_backward(
            dout, inputs, decay, beta, self.chunks, is_delta_rule
        )
        if is_delta_rule:
            dq, dk = torch.autograd.grad(normed, (q, k), (dq, dk))
        if skip is None:
            return dq, dk, dv, ddecay, dbeta
        dskip = (dout * v).sum((0, 3))
        return dq, dk, dv + skip[..., None] * dout, ddecay, dbeta, dskip


def _iter_inputs(
    shape: ScanShape, layout: PackLayout, active_TC: Tensor, inputs: ScanInputs
) -> Iterator[_Piece]:
    chunks = cut_chunks(layout, shape.chunk_size, active_TC.device)
    q, k, v = shape.split_channels(active_TC)
    decay_TGR = shape.split_heads(inputs.decay_TH)
    beta_TGR = shape.split_heads(inputs.beta_TH)
    for heads in shape.iter_pieces(len(active_TC)):
        groups = heads[0]
        skip = None if inputs.skip_H is None else shape.split_heads(inputs.skip_H)[heads]
        qkv = (q[:, groups], k[:, groups], v[:, *heads])
        yield _Piece(heads, (qkv, decay_TGR[:, *heads], beta_TGR[:, *heads], skip), chunks)


def scan_pack(inputs: ScanInputs, shape: ScanShape, layout: PackLayout) -> Tensor:
    """Return silu(convolution) and the recurrence of a pack, [T, H * E] in the dtype of `mixed`,
    differentiable."""
    assert layout.num_tokens == len(inputs.mixed_TC), "the layout is of another pack"
    return _ConvolutionScan.apply(
        shape,
        layout,
        *(inputs.mixed_TC, inputs.weight_CK, inputs.bias_C),
        *(inputs.decay_TH, inputs.beta_TH, inputs.skip_H),
    )


# ---------------------------------------------------------------- generation

States = tuple[Tensor, ...]  # last inputs of the convolution [B, K - 1, C], S [B, G, D, R * E]


@torch.no_grad()
def continue_rows(
    inputs: ScanInputs, shape: ScanShape, layout: PackLayout, states: States | None
) -> tuple[Tensor, States]:
    """Return the outputs [T, H * E] for new tokens of B rows, and the states after them.

    Segment b of `layout` has the new tokens of row b, which continue its `states`; None: the rows
    start here. One token per row updates S in place."""
    history, state = states or (None, None)
    mixed_TC = inputs.mixed_TC
    convolved_TC, history = continue_convolution(
        mixed_TC, inputs.weight_CK, inputs.bias_C, layout, history
    )
    active_TC = F.silu(convolved_TC).to(mixed_TC.dtype)
    decay_TGR = shape.split_heads(inputs.decay_TH)
    beta_TGR = shape.split_heads(inputs.beta_TH)
    q, k, v = (x.to(decay_TGR.dtype) for x in shape.split_channels(active_TC))
    if shape.is_delta_rule:
        q, k = normalize_qk(q, k)
    if state is not None and len(mixed_TC) == len(layout.lengths):
        out = step_rows((q, k, v), decay_TGR, beta_TGR, state, shape.is_delta_rule)
    else:
        chunks = cut_chunks(layout, shape.chunk_size, mixed_TC.device)
        out, wave_states = run_chunks(
            (q, k, v), decay_TGR, beta_TGR, chunks, shape.is_delta_rule, state
        )
        state = torch.cat(wave_states).index_select(0, chunks.last_chunks_S)
    if inputs.skip_H is not None:
        out = out + shape.split_heads(inputs.skip_H)[..., None] * v
    return out.to(mixed_TC.dtype).flatten(1), (history, state)
