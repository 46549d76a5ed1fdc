"""Attention over a shared prefix and over the rest of a document, merged by log-sum-exp, equals
attention under a dense mask in fp64, forward and backward; and it is chosen where it is cheaper."""

import pytest
import torch
from torch import Tensor

from flash_on_cpu import differentiate, flash_on_cpu, layout_of, make_inputs
from tunesmith.core.types import PackLayout
from tunesmith.model.attention import BACKENDS, AttentionConfig
from tunesmith.model.flash_attention import (
    attend_flash,
    attend_gathered,
    attend_merged,
    build_merged_offsets,
    is_merging_cheaper,
)
from tunesmith.model.kernels import ops

CPU = torch.device("cpu")
LAYOUTS = {
    "one prefix": layout_of((30, 5, 7, 1), (-1, 0, 0, 0)),
    "a document before and two after": layout_of((4, 9, 5, 7, 6, 1), (-1, -1, 1, 1, -1, -1)),
    "pairs": layout_of((9, 5, 7, 3, 8, 12, 2, 2), (-1, 0, 0, -1, 3, 3, -1, 6)),
    "a conversation": layout_of((9, 5, 17, 3), (-1, 0, 1, 2)),
    # the children of the first one are no neighbors
    "branches of a branch": layout_of((15, 20, 3, 1, 20, 31, 2), (-1, 0, 1, 1, 0, 0, -1)),
}
HEADS = [(4, 4, 8), (6, 2, 8)]  # query heads, key heads, head size
NAMES = ("out", "dq", "dk", "dv", "dsinks")


@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_a_dense_mask_in_fp64(
    layout: PackLayout, heads: tuple[int, int, int], has_sinks: bool
) -> None:
    *values, dout = make_inputs(layout, heads)
    q, k, v, sinks = (x.requires_grad_() for x in values)
    leaves = (q, k, v, sinks) if has_sinks else (q, k, v)
    config = AttentionConfig(0.3, sinks_N=sinks if has_sinks else None)
    with flash_on_cpu():
        out = attend_merged(q, k, v, layout, scale=0.3, sinks_N=config.sinks_N)
        ours = differentiate(out, leaves, dout)
    expected = differentiate(BACKENDS["dense_mask"](q, k, v, layout, config), leaves, dout)
    for name, actual, other in zip(NAMES, ours, expected, strict=False):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12, msg=name)


def test_the_layout_of_the_inputs_in_memory_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Latent attention has the heads before the tokens; flash attention answers in the layout of
    its queries, and our kernel counts on that of [T, N, D]."""
    mix_rows = ops.mix_rows

    def check(x: Tensor, other: Tensor, shares: Tensor) -> None:
        assert all(tensor.is_contiguous() for tensor in (x, other, shares))
        mix_rows(x, other, shares)

    monkeypatch.setattr(ops, "mix_rows", check)
    for layout in LAYOUTS.values():
        q, k, v, *_ = make_inputs(layout, HEADS[0])
        with flash_on_cpu():
            expected = attend_merged(q, k, v, layout, scale=0.3)
            q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
            torch.testing.assert_close(attend_merged(q, k, v, layout, scale=0.3), expected)


def test_a_branch_changes_no_other() -> None:
    layout = LAYOUTS["one prefix"]
    q, k, v, *_ = make_inputs(layout, HEADS[0])
    with flash_on_cpu():
        before = attend_merged(q, k, v, layout, scale=1.0)
        v[30:35] += 1
        after = attend_merged(q, k, v, layout, scale=1.0)
    assert torch.equal(before[:30], after[:30])
    assert torch.equal(before[35:], after[35:])
    assert not torch.equal(before[30:35], after[30:35])


def test_large_scores_stay_finite() -> None:
    """Of which the prefix, or the rest, gets all of the softmax."""
    layout = LAYOUTS["pairs"]
    *values, dout = make_inputs(layout, HEADS[0])
    q, k, v = leaves = tuple(x.requires_grad_() for x in values[:3])
    config = AttentionConfig(400.0)
    with flash_on_cpu():
        ours = differentiate(attend_merged(q, k, v, layout, scale=400.0), leaves, dout)
    expected = differentiate(BACKENDS["dense_mask"](q, k, v, layout, config), leaves, dout)
    for name, actual, other in zip(NAMES, ours, expected, strict=False):
        torch.testing.assert_close(actual, other, rtol=1e-9, atol=1e-9, msg=name)


def test_one_prefix_is_read_where_it_is() -> None:
    """Nothing is gathered, and only what continues it is merged."""
    build_merged_offsets.cache_clear()
    offsets = build_merged_offsets(LAYOUTS["one prefix"], CPU)
    assert offsets.keys_P == slice(0, 30)
    assert offsets.queries_R == slice(30, 43)
    assert offsets.prefixes.queries.tolist() == [0, 13]
    assert offsets.prefixes.keys.tolist() == [0, 30]
    assert build_merged_offsets(LAYOUTS["one prefix"], CPU) is offsets


def test_neighbors_share_the_keys_that_are_gathered() -> None:
    offsets = build_merged_offsets(LAYOUTS["pairs"], CPU)
    assert offsets.prefixes.queries.tolist() == [0, 12, 32, 34]
    assert offsets.prefixes.keys.tolist() == [0, 9, 12, 14]
    assert offsets.queries_R.tolist() == [*range(9, 21), *range(24, 44), 46, 47]
    assert offsets.keys_P.tolist() == [*range(9), *range(21, 24), *range(44, 46)]
    assert not offsets.has_repeated_keys
    assert build_merged_offsets(LAYOUTS["branches of a branch"], CPU).has_repeated_keys


def test_gradients_of_repeated_keys_are_summed_in_fp32() -> None:
    """300 runs add to a root; a sum in bf16 stops growing at 256."""
    parents = [-1]
    for _ in range(300):
        parents += [0, len(parents)]
    layout = layout_of((1,) * 601, tuple(parents))
    q = torch.zeros(601, 1, 8, dtype=torch.bfloat16)
    v = torch.zeros_like(q).requires_grad_()
    dout = torch.zeros_like(q)
    dout[1::2] = 2.0
    with flash_on_cpu():
        out = attend_merged(q, q, v, layout, scale=1.0)
        (dv,) = torch.autograd.grad(out, v, dout)
    assert dv[0].tolist() == [[300.0] * 8]


SHORT_ANSWERS = layout_of((1000, *(50,) * 20), (-1, *(0,) * 20))
LONG_ANSWERS = layout_of((50, *(300,) * 20), (-1, *(0,) * 20))


@pytest.mark.parametrize(
    ("layout", "heads", "window", "expected"),
    [
        (SHORT_ANSWERS, (32, 8), None, True),
        (SHORT_ANSWERS, (32, 8), 1050, True),
        # the window of the last tokens does not reach the first ones
        (SHORT_ANSWERS, (32, 8), 1049, False),
        (LONG_ANSWERS, (32, 8), None, False),
        (layout_of((5, 7)), (8, 8), None, False),
    ],
)
def test_it_is_chosen_where_it_moves_fewer_bytes(
    layout: PackLayout, heads: tuple[int, int], window: int | None, expected: bool
) -> None:
    assert is_merging_cheaper(layout, *heads, window) == expected


@pytest.mark.promise
def test_attention_of_a_pack_makes_the_choice() -> None:
    """The other way differs in the last bits."""
    for layout, chosen, other in (
        (SHORT_ANSWERS, attend_merged, attend_gathered),
        (LONG_ANSWERS, attend_gathered, attend_merged),
    ):
        q, k, v, *_ = make_inputs(layout, (8, 1, 8))
        with flash_on_cpu():
            ours = attend_flash(q, k, v, layout, scale=1.0)
            assert torch.equal(ours, chosen(q, k, v, layout, scale=1.0))
            assert not torch.equal(ours, other(q, k, v, layout, scale=1.0))
