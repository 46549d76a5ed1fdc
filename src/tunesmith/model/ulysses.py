"""Attention over documents that several ranks share: Ulysses (Jacobs 2023).

    q, k, v = exchange_heads(q, k, v, shard)    its tokens of all heads -> all tokens of its heads
    out = restore_tokens(out, shard)            back

A layer works on each token alone, but for attention: there, ranks that share a pack change tokens
for heads in one all-to-all, attend with the layout of the whole pack, and change back in another.
The backward pass does the same with the gradients. Left out: layers that carry a state from token
to token, which the plan refuses. Legend: T tokens of the pack, U tokens of this rank, N query
heads, K key/value heads, D head size, C ranks that share the pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import format_count
from tunesmith.core.token_shard import TokenShard

ExchangeFn = Callable[[Tensor, TokenShard], Tensor]


def exchange_heads(
    q: Tensor, k: Tensor, v: Tensor, shard: TokenShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [T, N/C, D], k and v [T, K/C, D] of all tokens, from [U, N, D] and [U, K, D] of this
    rank's. Raise InputError for a number of heads that the ranks do not divide."""
    if k.shape[1] % shard.size:
        heads = format_count(k.shape[1], "KV head")
        message = f"a layer has {heads}, which {shard.size} processes do not divide"
        raise InputError(
            message,
            where=f"context_parallel_size: {shard.size}",
            fix="set context_parallel_size: 1",
        )
    parts = [x.unflatten(1, (shard.size, -1)) for x in (q, k, v)]
    num_heads = [part.shape[2] for part in parts]
    # of each rank its query heads, then the keys and the values that they see
    heads = torch.cat(parts, dim=2).flatten(1, 2)
    gathered: Tensor = _Exchange.apply(heads, shard, _gather_tokens, _gather_heads)
    q, k, v = gathered.split(num_heads, dim=1)
    return q, k, v


def restore_tokens(out: Tensor, shard: TokenShard) -> Tensor:
    """Return [U, N, D] of this rank's tokens, from [T, N/C, D] of its heads."""
    return _Exchange.apply(out, shard, _gather_heads, _gather_tokens)


def select_heads(values_N: Tensor | None, shard: TokenShard) -> Tensor | None:
    """Return the part of a vector with one number for each head that this rank attends with."""
    return None if values_N is None else values_N.chunk(shard.size)[shard.index]


class _Exchange(torch.autograd.Function):
    """An exchange between the ranks of a pack, and the inverse one for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shard: TokenShard, exchange: ExchangeFn, inverse: ExchangeFn
    ) -> Tensor:
        ctx.shard = shard
        ctx.inverse = inverse
        return exchange(x, shard)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.inverse(gradients[0], ctx.shard), None, None, None


def _gather_tokens(x: Tensor, shard: TokenShard) -> Tensor:
    """Return [T, heads / C, D] from [U, heads, D]: each rank gets its heads of these tokens."""
    x_CUND = x.unflatten(1, (shard.size, -1)).transpose(0, 1)
    sent = x_CUND.flatten(0, 1).contiguous()
    received = x.new_empty(shard.num_tokens, *sent.shape[1:])
    shard.exchange(sent, received, [len(x)] * shard.size, shard.lengths)
    return received


def _gather_heads(x: Tensor, shard: TokenShard) -> Tensor:
    """Return [U, heads, D] from [T, heads / C, D]: each rank gets its tokens of these heads."""
    num_tokens = shard.lengths[shard.index]
    received = x.new_empty(shard.size * num_tokens, *x.shape[1:])
    shard.exchange(x.contiguous(), received, shard.lengths, [num_tokens] * shard.size)
    return received.unflatten(0, (shard.size, num_tokens)).transpose(0, 1).flatten(1, 2)
