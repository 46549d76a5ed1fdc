"""torch's two operators of flash attention on the CPU, in any dtype, and inputs for attention.

They compute with explicit scores what the kernels do, from the same arguments; the backward takes
the output and the log-sum-exp alone."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.types import PackLayout


def layout_of(lengths: tuple[int, ...], parents: tuple[int, ...] = ()) -> PackLayout:
    return PackLayout((0, *itertools.accumulate(lengths[:-1])), lengths, parents)


def make_inputs(layout: PackLayout, heads: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Return q, k, v, sinks and the gradient of the output."""
    num_heads, num_kv_heads, size = heads
    tokens = layout.num_tokens
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, n, size) for n in (num_heads, num_kv_heads, num_kv_heads)]
    tensors: list[Tensor] = []
    for shape in (*shapes, (num_heads,), (tokens, num_heads, size)):
        tensors.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return tuple(tensors)


def differentiate(out: Tensor, leaves: tuple[Tensor, ...], dout: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def iter_segments(
    q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Yield the rows of the queries and the keys of a segment, and its scores [N, L, P], keys and
    values [N, P, D]; if causal, the last query is aligned with the last key."""
    query_ends = arguments["cum_seq_q"].tolist()
    key_ends = arguments["cum_seq_k"].tolist()
    assert query_ends[-1] == len(q)
    assert key_ends[-1] == len(k)
    groups = q.shape[1] // k.shape[1]
    for index in range(len(query_ends) - 1):
        queries = slice(query_ends[index], query_ends[index + 1])
        keys = slice(key_ends[index], key_ends[index + 1])
        k_NPD, v_NPD = (x[keys].transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
        scores = q[queries].transpose(0, 1) @ k_NPD.transpose(1, 2) * arguments["scale"]
        length, context = scores.shape[1:]
        distance = torch.arange(context - length, context)[:, None] - torch.arange(context)
        is_seen = torch.ones(length, context, dtype=torch.bool)
        if arguments["is_causal"]:
            is_seen = distance >= 0
        if arguments["window_size_left"] >= 0:
            is_seen &= distance <= arguments["window_size_left"]
        assert is_seen.any(1).all(), "every query has a key"
        yield queries, keys, scores.masked_fill(~is_seen, -torch.inf), k_NPD, v_NPD


def run_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    names = ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p")
    arguments = dict(zip((*names, "is_causal", "return_debug_mask"), args, strict=True)) | kwargs
    assert arguments["window_size_right"] == (0 if arguments["is_causal"] else -1)
    assert arguments["cum_seq_q"].dtype == arguments["cum_seq_k"].dtype == torch.int32
    q, k, v = args[:3]
    assert arguments["max_q"] == int(arguments["cum_seq_q"].diff().max())
    assert arguments["max_k"] == int(arguments["cum_seq_k"].diff().max())
    out = torch.empty_like(q)
    logsumexp_NT = q.new_empty(q.shape[1], q.shape[0])
    for queries, _, scores, _, v_NPD in iter_segments(q, k, v, arguments):
        logsumexp_NT[:, queries] = scores.logsumexp(-1)
        out[queries] = (scores.softmax(-1) @ v_NPD).transpose(0, 1)
    return out, logsumexp_NT, torch.empty(2), torch.empty(0), torch.empty(0)


def run_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    names = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")
    dout, q, k, v, out, logsumexp_NT = args[:6]
    assert logsumexp_NT.is_contiguous(), "the kernel knows no stride of it"
    arguments = dict(zip((*names, "rng_state", "unused"), args[6:], strict=True)) | kwargs
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for queries, keys, scores, k_NPD, v_NPD in iter_segments(q, k, v, arguments):
        weights = (scores - logsumexp_NT[:, queries, None]).exp()
        dout_NLD = dout[queries].transpose(0, 1)
        products = (dout_NLD * out[queries].transpose(0, 1)).sum(-1, keepdim=True)
        dscores = weights * (dout_NLD @ v_NPD.transpose(1, 2) - products) * arguments["scale"]
        dq[queries] = (dscores @ k_NPD).transpose(0, 1)
        for total, gradient in (
            (dk, dscores.transpose(1, 2) @ q[queries].transpose(0, 1)),
            (dv, weights.transpose(1, 2) @ dout_NLD),
        ):
            summed = gradient.unflatten(0, (k.shape[1], -1)).sum(1)
            total[keys] = summed.transpose(0, 1)
    return dq, dk, dv


@contextmanager
def flash_on_cpu() -> Iterator[None]:
    """Let the two operators run on CPU tensors."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", run_forward, "CPU")
        library.impl("_flash_attention_backward", run_backward, "CPU")
        yield
