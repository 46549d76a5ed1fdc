"""Attention over a PackLayout: `attend(q, k, v, layout)`, several backends, one reference.

A token attends to the earlier tokens of its segment, itself included, and to the segments that its
segment continues, at most `window` tokens back. Sinks (gpt-oss) are one more score of each head
that has no value: some of its attention goes nowhere. Every backend computes exactly that; the
tests compare each with `reference`. Left out: the keys and values that generation stores
(paged_cache.py). Legend: T tokens, N query heads, K key/value heads, D head size, L tokens of a
segment, B segments of one length, P tokens of a segment and of all that it continues."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.core.errors import InputError
from tunesmith.core.hardware import upload
from tunesmith.core.token_shard import TokenShard
from tunesmith.core.types import PackLayout
from tunesmith.model.flash_attention import (
    FLASH_DTYPES,
    attend_flash,
    has_flash_kernels,
    is_flash_shape,
)
from tunesmith.model.kernels import ops
from tunesmith.model.kernels.build import call_kernel
from tunesmith.model.machine_errors import OutOfMemory
from tunesmith.model.ulysses import exchange_heads, restore_tokens, select_heads


@dataclass(frozen=True)
class AttentionConfig:
    """How a layer computes scores: the factor before the softmax, how many tokens it looks back
    (None: all), the soft cap of the logits, and the sinks."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks_N: Tensor | None = field(default=None, compare=False)


LOG2_E = 1 / math.log(2)
MAX_SCORES = 2**26  # in memory at once on a GPU, where they are stored: 256 MB in fp32
MAX_CPU_SCORES = 2**22  # on a CPU, which loses no time to smaller blocks
CosSin = tuple[Tensor, Tensor]  # cosine and sine [T, D/2] of the rotary embedding, fp32 or wider


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackLayout,
    config: AttentionConfig,
    backend: str = "auto",
    cos_sin: CosSin | None = None,
    shard: TokenShard | None = None,
) -> Tensor:
    """Attend with q [T, N, D], k and v [T, K, D]; returns [T, N, D] in the dtype of q.

    With `cos_sin`, q and k are rotated first. With `shard`, they are of this rank's tokens."""
    if shard is not None:
        q, k, v = exchange_heads(*apply_rotary_qk(q, k, cos_sin), v, shard)
        sinks_N = select_heads(config.sinks_N, shard)
        config = dataclasses.replace(config, sinks_N=sinks_N)
        return restore_tokens(attend(q, k, v, layout, config, backend), shard)
    assert layout.num_tokens == len(q), f"the layout has {layout.num_tokens} tokens, q has {len(q)}"
    name = choose_backend(backend, q)
    if name == "cpu_kernel":
        return cpu_kernel_attention(q, k, v, layout, config, cos_sin)
    q, k = apply_rotary_qk(q, k, cos_sin)
    return BACKENDS[name](q, k, v, layout, config)


def apply_rotary_qk(q: Tensor, k: Tensor, cos_sin: CosSin | None) -> tuple[Tensor, Tensor]:
    """Rotate q and k, unless `cos_sin` is None."""
    if cos_sin is None:
        return q, k
    return ops.apply_rotary(q, *cos_sin), ops.apply_rotary(k, *cos_sin)


def choose_backend(backend: str, q: Tensor) -> str:
    """Return the backend for q: the setting, or the fastest if it is auto."""
    if backend != "auto":
        return backend
    if q.device.type == "cpu":
        return "cpu_kernel"
    return "varlen" if has_flash_kernels(q) else "sdpa"


# ---------------------------------------------------------------- reference


def build_causal_mask(
    length: int, window: int | None, device: torch.device, prefix_length: int = 0
) -> Tensor:
    """Return a boolean mask [L, P]: whether the row's token sees the column's.

    The columns start `prefix_length` tokens before the rows."""
    key_positions = torch.arange(prefix_length + length, device=device)
    distance = key_positions[prefix_length:, None] - key_positions
    return (distance >= 0) & (distance < (window or prefix_length + length + 1))


def gather_context(x: Tensor, layout: PackLayout, segment: int) -> Tensor:
    """Return the rows of x [P, ...] that a segment sees: those it continues, from the root on, then
    its rows."""
    pieces: list[Tensor] = []
    for index in layout.get_path(segment):
        start = layout.starts[index]
        pieces.append(x[start : start + layout.lengths[index]])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _attend_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, config: AttentionConfig) -> Tensor:
    """Compute plain attention of [.., N, L, D] queries; scores and softmax in fp32 or wider."""
    accum_dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[-3] // k.shape[-3]
    k = k.repeat_interleave(groups, dim=-3).to(accum_dtype)
    v = v.repeat_interleave(groups, dim=-3).to(accum_dtype)
    scores = q.to(accum_dtype) @ k.transpose(-1, -2) * config.scale
    if config.softcap:
        scores = config.softcap * torch.tanh(scores / config.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    sinks = None if config.sinks_N is None else config.sinks_N[:, None, None]
    return (compute_weights(scores, sinks) @ v).to(q.dtype)


def compute_weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax of scores [.., P] over the last dimension. Sinks [.., 1], broadcast over
    the others, take part and are left out."""
    if sinks is None:
        return scores.softmax(dim=-1)
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, config: AttentionConfig
) -> Tensor:
    """Attend one segment at a time, with explicit scores."""
    outputs: list[Tensor] = []
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        q_NLD = q[start : start + length].transpose(0, 1)
        k_KPD = gather_context(k, layout, segment).transpose(0, 1)
        v_KPD = gather_context(v, layout, segment).transpose(0, 1)
        prefix_length = layout.count_prefix_tokens(segment)
        mask = build_causal_mask(length, config.window, q.device, prefix_length)
        outputs.append(_attend_eager(q_NLD, k_KPD, v_KPD, mask, config).transpose(0, 1))
    return torch.cat(outputs)


# ---------------------------------------------------------------- CPU: torch's fused attention


def _iter_equal_lengths(layout: PackLayout) -> Iterator[tuple[int, int]]:
    """Yield (count, length) of neighboring segments of equal length."""
    for length, group in itertools.groupby(layout.lengths):
        yield len(list(group)), length


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, config: AttentionConfig
) -> Tensor:
    """Attend per document with torch's fused causal attention, one call for neighbors of equal
    length.

    There is no T x T mask, so the work is the sum of the L^2 / 2. On the CPU, bf16 inputs are
    widened to fp32: that is faster for short documents, and more precise."""
    accum_dtype = q.dtype
    if q.device.type == "cpu":
        accum_dtype = torch.promote_types(q.dtype, torch.float32)
    q_wide, k_wide, v_wide = (x.to(accum_dtype) for x in (q, k, v))
    outputs: list[Tensor] = []
    if layout.parents:
        for segment, piece in enumerate(q_wide.split(layout.lengths)):
            keys = gather_context(k_wide, layout, segment)
            values = gather_context(v_wide, layout, segment)
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
    """Attend with q [B, L, N, D], the last queries of keys and values [B, P, K, D]; returns
    [B * L, N, D]."""
    on_gpu = q.device.type != "cpu"
    if on_gpu:  # torch stores all scores if keys have fewer heads, except in flash attention
        groups = q.shape[2] // k.shape[2]
        k = k.repeat_interleave(groups, dim=2)
        v = v.repeat_interleave(groups, dim=2)
    q_BNLD, k_BKPD, v_BKPD = (x.transpose(1, 2) for x in (q, k, v))
    length = q.shape[1]
    prefix_length = k.shape[1] - length
    if config.softcap:  # torch's attention has none, and scores of all layers would take gigabytes
        max_scores = MAX_SCORES if on_gpu else MAX_CPU_SCORES
        out = attend_in_blocks(q_BNLD, k_BKPD, v_BKPD, config, max_scores)
        return out.transpose(1, 2).flatten(0, 1)
    is_windowed = config.window is not None and config.window < length
    mask = None
    if prefix_length or is_windowed or config.sinks_N is not None:
        mask = build_causal_mask(length, config.window, q.device, prefix_length)
    if config.sinks_N is not None and mask is not None:
        out = _attend_with_sinks(q_BNLD, k_BKPD, v_BKPD, mask, config.scale, config.sinks_N)
    else:
        out = F.scaled_dot_product_attention(
            q_BNLD,
            k_BKPD,
            v_BKPD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=config.scale,
            enable_gqa=True,
        )
    return out.transpose(1, 2).flatten(0, 1)


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, max_scores: int
) -> Tensor:
    """Attend with q [B, N, L, D], the last queries of k and v [B, K, P, D]: explicit scores of a
    block of queries at a time, at most `max_scores`, which the backward computes again."""
    batch_size, num_heads, length, _ = q.shape
    prefix_length = k.shape[2] - length
    block_length = max(1, max_scores // (batch_size * num_heads * k.shape[2]))
    outputs: list[Tensor] = []
    for start in range(0, length, block_length):
        end = min(start + block_length, length)
        context = prefix_length + end
        mask = build_causal_mask(end - start, config.window, q.device, prefix_length + start)
        block = (q[:, :, start:end], k[:, :, :context], v[:, :, :context], mask, config)
        outputs.append(checkpoint(_attend_eager, *block, use_reentrant=False))
    return torch.cat(outputs, dim=2)


def _attend_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask_LP: Tensor, scale: float, sinks_N: Tensor
) -> Tensor:
    """Attend with q [B, N, L, D], k and v [B, K, P, D] in torch's fused attention.

    It has no sinks, so q and k get one more dimension. One more key, whose value is 0, has a 1 in
    it and 0 elsewhere; queries hold the sink of their head in it, which is then the key's score."""
    sinks_N11 = (sinks_N.to(q.dtype) / scale)[:, None, None]
    q = torch.cat((q, sinks_N11.expand(*q.shape[:-1], 1)), dim=-1)
    sink_key = F.pad(torch.zeros_like(k[..., :1, :]), (0, 1), value=1.0)
    k = torch.cat((F.pad(k, (0, 1)), sink_key), dim=-2)
    v = F.pad(v, (0, 1, 0, 1))
    mask = F.pad(mask_LP, (0, 1), value=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[..., :-1]


# ---------------------------------------------------------------- CPU: attention.c, in bf16


class _AttentionFunction(torch.autograd.Function):
    """Saves q, k, v, the output and one number per row; the backward recomputes the scores. q and k
    are rotated when they are read, and their gradients rotated back when they are written.

    Sinks need no code in C: the kernel's backward takes the weights of a row from its log-sum-exp
    and its output, and is exact once both count the sink."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: PackLayout,
        config: AttentionConfig,
        cos_sin: CosSin | None,
        sinks_N: Tensor | None,
    ) -> Tensor:
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
        null = q.new_empty(0)  # NULL in C
        out = torch.empty_like(q)
        logsumexp = torch.empty(q.shape[:2], dtype=torch.float32)
        inputs = (q, k, v, out, logsumexp)
        aux_inputs = (*(cos_sin or (null, null)), *_build_segment_tensors(layout))
        ctx.shape = _get_kernel_shape(len(layout.lengths), q, k, config)
        _call_attention("attention", *inputs, *(null,) * 4, *aux_inputs, *ctx.shape)
        if sinks_N is not None:
            _count_sinks(out, logsumexp, sinks_N)
        ctx.save_for_backward(*inputs, *aux_inputs, sinks_N)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # read once: a recomputed layer returns them only once
        *saved, sinks_N = ctx.saved_tensors
        inputs = saved[:5]
        aux_inputs = saved[5:]
        dq, dk, dv = (torch.empty_like(x) for x in inputs[:3])
        outputs = (gradients[0].contiguous(), dq, dk, dv)
        _call_attention("attention", *inputs, *outputs, *aux_inputs, *ctx.shape)
        dsinks_N = None
        if sinks_N is not None and ctx.needs_input_grad[-1]:
            out, logsumexp = inputs[3:]
            dsinks_N = _compute_sink_grads(gradients[0], out, logsumexp, sinks_N)
        return dq, dk, dv, None, None, None, dsinks_N


def _count_sinks(out_TND: Tensor, logsumexp_TN: Tensor, sinks_N: Tensor) -> None:
    """Count the sinks in an output and in its log-sum-exp, to base 2, in place."""
    with_sinks_TN = torch.logaddexp2(logsumexp_TN, sinks_N.float() * LOG2_E)
    out_TND.mul_((logsumexp_TN - with_sinks_TN).exp2()[..., None])
    logsumexp_TN.copy_(with_sinks_TN)


def _compute_sink_grads(
    dout_TND: Tensor, out_TND: Tensor, logsumexp_TN: Tensor, sinks_N: Tensor
) -> Tensor:
    """Return the gradient of the sinks [N]: a sink of weight w scales its row's output by 1 - w, so
    it gets -w dout . out of each row."""
    weights_TN = (sinks_N.float() * LOG2_E - logsumexp_TN).exp2()
    products_TN = (dout_TND.float() * out_TND.float()).sum(-1)
    return -(weights_TN * products_TN).sum(0).to(sinks_N.dtype)


def _get_kernel_shape(
    num_segments: int, q: Tensor, k: Tensor, config: AttentionConfig
) -> tuple[int | float, ...]:
    """Return the numbers that `attention` in attention.c takes last."""
    window = config.window or 0
    return num_segments, q.shape[1], k.shape[1], q.shape[2], window, config.scale


def _build_segment_tensors(
    layout: PackLayout, num_prefixes: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return starts, lengths and parents for the kernel, most work first, so that the threads
    finish together.

    The first `num_prefixes` segments are put last: a kernel called with fewer segments then uses
    them as parents only."""
    work: list[int] = []
    for index, length in enumerate(layout.lengths):
        work.append(length * (length + 2 * layout.count_prefix_tokens(index)))
    order = sorted(range(len(work)), key=lambda i: (i < num_prefixes, -work[i]))
    starts = torch.tensor([layout.starts[i] for i in order])
    lengths = torch.tensor([layout.lengths[i] for i in order])
    if not layout.parents:
        return starts, lengths, torch.empty(0)
    rank_by_segment = {-1: -1}
    for rank, index in enumerate(order):
        rank_by_segment[index] = rank
    parents = torch.tensor([rank_by_segment[layout.parents[i]] for i in order])
    return starts, lengths, parents


def _call_attention(name: str, *arguments: Tensor | int | float) -> None:
    if call_kernel(name, *arguments):
        fix = "lower pack_length, or free memory"
        raise OutOfMemory("no memory for the scratch space of attention", fix=fix)


def has_kernel(q: Tensor, config: AttentionConfig) -> bool:
    """Return whether attention.c and decode.c apply: bf16, AVX512-BF16, a head size that is a
    multiple of 64, no soft cap."""
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
    """Attend with attention.c: bf16 products, only over the keys that a query sees. Falls back to
    `sdpa_attention`."""
    if has_kernel(q, config):
        return _AttentionFunction.apply(q, k, v, layout, config, cos_sin, config.sinks_N)
    q, k = apply_rotary_qk(q, k, cos_sin)
    return sdpa_attention(q, k, v, layout, config)


def run_prefix_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    parents: Sequence[int],
    layout: PackLayout,
    config: AttentionConfig,
) -> Tensor:
    """Attend with documents that continue prefixes, of which only keys and values [P, K, D] are
    stored: document i continues prefix parents[i], or nothing if that is -1. Not
    differentiable."""
    prefix_lengths = [len(keys) for keys, _ in prefixes]
    num_tokens = sum(prefix_lengths)
    prefix_starts = tuple(itertools.accumulate(prefix_lengths, initial=0))[:-1]
    full_layout = PackLayout(
        starts=(*prefix_starts, *(num_tokens + start for start in layout.starts)),
        lengths=(*prefix_lengths, *layout.lengths),
        parents=(*(-1,) * len(prefixes), *parents),
    )
    q = torch.cat((q.new_empty(num_tokens, *q.shape[1:]), q))
    k = torch.cat((*(keys for keys, _ in prefixes), k))
    v = torch.cat((*(values for _, values in prefixes), v))
    out = torch.empty_like(q)
    logsumexp = torch.empty(q.shape[:2], dtype=torch.float32)
    nulls = (q.new_empty(0),) * 6
    segments = _build_segment_tensors(full_layout, num_prefixes=len(prefixes))
    shape = _get_kernel_shape(len(layout.lengths), q, k, config)
    _call_attention("attention", q, k, v, out, logsumexp, *nulls, *segments, *shape)
    out = out[num_tokens:]
    if config.sinks_N is not None:
        _count_sinks(out, logsumexp[num_tokens:], config.sinks_N)
    return out


def run_decode_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_buffers: tuple[Tensor, Tensor],
    tables_BM: Tensor,
    positions_B: Tensor,
    config: AttentionConfig,
    cos_sin: CosSin | None,
) -> Tensor:
    """Attend with one more token per row, which decode.c also stores.

    k and v [B, K, D] are written at `positions_B` of the rows, whose blocks of the buffers
    [blocks, K, 64, D] are in `tables_BM`, and q [B, N, D] attends to all stored tokens of its row.
    Not differentiable."""
    q, k, v = (tensor.contiguous() for tensor in (q, k, v))
    null = q.new_empty(0)
    out = torch.empty_like(q)
    sinks = null if config.sinks_N is None else config.sinks_N.float().contiguous()
    tensors = (q, k, v, *kv_buffers, out, *(cos_sin or (null, null)), sinks, positions_B, tables_BM)
    num_rows, num_heads, head_dim = q.shape
    sizes = (num_rows, num_heads, k.shape[1], head_dim, tables_BM.shape[1])
    _call_attention("attend_rows", *tensors, *sizes, config.window or 0, config.scale)
    return out


# ---------------------------------------------------------------- CUDA


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, config: AttentionConfig
) -> Tensor:
    """Attend in one call of flash attention for the whole pack.

    It has no soft cap, and few head sizes: other layers attend per document. Raise InputError for
    other dtypes than bf16 and fp16."""
    if q.dtype not in FLASH_DTYPES:
        dtype = str(q.dtype).removeprefix("torch.")
        message = f"attention: varlen runs in 16 bits, but the model's dtype is {dtype}"
        raise InputError(message, where="attention", fix="use attention: sdpa, or dtype: bf16")
    if config.softcap or not is_flash_shape(q.shape[-1]):
        return sdpa_attention(q, k, v, layout, config)
    return attend_flash(
        q, k, v, layout, scale=config.scale, window=config.window, sinks_N=config.sinks_N
    )


def dense_mask_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, config: AttentionConfig
) -> Tensor:
    """Attend in one call with a T x T mask: always correct, never fast."""
    mask = build_dense_mask(layout, config.window, q.device)
    q_NTD, k_KTD, v_KTD = (x.transpose(0, 1) for x in (q, k, v))
    if config.softcap:
        return _attend_eager(q_NTD, k_KTD, v_KTD, mask, config).transpose(0, 1)
    if config.sinks_N is not None:
        batch = (q_NTD[None], k_KTD[None], v_KTD[None])
        out = _attend_with_sinks(*batch, mask, config.scale, config.sinks_N)
        return out[0].transpose(0, 1)
    out = F.scaled_dot_product_attention(
        q_NTD[None], k_KTD[None], v_KTD[None], attn_mask=mask, scale=config.scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


# of the layers with and without a window
@functools.lru_cache(maxsize=2)
def build_dense_mask(layout: PackLayout, window: int | None, device: torch.device) -> Tensor:
    """Return a boolean mask [T, T] on the device: whether the row's token sees the column's."""
    count = len(layout.lengths)
    segment_mask = torch.eye(count, dtype=torch.bool)
    offsets: list[int] = []
    for segment, start in enumerate(layout.starts):
        segment_mask[segment, list(layout.get_path(segment))] = True
        offsets.append(start - layout.count_prefix_tokens(segment))
    segments: list[int] = []
    for segment, length in enumerate(layout.lengths):
        segments += [segment] * length
    segment_T = upload(segments, device)
    position_T = torch.arange(layout.num_tokens, device=device)
    position_T = position_T - upload(offsets, device)[segment_T]
    distance = position_T[:, None] - position_T
    is_in_window = (distance >= 0) & (distance < (window or layout.num_tokens + 1))
    return upload(segment_mask, device)[segment_T][:, segment_T] & is_in_window


# cuDNN builds a plan for each new length (pytorch#155958), and torch prefers it on an H100 and a
# B200. Answers have a new length at each token, and documents of packs one each.
torch.backends.cuda.enable_cudnn_sdp(False)

BACKENDS = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "cpu_kernel": cpu_kernel_attention,
    "varlen": varlen_attention,
    "dense_mask": dense_mask_attention,
}
