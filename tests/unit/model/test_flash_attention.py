"""Attention through torch's two flash attention operators equals the reference, forward and
backward, over an implementation of these operators on the CPU; and it is chosen where they are."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.core.errors import InputError
from tunesmith.core.types import PackLayout
from tunesmith.model import flash_attention as module
from tunesmith.model.attention import (
    BACKENDS,
    AttentionConfig,
    attend_in_blocks,
    reference_attention,
)
from tunesmith.model.flash_attention import attend_flash, build_offsets


def layout_of(lengths: tuple[int, ...], parents: tuple[int, ...] = ()) -> PackLayout:
    return PackLayout((0, *itertools.accumulate(lengths[:-1])), lengths, parents)


LAYOUTS = {
    "one token": layout_of((1,)),
    "documents": layout_of((7, 5, 5, 97, 64, 1)),
    "branches": layout_of((3, 2, 1, 4), (-1, 0, 0, -1)),
    "forest": layout_of((15, 60, 33, 1, 20, 31), (-1, 0, 0, 2, 2, -1)),
}
WINDOWS = [None, 1, 5, 48, 1000]
HEADS = [(4, 4, 8), (6, 2, 8), (3, 1, 16)]  # query heads, key heads, head size
NAMES = ("out", "dq", "dk", "dv", "dsinks")


# ---------------------------------------------------------------- the operators, on the CPU


def iter_segments(
    q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Yield the rows of the queries and the keys of a segment, and its scores [N, L, P], keys and
    values [N, P, D]; the last query is aligned with the last key."""
    query_ends = arguments["cum_seq_q"].tolist()
    key_ends = arguments["cum_seq_k"].tolist()
    groups = q.shape[1] // k.shape[1]
    for index in range(len(query_ends) - 1):
        queries = slice(query_ends[index], query_ends[index + 1])
        keys = slice(key_ends[index], key_ends[index + 1])
        k_NPD, v_NPD = (x[keys].transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
        scores = q[queries].transpose(0, 1) @ k_NPD.transpose(1, 2) * arguments["scale"]
        length, context = scores.shape[1:]
        distance = torch.arange(context - length, context)[:, None] - torch.arange(context)
        is_seen = distance >= 0
        if arguments["window_size_left"] >= 0:
            is_seen &= distance <= arguments["window_size_left"]
        yield queries, keys, scores.masked_fill(~is_seen, -torch.inf), k_NPD, v_NPD


def run_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    names = ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p")
    arguments = dict(zip((*names, "is_causal", "return_debug_mask"), args, strict=True)) | kwargs
    assert arguments["is_causal"]
    assert arguments["window_size_right"] == 0
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
    """From the output and the log-sum-exp alone, as the kernel does it."""
    names = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")
    dout, q, k, v, out, logsumexp_NT = args[:6]
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


@pytest.fixture
def cpu_operators() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", run_forward, "CPU")
        library.impl("_flash_attention_backward", run_backward, "CPU")
        yield


# ---------------------------------------------------------------- equal to the reference


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


@pytest.mark.usefixtures("cpu_operators")
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_the_reference_in_fp64(
    layout: PackLayout,
    window: int | None,
    heads: tuple[int, int, int],
    has_sinks: bool,
) -> None:
    *values, dout = make_inputs(layout, heads)
    q, k, v, sinks = leaves = tuple(x.requires_grad_() for x in values)
    config = AttentionConfig(0.3, window)
    if has_sinks:
        config = dataclasses.replace(config, sinks_N=sinks)
    else:
        leaves = (q, k, v)
    out = attend_flash(q, k, v, layout, scale=0.3, window=window, sinks_N=config.sinks_N)
    ours = differentiate(out, leaves, dout)
    expected = differentiate(reference_attention(q, k, v, layout, config), leaves, dout)
    for name, actual, other in zip(NAMES, ours, expected, strict=False):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12, msg=name)


def test_the_offsets_are_copied_once_for_all_layers() -> None:
    layout = LAYOUTS["forest"]
    build_offsets.cache_clear()
    first = build_offsets(layout, torch.device("cpu"))
    assert build_offsets(layout_of(layout.lengths, layout.parents), torch.device("cpu")) is first
    assert first.keys.tolist() == [0, 15, 90, 138, 187, 255, 286]
    assert first.max_keys == 75


@pytest.mark.usefixtures("cpu_operators")
def test_gradients_of_shared_rows_are_summed_in_fp32() -> None:
    """300 branches add to a prefix; a sum in bf16 stops growing at 256."""
    lengths = (1, *(1,) * 300)
    layout = layout_of(lengths, (-1, *(0,) * 300))
    q = torch.zeros(301, 1, 8, dtype=torch.bfloat16)
    v = torch.zeros_like(q).requires_grad_()
    dout = torch.full_like(q, 2.0)
    dout[0] = 0
    out = attend_flash(q, q, v, layout, scale=1.0)
    (dv,) = torch.autograd.grad(out, v, dout)
    assert dv[0].tolist() == [[300.0] * 8]


def test_the_operators_have_the_arguments_that_are_passed() -> None:
    """The first ones by position, the last three by name: as in torch 2.8 to 2.13."""
    forward = torch.ops.aten._flash_attention_forward.default._schema
    backward = torch.ops.aten._flash_attention_backward.default._schema
    for schema, num_positional in ((forward, 10), (backward, 14)):
        positional = [a for a in schema.arguments if not a.kwarg_only]
        named = [a.name for a in schema.arguments if a.kwarg_only]
        assert len(positional) == num_positional
        assert named[:3] == ["scale", "window_size_left", "window_size_right"]
    assert len(forward.returns) == 5


# ---------------------------------------------------------------- what has no such kernel


def test_other_dtypes_are_refused_by_name() -> None:
    q = torch.zeros(3, 1, 8)
    with pytest.raises(InputError, match="dtype is float32") as caught:
        BACKENDS["varlen"](q, q, q, layout_of((3,)), AttentionConfig(1.0))
    assert "sdpa" in caught.value.fix


@pytest.mark.parametrize(
    "config_and_size", [(AttentionConfig(0.5, softcap=2.0), 8), (AttentionConfig(0.5), 12)], ids=str
)
def test_other_layers_attend_per_document(config_and_size: tuple[AttentionConfig, int]) -> None:
    """Without the operators: calling them would fail."""
    config, size = config_and_size
    layout = LAYOUTS["forest"]
    inputs = [x.bfloat16() for x in make_inputs(layout, (4, 2, size))[:3]]
    ours = BACKENDS["varlen"](*inputs, layout, config)
    assert torch.equal(ours, BACKENDS["sdpa"](*inputs, layout, config))


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "expected"),
    [
        (torch.bfloat16, 64, (8, 0), True),
        (torch.float16, 256, (9, 0), True),
        (torch.float32, 64, (9, 0), False),
        (torch.bfloat16, 64, (7, 5), False),
        (torch.bfloat16, 60, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False),
    ],
)
def test_kernels_need_16_bits_a_head_size_and_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    size: int,
    capability: tuple[int, int],
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert module.has_flash_kernels(torch.zeros(1, 1, size, dtype=dtype)) == expected


@pytest.mark.parametrize("prefix", [0, 6])
@pytest.mark.parametrize("window", [None, 3])
def test_blocks_of_queries_equal_all_at_once(window: int | None, prefix: int) -> None:
    """A soft cap on a GPU: 7 queries in blocks of 2, forward and backward."""
    config = AttentionConfig(0.5, window, softcap=2.0)
    layout = layout_of((prefix, 7), (-1, 0)) if prefix else layout_of((7,))
    q, k, v, _, dout = make_inputs(layout, (2, 2, 8))
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    dout[:prefix] = 0
    expected = differentiate(reference_attention(q, k, v, layout, config), leaves, dout)
    q_BNLD, k_BNPD, v_BNPD = (x.transpose(0, 1)[None] for x in (q[prefix:], k, v))
    max_scores = 2 * 2 * (prefix + 7)
    out = attend_in_blocks(q_BNLD, k_BNPD, v_BNPD, config, max_scores)[0].transpose(0, 1)
    ours = differentiate(out, leaves, dout[prefix:])
    torch.testing.assert_close(ours[0], expected[0][prefix:])
    for actual, other in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(actual, other)
