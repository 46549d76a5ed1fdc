"""Attention of a pack on a GPU, through torch's flash attention.

In: q [T, N, D], k and v [T, K, D] in 16 bits, and a PackLayout. Out: [T, N, D]. One call for the
pack; with shared prefixes two that are merged, or one over the keys that each segment sees,
gathered, whichever moves fewer bytes. Nothing is copied from the host in a layer: the offsets of a
pack go to the GPU once. torch's operators are called directly: its functions above them take other
arguments in each release from 2.10 to 2.13, and these are the same from 2.8 on.

Merged: in the first call, a segment sees itself. In the second one, neighbors that continue the
same segment see its path together, whose keys are read once for all of them. The two outputs are
added by their shares of the softmax, which their log-sum-exps give; each backward takes the merged
output and log-sum-exp, so its weights are those of the whole softmax. The formula is exact (Dao,
FlashAttention-2, arXiv 2307.08691, section 3.1). Left out: other dtypes, soft caps and head sizes,
which attention.py attends document by document. Legend: T tokens, R those that continue a segment,
N query heads, K key/value heads, D head size, P keys of all segments or of the second call."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.hardware import upload
from tunesmith.core.types import PackLayout
from tunesmith.model.kernels import ops

Rows = slice | Tensor  # neighbors, or indices on the device
FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
HEAD_SIZE_MULTIPLE = 8
# too large for the backward's shared memory, but on A100 and H100; 256 has its own kernel
UNSUPPORTED_HEAD_SIZES = range(193, 225)
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


def list_path_tokens(layout: PackLayout, segment: int) -> list[int]:
    """Return the tokens from the root down to the end of a segment."""
    tokens: list[int] = []
    for index in layout.get_path(segment):
        start = layout.starts[index]
        tokens += range(start, start + layout.lengths[index])
    return tokens


def accumulate_lengths(lengths: tuple[int, ...] | list[int], device: torch.device) -> Tensor:
    """Return where each segment begins and the last one ends, as int32 on the device."""
    offsets = (0, *itertools.accumulate(lengths))
    return upload(offsets, device, torch.int32)


# ---------------------------------------------------------------- the two operators


def run_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: SegmentOffsets,
    scale: float,
    window: int | None = None,
    *,
    is_causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output [T, N, D], its log-sum-exp [N, T], and two tensors for the backward.

    Causal: the last query of a segment is aligned with its last key."""
    out, logsumexp_NT, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
        *(q, k, v),
        *(offsets.queries, offsets.keys, offsets.max_queries, offsets.max_keys),
        0.0,  # dropout
        is_causal,
        False,  # no debug mask
        scale=scale,
        **_get_window(window, is_causal),
    )
    return out, logsumexp_NT, rng_state, unused


def run_flash_backward(
    dout: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, ...],
    offsets: SegmentOffsets,
    scale: float,
    window: int | None = None,
    *,
    is_causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from what `run_flash` took and returned."""
    out, logsumexp_NT, rng_state, unused = saved
    return torch.ops.aten._flash_attention_backward(
        *(dout, *inputs, out, logsumexp_NT),
        *(offsets.queries, offsets.keys, offsets.max_queries, offsets.max_keys),
        0.0,
        is_causal,
        *(rng_state, unused),
        scale=scale,
        **_get_window(window, is_causal),
    )


def _get_window(window: int | None, is_causal: bool) -> dict[str, int]:
    """Return how many tokens a query sees to the left and to the right of it; -1 is all."""
    before = -1 if window is None else window - 1
    return {"window_size_left": before, "window_size_right": 0 if is_causal else -1}


def count_sinks(out_TND: Tensor, logsumexp_NT: Tensor, sinks_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp with the sinks."""
    assert logsumexp_NT.shape == out_TND.shape[1::-1], "one log-sum-exp per head and row"
    with_sinks_NT = torch.logaddexp(logsumexp_NT, sinks_N.to(logsumexp_NT.dtype)[:, None])
    shares_TN = (logsumexp_NT - with_sinks_NT).exp().t()
    return (out_TND * shares_TN[..., None]).to(out_TND.dtype), with_sinks_NT


def compute_sink_grads(
    dout_TND: Tensor, out_TND: Tensor, logsumexp_NT: Tensor, sinks_N: Tensor
) -> Tensor:
    """Return the gradient of the sinks [N]: a sink of weight w scales its row's output by 1 - w."""
    accum_dtype = logsumexp_NT.dtype
    weights_NT = (sinks_N.to(accum_dtype)[:, None] - logsumexp_NT).exp()
    products_TN = (dout_TND.to(accum_dtype) * out_TND.to(accum_dtype)).sum(-1)
    return -(weights_NT * products_TN.t()).sum(1).to(sinks_N.dtype)


@dataclass(frozen=True, eq=False)
class MergedOffsets:
    """The two calls of a pack, and the tokens that are the queries and keys of the second."""

    segments: SegmentOffsets
    prefixes: SegmentOffsets
    queries_R: Rows
    keys_P: Rows
    has_repeated_keys: bool


@dataclass(frozen=True)
class _Run:
    """Neighboring segments that continue the same one."""

    parent: int
    start: int
    num_tokens: int


def _list_runs(layout: PackLayout) -> list[_Run]:
    runs: list[_Run] = []
    segments = range(len(layout.lengths))
    for parent, group in itertools.groupby(segments, key=layout.parents.__getitem__):
        members = list(group)
        if parent >= 0:
            num_tokens = sum(layout.lengths[i] for i in members)
            runs.append(_Run(parent, layout.starts[members[0]], num_tokens))
    return runs


@functools.lru_cache(maxsize=8)
def is_merging_cheaper(
    layout: PackLayout, num_heads: int, num_kv_heads: int, window: int | None
) -> bool:
    """Return whether to merge rather than to gather the keys of each segment, by the bytes that
    kernels move (tests/fakecuda counts them). Never where a window ends inside a path."""
    runs = _list_runs(layout) if layout.parents else []
    if not runs:
        return False
    contexts: list[int] = []  # of each segment
    for segment, length in enumerate(layout.lengths):
        contexts.append(layout.count_prefix_tokens(segment) + length)
    if window is not None and window < max(contexts):
        return False
    # values of a head that are read or written, forward and backward
    gathered = num_kv_heads * (24 * sum(contexts) + 18 * layout.num_tokens)
    num_queries = sum(run.num_tokens for run in runs)
    num_keys = sum(layout.count_prefix_tokens(run.parent) for run in runs)
    num_keys += sum(layout.lengths[run.parent] for run in runs)
    is_sliced = num_queries == _measure_span(runs)
    merged = num_heads * num_queries * (12 if is_sliced else 24)
    merged += num_kv_heads * (6 * layout.num_tokens + 24 * num_keys)
    return merged < gathered


def _measure_span(runs: list[_Run]) -> int:
    """Return the number of tokens from the first to the last run."""
    return runs[-1].start + runs[-1].num_tokens - runs[0].start


# of the pack in work; all layers have the same
@functools.lru_cache(maxsize=1)
def build_merged_offsets(layout: PackLayout, device: torch.device) -> MergedOffsets:
    """Copy the offsets of both calls to the device."""
    lengths = accumulate_lengths(layout.lengths, device)
    longest = max(layout.lengths)
    queries: list[int] = []
    keys: list[int] = []
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    for run in _list_runs(layout):
        path = list_path_tokens(layout, run.parent)
        queries += range(run.start, run.start + run.num_tokens)
        keys += path
        query_lengths.append(run.num_tokens)
        key_lengths.append(len(path))
    prefixes = SegmentOffsets(
        accumulate_lengths(query_lengths, device),
        accumulate_lengths(key_lengths, device),
        max(query_lengths),
        max(key_lengths),
    )
    return MergedOffsets(
        segments=SegmentOffsets(lengths, lengths, longest, longest),
        prefixes=prefixes,
        queries_R=_index_rows(queries, device),
        keys_P=_index_rows(keys, device),
        has_repeated_keys=len(set(keys)) < len(keys),
    )


def _index_rows(rows: list[int], device: torch.device) -> Rows:
    """Return a slice if the rows are neighbors, which copies nothing."""
    start = rows[0]
    if rows == list(range(start, start + len(rows))):
        return slice(start, start + len(rows))
    return upload(rows, device)


class _MergedAttention(torch.autograd.Function):
    """Saves q, k, v, the merged output and one number per row and head."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: MergedOffsets,
        scale: float,
        sinks_N: Tensor | None,
    ) -> Tensor:
        q = q.contiguous()  # so that the output is, whose rows are mixed in place
        out, logsumexp_NT, *states = run_flash(q, k, v, offsets.segments, scale)
        rows = offsets.queries_R
        inputs = (_select(q, rows), _select(k, offsets.keys_P), _select(v, offsets.keys_P))
        prefix_out, prefix_NR, *prefix_states = run_flash(
            *inputs, offsets.prefixes, scale, is_causal=False
        )
        first_NR = _select(logsumexp_NT.t(), rows).t()
        total_NR = torch.logaddexp(first_NR, prefix_NR)
        shares_RN = (prefix_NR - total_NR).exp().t().contiguous()
        mixed = _select(out, rows)
        ops.mix_rows(mixed, prefix_out, shares_RN)
        if isinstance(rows, Tensor):
            out.index_copy_(0, rows, mixed)
            logsumexp_NT.index_copy_(1, rows, total_NR)
        else:
            logsumexp_NT[:, rows] = total_NR
        if sinks_N is not None:
            out, logsumexp_NT = count_sinks(out, logsumexp_NT, sinks_N)
        ctx.offsets = offsets
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, out, logsumexp_NT, sinks_N, *states, *prefix_states)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp_NT, sinks_N, *states = ctx.saved_tensors
        offsets: MergedOffsets = ctx.offsets
        dout = gradients[0].contiguous()
        saved = (out, logsumexp_NT, *states[:2])
        dq, dk, dv = run_flash_backward(dout, (q, k, v), saved, offsets.segments, ctx.scale)
        rows = offsets.queries_R
        inputs = (_select(q, rows), _select(k, offsets.keys_P), _select(v, offsets.keys_P))
        merged_NR = _select(logsumexp_NT.t(), rows).t().contiguous()
        saved = (_select(out, rows), merged_NR, *states[2:])
        dq_R, dk_P, dv_P = run_flash_backward(
            _select(dout, rows), inputs, saved, offsets.prefixes, ctx.scale, is_causal=False
        )
        dq = _add_rows(dq, dq_R, rows)
        dk = _add_rows(dk, dk_P, offsets.keys_P, has_repeats=offsets.has_repeated_keys)
        dv = _add_rows(dv, dv_P, offsets.keys_P, has_repeats=offsets.has_repeated_keys)
        dsinks_N = None
        if sinks_N is not None and ctx.needs_input_grad[-1]:
            dsinks_N = compute_sink_grads(dout, out, logsumexp_NT, sinks_N)
        return dq, dk, dv, None, None, dsinks_N


def attend_merged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackLayout,
    *,
    scale: float,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attend with q [T, N, D], k and v [T, K, D]; returns [T, N, D]. N may be a multiple of K, and
    some segment must continue another."""
    offsets = build_merged_offsets(layout, q.device)
    return _MergedAttention.apply(q, k, v, offsets, scale, sinks_N)


def _select(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _add_rows(total: Tensor, x: Tensor, rows: Rows, *, has_repeats: bool = False) -> Tensor:
    """Add x to rows of the total, in place; several rows of x to one in fp32 or wider."""
    if isinstance(rows, slice):
        total[rows].add_(x)
        return total
    if not has_repeats:
        return total.index_add_(0, rows, x)
    accum_dtype = torch.promote_types(total.dtype, torch.float32)
    return total.to(accum_dtype).index_add_(0, rows, x.to(accum_dtype)).to(total.dtype)


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
