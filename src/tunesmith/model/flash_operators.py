"""torch's two operators of flash attention for packs, forward and backward, and their arguments.

In: q [T, N, D], k and v [P, K, D] in 16 bits, and where the queries and keys of each segment begin.
Out: [T, N, D] with the log-sum-exp of its scores, and gradients. The operators are called directly:
torch's functions above them take other arguments in each release from 2.10 to 2.13, and these are
the same from 2.8 on. Left out: which keys a segment sees (flash_attention.py, merged_attention.py).
Legend: T tokens, P rows of keys, N query heads, K key/value heads, D head size."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.hardware import upload
from tunesmith.core.types import PackLayout


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
