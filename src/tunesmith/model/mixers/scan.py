"""The recurrence of Gated DeltaNet and Mamba2 along every path of a pack, in chunks.

    S_t = exp(g_t) S_(t-1) + k_t u_t        o_t = q_t S_t
    u_t = beta_t (v_t - exp(g_t) k_t S_(t-1))   delta rule (Gated DeltaNet)
    u_t = beta_t v_t                            otherwise (Mamba2)

In: the inputs of the convolution before it, decays and strengths of a pack. Out: what the mixer
reads from its state, per token. A segment starts with the state at the end of its parent, a root
with zeros. Inside a chunk the recurrence is a product of triangular matrices; from chunk to chunk
it runs in waves (chunks.py). Sums are fp32 or wider.

The forward saves its inputs only; the backward runs convolution and recurrence again, some heads at
a time. Left out: projections, gates and norms (gated_delta.py, mamba2.py).

Source: Yang et al., Gated Delta Networks, arXiv 2412.06464, section 3.3; Dao and Gu, Mamba2, arXiv
2405.21060, section 6. Legend: T tokens, C channels of the convolution, K its taps, G heads of q and
k, R heads of v for each of them, D key size, E value size, N chunks, L tokens of a chunk, B rows of
generation, S segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.types import PackLayout
from tunesmith.model.mixers.chunks import ChunkedLayout, cut_chunks, find_edges
from tunesmith.model.mixers.convolution import (
    compute_weight_grad,
    continue_convolution,
    convolve,
    convolve_backward,
)

CHUNK_SIZE = 32
# of what the backward recomputes at once: fewer heads for more tokens
SCAN_BYTES = 2**27
NORM_EPS = 1e-6  # of q and k under the delta rule


@dataclass(frozen=True)
class ScanShape:
    """The heads of a mixer, and how its convolved channels are divided among them."""

    num_groups: int  # G
    heads_per_group: int  # R
    key_size: int  # D
    value_size: int  # E
    # q, k, v with q and k normalized, or v, k, q
    is_delta_rule: bool
    chunk_size: int = CHUNK_SIZE

    @property
    def num_heads(self) -> int:
        return self.num_groups * self.heads_per_group

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

    def iter_pieces(self, num_tokens: int) -> Iterator[tuple[slice, slice]]:
        """Yield slices of G and of R that together hold every head, each small enough for
        SCAN_BYTES."""
        values_per_head = 5 * self.chunk_size + 17 * max(self.key_size, self.value_size)
        max_heads = max(1, SCAN_BYTES // (4 * values_per_head * num_tokens))
        max_groups = max(1, max_heads // self.heads_per_group)
        for group in range(0, self.num_groups, max_groups):
            groups = slice(group, group + max_groups)
            for head in range(0, self.heads_per_group, max_heads):
                yield groups, slice(head, head + max_heads)


@dataclass(frozen=True, eq=False)
class ScanInputs:
    """What a layer's recurrence reads."""

    mixed_TC: Tensor  # before the convolution
    weight_CK: Tensor
    bias_C: Tensor | None
    decay_TH: Tensor  # g: logarithms, at most 0
    beta_TH: Tensor
    skip_H: Tensor | None  # factor of v that is added to the output


# ---------------------------------------------------------------- the recurrence


def run_chunks(
    qkv: tuple[Tensor, Tensor, Tensor],
    decay_TGR: Tensor,
    beta_TGR: Tensor,
    chunks: ChunkedLayout,
    is_delta_rule: bool,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs [T, G, R, E] and the states [n, G, D, R * E] at the ends of the n chunks
    of each wave.

    q, k [T, G, D] and v [T, G, R, E] are fp32 or wider. `initial_state` [S, G, D, R * E] is where
    the roots start; zeros by default."""
    q, k = (chunks.split(x).transpose(1, 2) for x in qkv[:2])  # N G L D
    v = chunks.split(qkv[2]).permute(0, 2, 3, 1, 4)  # N G R L E
    decay, beta = (chunks.split(x).permute(0, 2, 3, 1) for x in (decay_TGR, beta_TGR))  # N G R L
    log_decay = decay.cumsum(-1)
    since_start = log_decay.exp()
    until_end = (log_decay[..., -1:] - log_decay).exp()
    scores, solution = _compare_tokens(q, k, log_decay, beta if is_delta_rule else None)
    updates = beta[..., None] * v if solution is None else (solution * beta[..., None, :]) @ v
    from_state = None
    if solution is not None:
        from_state = solution * (beta * since_start)[..., None, :]
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    for wave in chunks.waves:
        here = wave.chunks
        u = updates[here]
        before = None
        if wave.previous is not None:
            before = states[-1].index_select(0, wave.previous)
        elif initial_state is not None:
            before = initial_state.index_select(0, chunks.roots)
        if before is not None and from_state is not None:
            u = u - from_state[here] @ _split_values(k[here] @ before, u)
        out = scores[here] @ u
        added = k[here].transpose(-1, -2) @ _join_values(u * until_end[here, ..., None])
        if before is None:
            states.append(added)
        else:
            read = _split_values(q[here] @ before, u)
            out = out + read * since_start[here, ..., None]
            remaining = since_start[here, :, None, :, -1:]  # n G 1 R 1
            faded = (before.unflatten(-1, v.shape[2::2]) * remaining).flatten(-2)
            states.append(faded + added)
        outputs.append(out)
    return chunks.join(torch.cat(outputs).permute(0, 3, 1, 2, 4)), states


def _compare_tokens(
    q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return how much each token of a chunk reads from the update of each earlier one
    [N, G, R, L, L], and with `beta` the inverse of the system that the delta rule solves: the
    update of a token depends on those of the tokens before it."""
    chunk_size = q.shape[2]
    ones = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device)
    difference = log_decay[..., :, None] - log_decay[..., None, :]
    fading = difference.masked_fill(ones.triu(1), float("-inf")).exp()
    scores = (q @ k.transpose(-1, -2))[:, :, None] * fading
    if beta is None:
        return scores, None
    system = (k @ k.transpose(-1, -2))[:, :, None] * fading * beta[..., None]
    identity = torch.eye(chunk_size, dtype=q.dtype, device=q.device)
    # reads below the diagonal only
    solution = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
    return scores, solution


def _split_values(x: Tensor, like: Tensor) -> Tensor:
    """Turn [n, G, L, R * E] into [n, G, R, L, E], the shape of `like`."""
    return x.unflatten(-1, like.shape[2::2]).transpose(2, 3)


def _join_values(x: Tensor) -> Tensor:
    """Turn [n, G, R, L, E] into [n, G, L, R * E]."""
    return x.transpose(2, 3).flatten(-2)


def _run_heads(
    qkv: Sequence[Tensor],
    decay_TGR: Tensor,
    beta_TGR: Tensor,
    skip_GR: Tensor | None,
    chunks: ChunkedLayout,
    is_delta_rule: bool,
) -> Tensor:
    """Return the outputs [T, G, R, E] of some heads, in fp32 or wider; differentiable."""
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
        mixed_TC = inputs.mixed_TC
        edges = find_edges(layout, inputs.weight_CK.shape[1], mixed_TC.device)
        convolved_TC = convolve(mixed_TC, inputs.weight_CK, inputs.bias_C, edges)
        active_TC = F.silu(convolved_TC).to(mixed_TC.dtype)
        values = (shape.num_groups, shape.heads_per_group, shape.value_size)
        out = active_TC.new_empty(len(mixed_TC), *values)
        for piece in _iter_inputs(shape, layout, active_TC, inputs):
            out[:, *piece.heads] = _run_heads(*piece.tensors, piece.chunks, shape.is_delta_rule)
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        shape: ScanShape = ctx.shape
        layout: PackLayout = ctx.layout
        inputs = ScanInputs(*ctx.saved_tensors)
        mixed_TC = inputs.mixed_TC
        edges = find_edges(layout, inputs.weight_CK.shape[1], mixed_TC.device)
        convolved_TC = convolve(mixed_TC, inputs.weight_CK, inputs.bias_C, edges)
        active_TC = F.silu(convolved_TC).to(mixed_TC.dtype)
        dout = gradients[0].unflatten(-1, (shape.num_groups, shape.heads_per_group, -1))
        dactive_TC = torch.zeros_like(convolved_TC)
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
        sigmoid_TC = convolved_TC.sigmoid()
        dsilu_TC = sigmoid_TC * (1 + convolved_TC * (1 - sigmoid_TC))
        dconvolved_TC = dactive_TC.mul_(dsilu_TC)
        dmixed_TC = convolve_backward(dconvolved_TC, inputs.weight_CK, edges).to(mixed_TC.dtype)
        dweight_CK = None
        if ctx.needs_input_grad[3]:
            num_taps = inputs.weight_CK.shape[1]
            dweight_CK = compute_weight_grad(dconvolved_TC, mixed_TC, num_taps, edges)
            dweight_CK = dweight_CK.to(inputs.weight_CK.dtype)
        dbias_C = None
        if inputs.bias_C is not None and ctx.needs_input_grad[4]:
            dbias_C = dconvolved_TC.sum(0).to(inputs.bias_C.dtype)
        return None, None, dmixed_TC, dweight_CK, dbias_C, ddecay_TH, dbeta_TH, dskip_H


@dataclass(frozen=True, eq=False)
class _Piece:
    """The inputs of some heads."""

    heads: tuple[slice, slice]  # of G and R
    tensors: tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor | None]
    chunks: ChunkedLayout

    def compute_grads(self, dout_TGRE: Tensor, is_delta_rule: bool) -> tuple[Tensor, ...]:
        """Run the recurrence again, and return the gradients of q, k, v, decay, beta and skip."""
        qkv, decay, beta, skip = self.tensors
        wide = [x.to(decay.dtype) for x in qkv]  # so that gradients are not rounded, either
        leaves = [x.detach().requires_grad_() for x in (*wide, decay, beta)]
        if skip is not None:
            skip = skip.detach().requires_grad_()
            leaves.append(skip)
        with torch.enable_grad():
            out = _run_heads(leaves[:3], leaves[3], leaves[4], skip, self.chunks, is_delta_rule)
        return torch.autograd.grad(out, leaves, dout_TGRE[:, *self.heads].to(out.dtype))


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
        out = _step_rows((q, k, v), decay_TGR, beta_TGR, state, shape.is_delta_rule)
    else:
        chunks = cut_chunks(layout, shape.chunk_size, mixed_TC.device)
        out, wave_states = run_chunks(
            (q, k, v), decay_TGR, beta_TGR, chunks, shape.is_delta_rule, state
        )
        state = torch.cat(wave_states).index_select(0, chunks.last_chunks_S)
    if inputs.skip_H is not None:
        out = out + shape.split_heads(inputs.skip_H)[..., None] * v
    return out.to(mixed_TC.dtype).flatten(1), (history, state)


def _step_rows(
    qkv: tuple[Tensor, Tensor, Tensor],
    decay_BGR: Tensor,
    beta_BGR: Tensor,
    state: Tensor,
    is_delta_rule: bool,
) -> Tensor:
    """Apply the recurrence to one token per row; returns [B, G, R, E] and updates the state."""
    q, k, v = qkv
    state.unflatten(-1, v.shape[2:]).mul_(decay_BGR.exp()[:, :, None, :, None])
    if is_delta_rule:
        v = v - (k[:, :, None] @ state).view(v.shape)
    update = (beta_BGR[..., None] * v).flatten(-2)
    state.add_(k[..., None] * update[:, :, None])
    return (q[:, :, None] @ state).view(v.shape)
