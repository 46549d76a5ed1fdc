"""Attention over a Layout: `attend(q, k, v, layout)`, one signature, several backends, one
reference.

A token attends to the earlier tokens of its own segment, itself included, and to the segments that
this one continues, at most `window` back. Nothing else is seen, whatever the backend; tests hold
each to `reference`. Left out: what generation stores (cache.py). Legend: T tokens, N query heads, K
key/value heads, D head size, L tokens of a segment, B segments of one length, P of a segment and
all that it continues."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.errors import InputError
from tunesmith.core.types import PackLayout
from tunesmith.model.kernels import ops
from tunesmith.model.oom import OutOfMemory

if TYPE_CHECKING:
    from tunesmith.model.kv_cache import RaggedKVCache


@dataclass(frozen=True)
class AttentionConfig:
    """How a layer scores: the factor before the softmax, the tokens it looks back (None: all), the
    logit cap (None)."""

    scale: float
    window: int | None = None
    softcap: float | None = None


CosSin = tuple[Tensor, Tensor]  # cosine and sine [T, D/2] of the rotary embedding, fp32 or wider


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackLayout,
    config: AttentionConfig,
    backend: str = "auto",
    cos_sin: CosSin | None = None,
) -> Tensor:
    """q [T, N, D], k and v [T, K, D] -> [T, N, D] in the dtype of q. `angles`: q and k are still to
    be turned."""
    assert layout.num_tokens == len(q), f"the layout has {layout.num_tokens} tokens, q has {len(q)}"
    name = choose_backend(backend, q)
    if name == "kernel":
        return cpu_kernel_attention(q, k, v, layout, config, cos_sin)
    return BACKENDS[name](*apply_rotary_qk(q, k, cos_sin), v, layout, config)


def apply_rotary_qk(q: Tensor, k: Tensor, cos_sin: CosSin | None) -> tuple[Tensor, Tensor]:
    return (
        (q, k)
        if cos_sin is None
        else (ops.apply_rotary(q, *cos_sin), ops.apply_rotary(k, *cos_sin))
    )


def choose_backend(backend: str, q: Tensor) -> str:
    if backend != "auto":
        return backend
    if q.device.type == "cpu":
        return "kernel"
    return (
        "varlen" if _import_varlen_attn() and q.dtype in (torch.bfloat16, torch.float16) else "mask"
    )


# ---------------------------------------------------------------- reference


def build_causal_mask(
    length: int, window: int | None, device: torch.device, prefix_length: int = 0
) -> Tensor:
    """Boolean [L, P]: may the row's token see the column's? The columns start `before` tokens ahead
    of the rows."""
    key_positions = torch.arange(prefix_length + length, device=device)
    distance = key_positions[prefix_length:, None] - key_positions
    return (distance >= 0) & (distance < (window or prefix_length + length + 1))


def gather_context(x: Tensor, layout: PackLayout, segment: int) -> Tensor:
    """Rows of x [P, ...] of all that a segment sees: what it continues, from the root on, and
    itself last."""
    pieces = [
        x[layout.starts[i] : layout.starts[i] + layout.lengths[i]] for i in layout.get_path(segment)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _attend_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, config: AttentionConfig) -> Tensor:
    """Plain attention of [.., N, L, D] queries; scores and softmax in fp32 or wider."""
    accum_dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(groups, dim=-3), v.repeat_interleave(groups, dim=-3)
    scores = q.to(accum_dtype) @ k.to(accum_dtype).transpose(-1, -2) * config.scale
    if config.softcap:
        scores = config.softcap * torch.tanh(scores / config.softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ v.to(accum_dtype)).to(q.dtype)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, config: AttentionConfig
) -> Tensor:
    """One segment after the other, scores written out."""
    outputs = []
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        q_NLD = q[start : start + length].transpose(0, 1)
        k_KPD, v_KPD = (gather_context(x, layout, segment).transpose(0, 1) for x in (k, v))
        mask = build_causal_mask(
            length, config.window, q.device, layout.count_prefix_tokens(segment)
        )
        outputs.append(_attend_eager(q_NLD, k_KPD, v_KPD, mask, config).transpose(0, 1))
    return torch.cat(outputs)


# ---------------------------------------------------------------- CPU: one causal call for all documents of a length


def _iter_equal_lengths(layout: PackLayout) -> Iterator[tuple[int, int]]:
    """(count, length) of neighbouring segments of equal length."""
    for length, group in itertools.groupby(layout.lengths):
        yield len(list(group)), length


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, config: AttentionConfig
) -> Tensor:
    """torch's fused causal attention, per document: no T x T mask, so the work is the sum of the
    L^2 / 2. In fp32 for bf16 inputs: on the CPU that is faster for short documents, and more
    precise."""
    accum_dtype = torch.promote_types(q.dtype, torch.float32)
    q_wide, k_wide, v_wide = (x.to(accum_dtype) for x in (q, k, v))
    outputs = []
    if layout.parents:
        for segment, piece in enumerate(q_wide.split(layout.lengths)):
            keys, values = (gather_context(x, layout, segment) for x in (k_wide, v_wide))
            outputs.append(_attend_sdpa(piece[None], keys[None], values[None], config))
        return torch.cat(outputs).to(q.dtype)
    runs = list(_iter_equal_lengths(layout))
    sizes = [count * length for count, length in runs]
    pieces = zip(*(x.split(sizes) for x in (q_wide, k_wide, v_wide)), strict=True)
    for run, piece in zip(runs, pieces, strict=True):
        q_BLND, k_BLKD, v_BLKD = (x.unflatten(0, run) for x in piece)
        outputs.append(_attend_sdpa(q_BLND, k_BLKD, v_BLKD, config))
    return torch.cat(outputs).to(q.dtype)


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig) -> Tensor:
    """q [B, L, N, D] are the last queries of keys and values [B, P, K, D] -> [B * L, N, D]."""
    q_BNLD, k_BKPD, v_BKPD = (x.transpose(1, 2) for x in (q, k, v))
    length, prefix_length = q.shape[1], k.shape[1] - q.shape[1]
    if config.softcap:
        out = _attend_eager(
            q_BNLD,
            k_BKPD,
            v_BKPD,
            build_causal_mask(length, config.window, q.device, prefix_length),
            config,
        )
    elif prefix_length or (config.window is not None and config.window < length):
        mask = build_causal_mask(length, config.window, q.device, prefix_length)
        out = F.scaled_dot_product_attention(
            q_BNLD, k_BKPD, v_BKPD, attn_mask=mask, scale=config.scale, enable_gqa=True
        )
    else:
        out = F.scaled_dot_product_attention(
            q_BNLD, k_BKPD, v_BKPD, is_causal=True, scale=config.scale, enable_gqa=True
        )
    return out.transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------- CPU with bf16 products: attention.c


class _AttentionFunction(torch.autograd.Function):
    """Saves q, k, v, the output and one number a row; scores are computed again in the backward. q
    and k are turned by the angles when they are read, and their gradients back when they are
    written."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: PackLayout,
        config: AttentionConfig,
        cos_sin: CosSin | None,
    ) -> Tensor:
        q, k, v, null = (
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            q.new_empty(0),
        )  # nothing: NULL in C
        out, logsumexp = torch.empty_like(q), torch.empty(q.shape[:2])
        inputs, aux_inputs = (
            (q, k, v, out, logsumexp),
            (*(cos_sin or (null, null)), *_build_segment_tensors(layout)),
        )
        ctx.shape = (
            len(layout.lengths),
            q.shape[1],
            k.shape[1],
            q.shape[2],
            config.window or 0,
            config.scale,
        )
        _call_attention("attention", *inputs, null, null, null, null, *aux_inputs, *ctx.shape)
        ctx.save_for_backward(*inputs, *aux_inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        saved = ctx.saved_tensors  # once: a layer that runs again gives them once
        inputs, aux_inputs = saved[:5], saved[5:]
        dq, dk, dv = (torch.empty_like(x) for x in inputs[:3])
        _call_attention(
            "attention", *inputs, gradients[0].contiguous(), dq, dk, dv, *aux_inputs, *ctx.shape
        )
        return dq, dk, dv, None, None, None


def _build_segment_tensors(
    layout: PackLayout, num_prefixes: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Starts, lengths and parents for the kernel, most work first: then the threads end together.
    The first `given` segments come last, where a kernel that is told of fewer finds them as parents
    only."""
    work = [
        length * (length + 2 * layout.count_prefix_tokens(i))
        for i, length in enumerate(layout.lengths)
    ]
    order = sorted(range(len(work)), key=lambda i: (i < num_prefixes, -work[i]))
    starts, lengths = (torch.tensor([x[i] for i in order]) for x in (layout.starts, layout.lengths))
    if not layout.parents:
        return starts, lengths, torch.empty(0)
    rank_by_segment = {-1: -1} | {i: rank for rank, i in enumerate(order)}
    return starts, lengths, torch.tensor([rank_by_segment[layout.parents[i]] for i in order])


def _call_attention(name: str, *arguments: Tensor | int | float) -> None:
    if ops.call_kernel(name, *arguments):
        raise OutOfMemory(
            "no memory for the attention's scratch space", fix="lower pack_length, or free memory"
        )


def has_kernel(q: Tensor, config: AttentionConfig) -> bool:
    """Can attention.c and rows.c do it? Not other dtypes and processors, odd head sizes, soft
    caps."""
    is_supported = ops.is_supported(q) and ops.has_attention() and q.shape[-1] % 64 == 0
    return is_supported and not config.softcap and config.scale > 0


def cpu_kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackLayout,
    config: AttentionConfig,
    cos_sin: CosSin | None = None,
) -> Tensor:
    """Our own kernel: bf16 products, only the keys that a query sees. What it cannot do takes
    `documents`."""
    if has_kernel(q, config):
        return _AttentionFunction.apply(q, k, v, layout, config, cos_sin)
    return sdpa_attention(*apply_rotary_qk(q, k, cos_sin), v, layout, config)


def run_prefix_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_kv: tuple[Tensor, Tensor],
    layout: PackLayout,
    config: AttentionConfig,
) -> Tensor:
    """Documents that all go on after tokens of which only keys and values [P, K, D] are `given`. No
    autograd."""
    prefix_length, null = len(prefix_kv[0]), q.new_empty(0)
    count = len(layout.lengths)
    starts = (0, *(prefix_length + start for start in layout.starts))
    full_layout = PackLayout(starts, (prefix_length, *layout.lengths), (-1, *(0,) * count))
    q, k, v = (
        torch.cat((q.new_empty(prefix_length, *q.shape[1:]), q)),
        torch.cat((prefix_kv[0], k)),
        torch.cat((prefix_kv[1], v)),
    )
    out, logsumexp = torch.empty_like(q), torch.empty(q.shape[:2])
    shape = (count, q.shape[1], k.shape[1], q.shape[2], config.window or 0, config.scale)
    _call_attention(
        "attention",
        q,
        k,
        v,
        out,
        logsumexp,
        *(null,) * 6,
        *_build_segment_tensors(full_layout, num_prefixes=1),
        *shape,
    )
    return out[prefix_length:]


def run_decode_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_buffers: tuple[Tensor, Tensor],
    positions_B: Tensor,
    prefix_length: int,
    config: AttentionConfig,
    cos_sin: CosSin | None,
) -> Tensor:
    """One more token a row: k and v [B, K, D] are put at `places_B` into the stores [slots, K,
    capacity, D], and q [B, N, D] meets all that is there of its row. What stands before `shared` is
    the same in all rows. No autograd."""
    q, k, v, null = q.contiguous(), k.contiguous(), v.contiguous(), q.new_empty(0)
    out = torch.empty_like(q)
    sizes = (
        *q.shape[:2],
        k.shape[1],
        q.shape[2],
        kv_buffers[0].shape[2],
        prefix_length,
        config.window or 0,
        config.scale,
    )
    _call_attention(
        "attend_rows", q, k, v, *kv_buffers, out, *(cos_sin or (null, null)), positions_B, *sizes
    )
    return out


# ---------------------------------------------------------------- CUDA


def _import_varlen_attn():
    """torch's variable-length flash attention, where this torch has it (2.10 and later)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, config: AttentionConfig
) -> Tensor:
    """One fused call for the whole pack. Soft-capped layers have no such kernel and take the mask.
    Shared keys are gathered for each segment; the last query of a segment sees its last key."""
    varlen_attn = _import_varlen_attn()
    if config.softcap or varlen_attn is None:
        return dense_mask_attention(q, k, v, layout, config)
    cu_seqlens_q = cu_seqlens_k = _compute_cu_seqlens(layout.lengths).to(
        q.device, non_blocking=True
    )
    max_seqlen_q = max_seqlen_k = max(layout.lengths)
    if layout.parents:
        key_lengths = [
            layout.count_prefix_tokens(i) + length for i, length in enumerate(layout.lengths)
        ]
        cu_seqlens_k, max_seqlen_k = (
            _compute_cu_seqlens(key_lengths).to(q.device, non_blocking=True),
            max(key_lengths),
        )
        key_indices = torch.arange(len(k))
        key_indices = torch.cat(
            [gather_context(key_indices, layout, i) for i in range(len(key_lengths))]
        ).to(q.device, non_blocking=True)
        k, v = k[key_indices], v[key_indices]
    window = (-1, 0) if config.window is None else (config.window - 1, 0)
    is_gqa = k.shape[1] != q.shape[1]
    out = varlen_attn(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=config.scale,
        window_size=window,
        enable_gqa=is_gqa,
    )
    assert isinstance(out, Tensor)  # a tuple only where its log-sum-exp is asked for
    return out


def _compute_cu_seqlens(lengths: Sequence[int]) -> Tensor:
    return torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32)


def dense_mask_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, config: AttentionConfig
) -> Tensor:
    """One call with a T x T mask: correct everywhere, fast nowhere."""
    allowed = build_dense_mask(layout, config.window).to(q.device)
    q_NTD, k_KTD, v_KTD = (x.transpose(0, 1) for x in (q, k, v))
    if config.softcap:
        return _attend_eager(q_NTD, k_KTD, v_KTD, allowed, config).transpose(0, 1)
    out = F.scaled_dot_product_attention(
        q_NTD[None],
        k_KTD[None],
        v_KTD[None],
        attn_mask=allowed,
        scale=config.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def build_dense_mask(layout: PackLayout, window: int | None) -> Tensor:
    """Boolean [T, T]: may the row's token see the column's?"""
    segment_mask = torch.eye(len(layout.lengths), dtype=torch.bool)
    for segment in range(len(layout.lengths)):
        segment_mask[segment, list(layout.get_path(segment))] = True
    segment_T = torch.repeat_interleave(
        torch.arange(len(layout.lengths)), torch.tensor(layout.lengths)
    )
    offsets = torch.tensor(
        [start - layout.count_prefix_tokens(i) for i, start in enumerate(layout.starts)]
    )
    position_T = torch.arange(layout.num_tokens) - offsets[segment_T]
    distance = position_T[:, None] - position_T
    return (
        segment_mask[segment_T][:, segment_T]
        & (distance >= 0)
        & (distance < (window or layout.num_tokens + 1))
    )


BACKENDS = {
    "reference": reference_attention,
    "documents": sdpa_attention,
    "kernel": cpu_kernel_attention,
    "varlen": varlen_attention,
    "mask": dense_mask_attention,
}


# ---------------------------------------------------------------- inside stock attention modules


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: PackLayout,
    backend: str = "auto",
    kv_cache: RaggedKVCache | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What transformers' AttentionInterface calls for modules that tunesmith does not replace: [1,
    N, T, D] in, [1, T, N, D] out. Refuses what it would have to ignore."""
    unknown = {k for k in ("s_aux", "position_bias", "head_mask") if kwargs.get(k) is not None}
    if unknown or attention_mask is not None:
        raise InputError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown)) or 'a mask'} to attention, which packs ignore",
            fix="use a model family from the list in docs/reference/models.md",
        )
    scaling, window, softcap = (
        kwargs.get("scaling"),
        kwargs.get("sliding_window"),
        kwargs.get("softcap"),
    )
    config = AttentionConfig(
        scale=float(scaling) if isinstance(scaling, int | float) else query.shape[-1] ** -0.5,
        window=window if isinstance(window, int) else None,
        softcap=float(softcap) if isinstance(softcap, int | float) else None,
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if kv_cache is not None:
        return kv_cache.attend(module, q, k, v, layout, config, backend)[None], None
    return attend(q, k, v, layout, config, backend)[None], None
