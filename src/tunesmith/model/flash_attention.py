"""Attention of a pack on a GPU, through torch's flash attention.

In: q [T, N, D], k and v [T, K, D] in 16 bits, and a PackLayout. Out: [T, N, D]. One call for the
pack; with shared prefixes two that are merged (merged_attention.py), or one over the keys that each
segment sees, gathered, whichever moves fewer bytes. Nothing is copied from the host in a layer: the
offsets of a pack go to the GPU once. Left out: other dtypes, soft caps and head sizes, which
attention.py attends document by document. Legend: T tokens, N query heads, K key/value heads, D
head size, P rows of the keys of all segments."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.hardware import upload
from tunesmith.core.types import PackLayout
from tunesmith.model.flash_operators import (
    SegmentOffsets,
    accumulate_lengths,
    compute_sink_grads,
    count_sinks,
    list_path_tokens,
    run_flash,
    run_flash_backward,
)
from tunesmith.model.merged_attention import attend_merged, is_merging_cheaper

FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
HEAD_SIZE_MULTIPLE = 8
# too large for the backward's shared memory, but on A100 and H100; 256 has its own kernel
UNSUPPORTED_HEAD_SIZES = range(193, 225)
MIN_CAPABILITY = (8, 0)  # of the GPU, for flash attention and for bf16


def is_flash_shape(head_size: int) -> bool:
    """Return whether the kernels take this head size."""
    is_supported = head_size <= MAX_HEAD_SIZE and head_size not in UNSUPPORTED_HEAD_SIZES
    return is_supported and head_size % HEAD_SIZE_MULTIPLE == 0


def has_flash_kernels(q: Tensor) -> bool:
    """Return whether torch's flash attention takes q on its GPU."""
    if q.dtype not in FLASH_DTYPES or not is_flash_shape(q.shape[-1]):
        return False
    return torch.cuda.get_device_capability(q.device) >= MIN_CAPABILITY


# of the pack in work; all layers have the same
@functools.lru_cache(maxsize=1)
def build_offsets(layout: PackLayout, device: torch.device) -> SegmentOffsets:
    """Copy the offsets of a pack to the device."""
    queries = accumulate_lengths(layout.lengths, device)
    longest = max(layout.lengths)
    if not layout.parents:
        return SegmentOffsets(queries, queries, longest, longest)
    rows: list[int] = []
    lengths: list[int] = []
    for segment in range(len(layout.lengths)):
        path = list_path_tokens(layout, segment)
        rows += path
        lengths.append(len(path))
    keys = accumulate_lengths(lengths, device)
    return SegmentOffsets(queries, keys, longest, max(lengths), upload(rows, device))


class _FlashAttention(torch.autograd.Function):
    """Saves q, k, v, the output and one number per row and head; the backward recomputes scores.

    The keys of shared prefixes are gathered for each segment, whose last query is aligned with its
    last key, and their gradients are summed in fp32. Sinks take part in the softmax after the
    fact: the backward takes the weights of a row from its log-sum-exp and its output, and is exact
    once both count the sink."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: SegmentOffsets,
        scale: float,
        window: int | None,
        sinks_N: Tensor | None,
    ) -> Tensor:
        keys = _gather_rows(k, offsets)
        values = _gather_rows(v, offsets)
        out, logsumexp_NT, *states = run_flash(q, keys, values, offsets, scale, window)
        if sinks_N is not None:
            out, logsumexp_NT = count_sinks(out, logsumexp_NT, sinks_N)
        ctx.offsets = offsets
        ctx.scale = scale
        ctx.window = window
        ctx.save_for_backward(q, k, v, out, logsumexp_NT, sinks_N, *states)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp_NT, sinks_N, *states = ctx.saved_tensors
        offsets: SegmentOffsets = ctx.offsets
        dout = gradients[0].contiguous()
        inputs = (q, _gather_rows(k, offsets), _gather_rows(v, offsets))
        saved = (out, logsumexp_NT, *states)
        dq, dk, dv = run_flash_backward(dout, inputs, saved, offsets, ctx.scale, ctx.window)
        dk = _sum_rows(dk, len(k), offsets)
        dv = _sum_rows(dv, len(v), offsets)
        dsinks_N = None
        if sinks_N is not None and ctx.needs_input_grad[-1]:
            dsinks_N = compute_sink_grads(dout, out, logsumexp_NT, sinks_N)
        return dq, dk, dv, None, None, None, dsinks_N


def attend_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attend with q [T, N, D], k and v [T, K, D]; returns [T, N, D]. N may be a multiple of K."""
    if is_merging_cheaper(layout, q.shape[1], k.shape[1], window):
        return attend_merged(q, k, v, layout, scale=scale, sinks_N=sinks_N)
    return attend_gathered(q, k, v, layout, scale=scale, window=window, sinks_N=sinks_N)


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attend as `attend_flash`, in one call over the keys that each segment sees."""
    offsets = build_offsets(layout, q.device)
    return _FlashAttention.apply(q, k, v, offsets, scale, window, sinks_N)


def _gather_rows(x: Tensor, offsets: SegmentOffsets) -> Tensor:
    return x if offsets.key_rows_P is None else x.index_select(0, offsets.key_rows_P)


def _sum_rows(dx: Tensor, num_rows: int, offsets: SegmentOffsets) -> Tensor:
    """Sum the gradients of gathered rows, in fp32 or wider."""
    if offsets.key_rows_P is None:
        return dx
    accum_dtype = torch.promote_types(dx.dtype, torch.float32)
    total = dx.new_zeros(num_rows, *dx.shape[1:], dtype=accum_dtype)
    return total.index_add_(0, offsets.key_rows_P, dx.to(accum_dtype)).to(dx.dtype)
