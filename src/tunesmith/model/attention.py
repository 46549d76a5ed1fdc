"""Attention over a Layout: `attend(q, k, v, layout)`, one signature, several backends, one reference.

A token attends to the earlier tokens of its own segment, itself included, and to the segments that this one continues,
at most `window` back. Nothing else is seen, whatever the backend; tests hold each to `reference`. Left out: what
generation stores (cache.py).
Legend: T tokens, N query heads, K key/value heads, D head size, L tokens of a segment, B segments of one length, P of a
segment and all that it continues.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.errors import InputError
from tunesmith.core.types import Layout
from tunesmith.model.kernels import ops
from tunesmith.model.oom import OutOfMemory

if TYPE_CHECKING:
    from tunesmith.model.kv_cache import RowCache


@dataclass(frozen=True)
class Rule:
    """How a layer scores: the factor before the softmax, the tokens it looks back (None: all), the logit cap (None)."""

    scale: float
    window: int | None = None
    softcap: float | None = None


Angles = tuple[Tensor, Tensor]  # cosine and sine [T, D/2] of the rotary embedding, fp32 or wider


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    rule: Rule,
    backend: str = "auto",
    angles: Angles | None = None,
) -> Tensor:
    """q [T, N, D], k and v [T, K, D] -> [T, N, D] in the dtype of q. `angles`: q and k are still to be turned."""
    assert layout.tokens == len(q), f"the layout has {layout.tokens} tokens, q has {len(q)}"
    name = choose(backend, q)
    if name == "kernel":
        return kernel(q, k, v, layout, rule, angles)
    return BACKENDS[name](*turned(q, k, angles), v, layout, rule)


def turned(q: Tensor, k: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor]:
    return (q, k) if angles is None else (ops.rotate(q, *angles), ops.rotate(k, *angles))


def choose(backend: str, q: Tensor) -> str:
    if backend != "auto":
        return backend
    if q.device.type == "cpu":
        return "kernel"
    return "varlen" if _varlen_attn() and q.dtype in (torch.bfloat16, torch.float16) else "mask"


# ---------------------------------------------------------------- reference


def visible(length: int, window: int | None, device: torch.device, before: int = 0) -> Tensor:
    """Boolean [L, P]: may the row's token see the column's? The columns start `before` tokens ahead of the rows."""
    ahead = torch.arange(before + length, device=device)
    distance = ahead[before:, None] - ahead
    return (distance >= 0) & (distance < (window or before + length + 1))


def continued(x: Tensor, layout: Layout, segment: int) -> Tensor:
    """Rows of x [P, ...] of all that a segment sees: what it continues, from the root on, and itself last."""
    pieces = [x[layout.starts[i] : layout.starts[i] + layout.lengths[i]] for i in layout.path(segment)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _scores_to_output(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """Plain attention of [.., N, L, D] queries; scores and softmax in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(groups, dim=-3), v.repeat_interleave(groups, dim=-3)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ v.to(wide)).to(q.dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """One segment after the other, scores written out."""
    outputs = []
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        q_NLD = q[start : start + length].transpose(0, 1)
        k_KPD, v_KPD = (continued(x, layout, segment).transpose(0, 1) for x in (k, v))
        mask = visible(length, rule.window, q.device, layout.before(segment))
        outputs.append(_scores_to_output(q_NLD, k_KPD, v_KPD, mask, rule).transpose(0, 1))
    return torch.cat(outputs)


# ---------------------------------------------------------------- CPU: one causal call for all documents of a length


def _runs(layout: Layout) -> Iterator[tuple[int, int]]:
    """(count, length) of neighbouring segments of equal length."""
    for length, group in itertools.groupby(layout.lengths):
        yield len(list(group)), length


def documents(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """torch's fused causal attention, per document: no T x T mask, so the work is the sum of the L^2 / 2.
    In fp32 for bf16 inputs: on the CPU that is faster for short documents, and more precise."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_wide, k_wide, v_wide = (x.to(wide) for x in (q, k, v))
    outputs = []
    if layout.parents:
        for segment, piece in enumerate(q_wide.split(layout.lengths)):
            keys, values = (continued(x, layout, segment) for x in (k_wide, v_wide))
            outputs.append(_fused(piece[None], keys[None], values[None], rule))
        return torch.cat(outputs).to(q.dtype)
    runs = list(_runs(layout))
    sizes = [count * length for count, length in runs]
    pieces = zip(*(x.split(sizes) for x in (q_wide, k_wide, v_wide)), strict=True)
    for run, piece in zip(runs, pieces, strict=True):
        q_BLND, k_BLKD, v_BLKD = (x.unflatten(0, run) for x in piece)
        outputs.append(_fused(q_BLND, k_BLKD, v_BLKD, rule))
    return torch.cat(outputs).to(q.dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """q [B, L, N, D] are the last queries of keys and values [B, P, K, D] -> [B * L, N, D]."""
    q_BNLD, k_BKPD, v_BKPD = (x.transpose(1, 2) for x in (q, k, v))
    length, before = q.shape[1], k.shape[1] - q.shape[1]
    if rule.softcap:
        out = _scores_to_output(q_BNLD, k_BKPD, v_BKPD, visible(length, rule.window, q.device, before), rule)
    elif before or (rule.window is not None and rule.window < length):
        mask = visible(length, rule.window, q.device, before)
        out = F.scaled_dot_product_attention(q_BNLD, k_BKPD, v_BKPD, attn_mask=mask, scale=rule.scale, enable_gqa=True)
    else:
        out = F.scaled_dot_product_attention(q_BNLD, k_BKPD, v_BKPD, is_causal=True, scale=rule.scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------- CPU with bf16 products: attention.c


class _Kernel(torch.autograd.Function):
    """Saves q, k, v, the output and one number a row; scores are computed again in the backward. q and k are turned by
    the angles when they are read, and their gradients back when they are written."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, angles: Angles | None) -> Tensor:
        q, k, v, nothing = q.contiguous(), k.contiguous(), v.contiguous(), q.new_empty(0)  # nothing: NULL in C
        out, logsumexp = torch.empty_like(q), torch.empty(q.shape[:2])
        inputs, rest = (q, k, v, out, logsumexp), (*(angles or (nothing, nothing)), *_segments(layout))
        ctx.shape = (len(layout.lengths), q.shape[1], k.shape[1], q.shape[2], rule.window or 0, rule.scale)
        _call("attention", *inputs, nothing, nothing, nothing, nothing, *rest, *ctx.shape)
        ctx.save_for_backward(*inputs, *rest)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        saved = ctx.saved_tensors  # once: a layer that runs again gives them once
        inputs, rest = saved[:5], saved[5:]
        dq, dk, dv = (torch.empty_like(x) for x in inputs[:3])
        _call("attention", *inputs, gradients[0].contiguous(), dq, dk, dv, *rest, *ctx.shape)
        return dq, dk, dv, None, None, None


def _segments(layout: Layout, given: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Starts, lengths and parents for the kernel, most work first: then the threads end together. The first `given`
    segments come last, where a kernel that is told of fewer finds them as parents only."""
    work = [length * (length + 2 * layout.before(i)) for i, length in enumerate(layout.lengths)]
    order = sorted(range(len(work)), key=lambda i: (i < given, -work[i]))
    starts, lengths = (torch.tensor([x[i] for i in order]) for x in (layout.starts, layout.lengths))
    if not layout.parents:
        return starts, lengths, torch.empty(0)
    place = {-1: -1} | {i: rank for rank, i in enumerate(order)}
    return starts, lengths, torch.tensor([place[layout.parents[i]] for i in order])


def _call(name: str, *arguments: Tensor | int | float) -> None:
    if ops.call(name, *arguments):
        raise OutOfMemory("no memory for the attention's scratch space", fix="lower pack_length, or free memory")


def has_kernel(q: Tensor, rule: Rule) -> bool:
    """Can attention.c and rows.c do it? Not other dtypes and processors, odd head sizes, soft caps."""
    able = ops.usable(q) and ops.has_attention() and q.shape[-1] % 64 == 0
    return able and not rule.softcap and rule.scale > 0


def kernel(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, angles: Angles | None = None) -> Tensor:
    """Our own kernel: bf16 products, only the keys that a query sees. What it cannot do takes `documents`."""
    if has_kernel(q, rule):
        return _Kernel.apply(q, k, v, layout, rule, angles)
    return documents(*turned(q, k, angles), v, layout, rule)


def kernel_after(q: Tensor, k: Tensor, v: Tensor, given: tuple[Tensor, Tensor], layout: Layout, rule: Rule) -> Tensor:
    """Documents that all go on after tokens of which only keys and values [P, K, D] are `given`. No autograd."""
    more, nothing = len(given[0]), q.new_empty(0)
    count = len(layout.lengths)
    starts = (0, *(more + start for start in layout.starts))
    whole = Layout(starts, (more, *layout.lengths), (-1, *(0,) * count))
    q, k, v = torch.cat((q.new_empty(more, *q.shape[1:]), q)), torch.cat((given[0], k)), torch.cat((given[1], v))
    out, logsumexp = torch.empty_like(q), torch.empty(q.shape[:2])
    shape = (count, q.shape[1], k.shape[1], q.shape[2], rule.window or 0, rule.scale)
    _call("attention", q, k, v, out, logsumexp, *(nothing,) * 6, *_segments(whole, given=1), *shape)
    return out[more:]


def kernel_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stores: tuple[Tensor, Tensor],
    places_B: Tensor,
    shared: int,
    rule: Rule,
    angles: Angles | None,
) -> Tensor:
    """One more token a row: k and v [B, K, D] are put at `places_B` into the stores [slots, K, capacity, D], and q
    [B, N, D] meets all that is there of its row. What stands before `shared` is the same in all rows. No autograd."""
    q, k, v, nothing = q.contiguous(), k.contiguous(), v.contiguous(), q.new_empty(0)
    out = torch.empty_like(q)
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], stores[0].shape[2], shared, rule.window or 0, rule.scale)
    _call("attend_rows", q, k, v, *stores, out, *(angles or (nothing, nothing)), places_B, *sizes)
    return out


# ---------------------------------------------------------------- CUDA


def _varlen_attn():
    """torch's variable-length flash attention, where this torch has it (2.10 and later)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """One fused call for the whole pack. Soft-capped layers have no such kernel and take the mask. Shared keys are
    gathered for each segment; the last query of a segment sees its last key."""
    varlen_attn = _varlen_attn()
    if rule.softcap or varlen_attn is None:
        return mask(q, k, v, layout, rule)
    ends = key_ends = _ends(layout.lengths).to(q.device, non_blocking=True)
    longest = most_keys = max(layout.lengths)
    if layout.parents:
        seen = [layout.before(i) + length for i, length in enumerate(layout.lengths)]
        key_ends, most_keys = _ends(seen).to(q.device, non_blocking=True), max(seen)
        keys = torch.arange(len(k))
        keys = torch.cat([continued(keys, layout, i) for i in range(len(seen))]).to(q.device, non_blocking=True)
        k, v = k[keys], v[keys]
    window = (-1, 0) if rule.window is None else (rule.window - 1, 0)
    grouped = k.shape[1] != q.shape[1]
    out = varlen_attn(
        q, k, v, ends, key_ends, longest, most_keys, scale=rule.scale, window_size=window, enable_gqa=grouped
    )
    assert isinstance(out, Tensor)  # a tuple only where its log-sum-exp is asked for
    return out


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32)


def mask(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """One call with a T x T mask: correct everywhere, fast nowhere."""
    allowed = visible_pack(layout, rule.window).to(q.device)
    q_NTD, k_KTD, v_KTD = (x.transpose(0, 1) for x in (q, k, v))
    if rule.softcap:
        return _scores_to_output(q_NTD, k_KTD, v_KTD, allowed, rule).transpose(0, 1)
    out = F.scaled_dot_product_attention(
        q_NTD[None], k_KTD[None], v_KTD[None], attn_mask=allowed, scale=rule.scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def visible_pack(layout: Layout, window: int | None) -> Tensor:
    """Boolean [T, T]: may the row's token see the column's?"""
    continues = torch.eye(len(layout.lengths), dtype=torch.bool)
    for segment in range(len(layout.lengths)):
        continues[segment, list(layout.path(segment))] = True
    segment_T = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.tensor(layout.lengths))
    first = torch.tensor([start - layout.before(i) for i, start in enumerate(layout.starts)])
    position_T = torch.arange(layout.tokens) - first[segment_T]
    distance = position_T[:, None] - position_T
    return continues[segment_T][:, segment_T] & (distance >= 0) & (distance < (window or layout.tokens + 1))


BACKENDS = {"reference": reference, "documents": documents, "kernel": kernel, "varlen": varlen, "mask": mask}


# ---------------------------------------------------------------- inside stock attention modules


def stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    backend: str = "auto",
    rows: RowCache | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What transformers' AttentionInterface calls for modules that tunesmith does not replace: [1, N, T, D] in,
    [1, T, N, D] out. Refuses what it would have to ignore."""
    unknown = {k for k in ("s_aux", "position_bias", "head_mask") if kwargs.get(k) is not None}
    if unknown or attention_mask is not None:
        raise InputError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown)) or 'a mask'} to attention, which packs ignore",
            fix="use a model family from the list in docs/models.md",
        )
    scaling, window, softcap = kwargs.get("scaling"), kwargs.get("sliding_window"), kwargs.get("softcap")
    rule = Rule(
        scale=float(scaling) if isinstance(scaling, int | float) else query.shape[-1] ** -0.5,
        window=window if isinstance(window, int) else None,
        softcap=float(softcap) if isinstance(softcap, int | float) else None,
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if rows is not None:
        return rows.attend(module, q, k, v, layout, rule, backend)[None], None
    return attend(q, k, v, layout, rule, backend)[None], None
