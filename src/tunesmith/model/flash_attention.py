"""Attention of a pack on a GPU, in one call of torch's flash attention.

In: q [T, N, D], k and v [T, K, D] in 16 bits, and a PackLayout. Out: [T, N, D]. The two operators
below torch's own functions are called directly: those functions take other arguments in each
release from 2.10 to 2.13, and these are the same from 2.8 on. Nothing is copied from the host in a
layer: the offsets of a pack go to the GPU once. Left out: other dtypes, soft caps and head sizes,
which attention.py attends document by document. Legend: T tokens, N query heads, K key/value heads,
D head size, P rows of the keys of all segments."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.hardware import upload
from tunesmith.core.types import PackLayout

FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
HEAD_SIZE_MULTIPLE = 8
MIN_CAPABILITY = (8, 0)  # of the GPU, for flash attention and for bf16


@dataclass(frozen=True, eq=False)
class SegmentOffsets:
    """Where the queries and the keys of each segment begin, on the device, as int32 [segments + 1].

    `key_rows_P` are the rows of k and v that each segment sees, one segment after the other, where
    prefixes are shared; None if each sees its own."""

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int
    key_rows_P: Tensor | None = None


def is_flash_shape(head_size: int) -> bool:
    """Return whether the kernels take this head size."""
    return head_size <= MAX_HEAD_SIZE and head_size % HEAD_SIZE_MULTIPLE == 0


def has_flash_kernels(q: Tensor) -> bool:
    """Return whether torch's flash attention takes q on its GPU."""
    if q.dtype not in FLASH_DTYPES or not is_flash_shape(q.shape[-1]):
        return False
    return torch.cuda.get_device_capability(q.device) >= MIN_CAPABILITY


# of the pack in work; all layers have the same
@functools.lru_cache(maxsize=1)
def build_offsets(layout: PackLayout, device: torch.device) -> SegmentOffsets:
    """Copy the offsets of a pack to the device."""
    queries = _accumulate(layout.lengths, device)
    longest = max(layout.lengths)
    if not layout.parents:
        return SegmentOffsets(queries, queries, longest, longest)
    rows: list[int] = []
    lengths: list[int] = []
    for segment in range(len(layout.lengths)):
        before = len(rows)
        for index in layout.get_path(segment):
            start = layout.starts[index]
            rows += range(start, start + layout.lengths[index])
        lengths.append(len(rows) - before)
    key_rows_P = upload(rows, device)
    return SegmentOffsets(queries, _accumulate(lengths, device), longest, max(lengths), key_rows_P)


def _accumulate(lengths: tuple[int, ...] | list[int], device: torch.device) -> Tensor:
    offsets = (0, *itertools.accumulate(lengths))
    return upload(offsets, device, torch.int32)


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
        out, logsumexp_NT, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            q,
            _gather_rows(k, offsets),
            _gather_rows(v, offsets),
            offsets.queries,
            offsets.keys,
            offsets.max_queries,
            offsets.max_keys,
            0.0,  # dropout
            True,  # causal
            False,  # no debug mask
            scale=scale,
            **_get_window(window),
        )
        if sinks_N is not None:
            out, logsumexp_NT = _count_sinks(out, logsumexp_NT, sinks_N)
        ctx.offsets = offsets
        ctx.scale = scale
        ctx.window = window
        ctx.save_for_backward(q, k, v, out, logsumexp_NT, rng_state, unused, sinks_N)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp_NT, rng_state, unused, sinks_N = ctx.saved_tensors
        offsets: SegmentOffsets = ctx.offsets
        dout = gradients[0].contiguous()
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout,
            q,
            _gather_rows(k, offsets),
            _gather_rows(v, offsets),
            out,
            logsumexp_NT,
            offsets.queries,
            offsets.keys,
            offsets.max_queries,
            offsets.max_keys,
            0.0,
            True,
            rng_state,
            unused,
            scale=ctx.scale,
            **_get_window(ctx.window),
        )
        dk = _sum_rows(dk, len(k), offsets)
        dv = _sum_rows(dv, len(v), offsets)
        dsinks_N = None
        if sinks_N is not None and ctx.needs_input_grad[-1]:
            accum_dtype = logsumexp_NT.dtype
            weights_NT = (sinks_N.to(accum_dtype)[:, None] - logsumexp_NT).exp()
            products_TN = (dout.to(accum_dtype) * out.to(accum_dtype)).sum(-1)
            dsinks_N = -(weights_NT * products_TN.t()).sum(1).to(sinks_N.dtype)
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
    offsets = build_offsets(layout, q.device)
    return _FlashAttention.apply(q, k, v, offsets, scale, window, sinks_N)


def _get_window(window: int | None) -> dict[str, int]:
    """Return how many tokens a query sees to the left and to the right of it; -1 is all."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


def _gather_rows(x: Tensor, offsets: SegmentOffsets) -> Tensor:
    return x if offsets.key_rows_P is None else x.index_select(0, offsets.key_rows_P)


def _sum_rows(dx: Tensor, num_rows: int, offsets: SegmentOffsets) -> Tensor:
    """Sum the gradients of gathered rows, in fp32 or wider."""
    if offsets.key_rows_P is None:
        return dx
    accum_dtype = torch.promote_types(dx.dtype, torch.float32)
    total = dx.new_zeros(num_rows, *dx.shape[1:], dtype=accum_dtype)
    return total.index_add_(0, offsets.key_rows_P, dx.to(accum_dtype)).to(dx.dtype)


def _count_sinks(out_TND: Tensor, logsumexp_NT: Tensor, sinks_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp with the sinks."""
    assert logsumexp_NT.shape == out_TND.shape[1::-1], "one log-sum-exp per head and row"
    with_sinks_NT = torch.logaddexp(logsumexp_NT, sinks_N.to(logsumexp_NT.dtype)[:, None])
    shares_TN = (logsumexp_NT - with_sinks_NT).exp().t()
    return (out_TND * shares_TN[..., None]).to(out_TND.dtype), with_sinks_NT
