"""Attention through torch's two flash attention operators equals the reference, forward and
backward, over an implementation of these operators on the CPU; and it is chosen where they are."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from flash_on_cpu import differentiate, flash_on_cpu, layout_of, make_inputs
from tunesmith.core.errors import InputError
from tunesmith.core.types import PackLayout
from tunesmith.model import flash_attention as module
from tunesmith.model.attention import (
    BACKENDS,
    AttentionConfig,
    attend_in_blocks,
    reference_attention,
)
from tunesmith.model.flash_attention import attend_flash, attend_gathered, build_offsets

LAYOUTS = {
    "one token": layout_of((1,)),
    "documents": layout_of((7, 5, 5, 97, 64, 1)),
    "branches": layout_of((3, 2, 1, 4), (-1, 0, 0, -1)),
    "forest": layout_of((15, 60, 33, 1, 20, 31), (-1, 0, 0, 2, 2, -1)),
}
WINDOWS = [None, 1, 5, 48, 1000]
HEADS = [(4, 4, 8), (6, 2, 8), (3, 1, 16)]  # query heads, key heads, head size
NAMES = ("out", "dq", "dk", "dv", "dsinks")


# ---------------------------------------------------------------- equal to the reference


@pytest.fixture
def cpu_operators() -> Iterator[None]:
    with flash_on_cpu():
        yield


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
    gathered = attend_gathered(q, k, v, layout, scale=0.3, window=window, sinks_N=config.sinks_N)
    expected = differentiate(reference_attention(q, k, v, layout, config), leaves, dout)
    for ours in (differentiate(out, leaves, dout), differentiate(gathered, leaves, dout)):
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
    out = attend_gathered(q, q, v, layout, scale=1.0)
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
        (torch.bfloat16, 192, (8, 9), True),
        (torch.bfloat16, 208, (8, 9), False),  # its backward has no kernel there
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
