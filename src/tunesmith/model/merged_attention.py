"""Attention over shared prefixes on a GPU: two calls of flash attention, merged.

In: q [T, N, D], k and v [T, K, D] in 16 bits, and a PackLayout whose segments continue others. Out:
[T, N, D]. In the first call, a segment sees itself. In the second one, neighbors that continue the
same segment see its path together, whose keys are read once for all of them. The two outputs are
added by their shares of the softmax, which their log-sum-exps give; each backward takes the merged
output and log-sum-exp, so its weights are those of the whole softmax. The formula is exact (Dao,
FlashAttention-2, arXiv 2307.08691, section 3.1). Left out: windows that end inside a path, for
which flash_attention.py gathers the keys of every segment. Legend: T tokens, R those that continue
a segment, N query heads, K key/value heads, D head size, P keys of the second call."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
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
from tunesmith.model.kernels import ops

Rows = slice | Tensor  # neighbors, or indices on the device


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
