"""Attention sinks: every backend equals the written-out softmax, forward and backward."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tunesmith.core.types import PackLayout
from tunesmith.model.attention import BACKENDS, AttentionConfig, attend, reference_attention
from tunesmith.model.kernels import ops

LAYOUTS = {
    "one token": PackLayout((0,), (1,)),
    "documents": PackLayout((0, 7, 12, 17, 114), (7, 5, 5, 97, 64)),
    "forest": PackLayout((0, 115, 175, 208, 305), (115, 60, 33, 97, 20), (-1, 0, 0, 2, -1)),
}
WINDOWS = [None, 1, 48]
NAMES = ("out", "dq", "dk", "dv", "dsinks")


def make_inputs(
    layout: PackLayout, heads: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return q, k, v, sinks and the gradient of the output."""
    num_heads, num_kv_heads, size = heads
    tokens = layout.num_tokens
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, n, size) for n in (num_heads, num_kv_heads, num_kv_heads)]
    tensors = []
    for shape in (*shapes, (num_heads,), (tokens, num_heads, size)):
        tensors.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    return tuple(tensors)


def run(
    backend: str, inputs: tuple[Tensor, ...], layout: PackLayout, config: AttentionConfig
) -> list[Tensor]:
    """Return the output and the gradients of q, k, v and the sinks."""
    q, k, v, sinks = (x.detach().clone().requires_grad_() for x in inputs[:4])
    out = attend(q, k, v, layout, dataclasses.replace(config, sinks_N=sinks), backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, sinks), inputs[4])]


def test_the_reference_is_the_softmax_with_one_more_score() -> None:
    layout = PackLayout((0, 2), (2, 3))
    q, k, v, sinks, _ = make_inputs(layout, (2, 1, 4), torch.float64)
    config = AttentionConfig(0.7, window=2, softcap=1.5, sinks_N=sinks)
    out = reference_attention(q, k, v, layout, config)
    for token, seen in {0: [0], 1: [0, 1], 2: [2], 3: [2, 3], 4: [3, 4]}.items():
        for head in range(2):
            scores = [1.5 * torch.tanh(0.7 * (q[token, head] @ k[j, 0]) / 1.5) for j in seen]
            weights = torch.stack([*scores, sinks[head]]).softmax(0)[:-1]
            torch.testing.assert_close(out[token, head], (weights[:, None] * v[seen, 0]).sum(0))


@pytest.mark.parametrize("heads", [(4, 4, 8), (6, 2, 8)], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", ["sdpa", "dense_mask", "cpu_kernel"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_backends_equal_the_reference_in_fp64(
    layout: PackLayout, backend: str, window: int | None, heads: tuple[int, int, int]
) -> None:
    config = AttentionConfig(0.3, window)
    inputs = make_inputs(layout, heads, torch.float64)
    ours = run(backend, inputs, layout, config)
    expected = run("reference", inputs, layout, config)
    for name, actual, other in zip(NAMES, ours, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "backend", sorted(BACKENDS.keys() - {"varlen"})
)  # 16 bits: see test_flash_attention
def test_a_sink_far_below_all_scores_changes_nothing(backend: str) -> None:
    layout = LAYOUTS["forest"]
    *inputs, sinks, _ = make_inputs(layout, (4, 2, 64), torch.float64)
    plain = attend(*inputs, layout, AttentionConfig(0.1), backend)
    low = AttentionConfig(0.1, sinks_N=torch.full_like(sinks, -1e4))
    torch.testing.assert_close(attend(*inputs, layout, low, backend), plain)
    with_sinks = attend(*inputs, layout, AttentionConfig(0.1, sinks_N=sinks), backend)
    assert ((with_sinks - plain).norm(dim=-1) > 1e-3 * plain.norm(dim=-1)).all()


@pytest.mark.skipif(not ops.has_attention(), reason="needs a compiler and AVX512-BF16")
@pytest.mark.parametrize("heads", [(4, 4, 64), (9, 3, 64), (2, 1, 128)], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_kernel_is_near_the_truth(
    layout: PackLayout, window: int | None, heads: tuple[int, int, int]
) -> None:
    """Against fp64 on the same bf16 inputs, as without sinks (test_attention.py). With one visible
    key, a gradient of scores is the small difference of two rounded numbers, and that of a sink is
    a sum over all tokens, whose signs differ."""
    tolerances = dict.fromkeys(NAMES, 6e-3) | {"dsinks": 2e-2}
    if window == 1 or layout.num_tokens == 1:
        tolerances = dict.fromkeys(NAMES, 2e-2)
    config = AttentionConfig(0.06, window)
    inputs = make_inputs(layout, heads, torch.bfloat16)
    exact = run("reference", tuple(x.double() for x in inputs), layout, config)
    ours = run("cpu_kernel", inputs, layout, config)
    for name, actual, truth in zip(NAMES, ours, exact, strict=True):
        # the gradient of a single token's scores is about 0
        size = truth.norm() + 1e-3 * truth.numel() ** 0.5
        assert float((actual.double() - truth).norm() / size) < tolerances[name], name
