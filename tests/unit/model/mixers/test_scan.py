"""The chunked scan and the convolution equal the recurrence token by token, along every path of any
forest of segments."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scan_reference import make_inputs, make_layout, run_path, run_reference
from tunesmith.core.types import PackLayout
from tunesmith.model.mixers import scan
from tunesmith.model.mixers.convolution import continue_convolution, convolve_pack
from tunesmith.model.mixers.recurrence import cut_chunks, find_edges, find_tails
from tunesmith.model.mixers.scan import ScanInputs, ScanShape, continue_rows, scan_pack

DELTA = ScanShape(2, 3, key_size=4, value_size=5, is_delta_rule=True, chunk_size=4)
MAMBA2 = ScanShape(2, 3, key_size=4, value_size=5, is_delta_rule=False, chunk_size=4)
SHAPES = pytest.mark.parametrize("shape", [DELTA, MAMBA2], ids=["delta", "mamba2"])
CPU = torch.device("cpu")


def list_leaves(inputs: ScanInputs) -> list[Tensor]:
    return [x.requires_grad_() for x in vars(inputs).values() if x is not None]


def compute_both(
    inputs: ScanInputs, shape: ScanShape, layout: PackLayout
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs and every gradient: ours, and those of the reference."""
    leaves = list_leaves(inputs)
    expected = run_reference(inputs, shape, layout)
    out = scan_pack(inputs, shape, layout)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    ours = [out, *torch.autograd.grad(out, leaves, direction)]
    return ours, [expected, *torch.autograd.grad(expected, leaves, direction)]


forests = st.lists(st.tuples(st.integers(-1, 6), st.integers(1, 13)), min_size=1, max_size=7)


@SHAPES
@settings(max_examples=15, deadline=None)
@given(forests)
def test_any_forest_equals_the_recurrence(
    shape: ScanShape, segments: list[tuple[int, int]]
) -> None:
    layout = make_layout(segments)
    ours, theirs = compute_both(make_inputs(layout.num_tokens, shape), shape, layout)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-8, atol=1e-8)


@SHAPES
def test_the_edges_of_chunks(shape: ScanShape) -> None:
    lengths = (130, 70, 64, 65, 3, 128, 1)
    layout = make_layout([(-1, length) for length in lengths])
    shape = dataclasses.replace(shape, chunk_size=64)
    ours, theirs = compute_both(make_inputs(layout.num_tokens, shape), shape, layout)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-8, atol=1e-8)


@SHAPES
@pytest.mark.parametrize("bias", [True, False])
def test_few_heads_at_a_time_change_nothing(
    shape: ScanShape, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_layout([(-1, 9), (0, 5), (0, 2), (-1, 6)])
    inputs = make_inputs(layout.num_tokens, shape)
    if not bias:
        inputs = dataclasses.replace(inputs, bias_C=None, skip_H=None)
    leaves = list_leaves(inputs)
    expected = scan_pack(inputs, shape, layout)
    grads = torch.autograd.grad(expected.sum(), leaves)
    two_heads = 2 * 4 * shape.count_scan_values() * layout.num_tokens
    for scan_bytes in (0, two_heads):  # 1 and 2 of 6 heads
        monkeypatch.setattr(scan, "SCAN_BYTES", scan_bytes)
        pieces = list(shape.iter_pieces(layout.num_tokens))
        assert len(pieces) == (4 if scan_bytes else 6)
        out = scan_pack(inputs, shape, layout)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        for actual, wanted in zip(torch.autograd.grad(out.sum(), leaves), grads, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@contextmanager
def counted_storages() -> Iterator[dict[int, int]]:
    """Collect the storages that autograd saves."""
    storages: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield storages


@SHAPES
def test_nothing_but_the_inputs_is_saved(shape: ScanShape) -> None:
    layout = make_layout([(-1, 9), (0, 5)])
    inputs = make_inputs(layout.num_tokens, shape)
    leaves = list_leaves(inputs)
    with counted_storages() as storages:
        scan_pack(inputs, shape, layout)
    assert storages.keys() == {x.untyped_storage().data_ptr() for x in leaves}


# ---------------------------------------------------------------- rows of generation


@SHAPES
@pytest.mark.parametrize("steps", [(1, 1, 1), (3, 1, 6, 1)])
def test_rows_go_on_from_their_states(shape: ScanShape, steps: tuple[int, ...]) -> None:
    """Rows of 9, 1 and 5 tokens, then some more at a time."""
    lengths = (9, 1, 5)
    rows = [make_inputs(length + sum(steps), shape, seed) for seed, length in enumerate(lengths)]
    shared = {name: getattr(rows[0], name) for name in ("weight_CK", "bias_C", "skip_H")}
    rows = [dataclasses.replace(row, **shared) for row in rows]
    expected = [run_path(row, shape, list(range(len(row.mixed_TC)))) for row in rows]
    starts, counts, states = [0, 0, 0], list(lengths), None
    for step in (0, *steps):
        if step:
            starts = [start + count for start, count in zip(starts, counts, strict=True)]
            counts = [step] * len(rows)
        spans = [slice(s, s + n) for s, n in zip(starts, counts, strict=True)]
        new = {}
        for name in ("mixed_TC", "decay_TH", "beta_TH"):
            pieces = [getattr(row, name)[span] for row, span in zip(rows, spans, strict=True)]
            new[name] = torch.cat(pieces)
        layout = make_layout([(-1, count) for count in counts])
        out, states = continue_rows(dataclasses.replace(rows[0], **new), shape, layout, states)
        wanted = torch.cat([y[span] for y, span in zip(expected, spans, strict=True)])
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)


def test_the_history_of_a_row_may_be_shorter_than_the_taps() -> None:
    inputs = make_inputs(3, MAMBA2)
    layout = make_layout([(-1, 1)])
    y, history = None, None
    for t in range(3):
        y, history = continue_convolution(
            inputs.mixed_TC[t : t + 1], inputs.weight_CK, inputs.bias_C, layout, history
        )
    whole = convolve_pack(inputs.mixed_TC, inputs.weight_CK, inputs.bias_C, make_layout([(-1, 3)]))
    torch.testing.assert_close(y, whole[-1:])
    assert history is not None
    assert torch.equal(history[0], inputs.mixed_TC)


# ---------------------------------------------------------------- indices


def test_chunks_never_cross_a_segment_and_follow_their_parents() -> None:
    layout = make_layout([(-1, 6), (0, 5), (0, 2), (-1, 4), (1, 1)])
    chunks = cut_chunks(layout, 4, CPU)
    is_token = torch.ones(chunks.tokens_NL.numel(), dtype=torch.bool).index_fill(
        0, chunks.padding, 0
    )
    rows = zip(chunks.tokens_NL, is_token.view_as(chunks.tokens_NL), strict=True)
    spans = [tokens[is_real].tolist() for tokens, is_real in rows]
    assert sorted(spans) == [
        *([0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10], [11, 12], [13, 14, 15, 16], [17])
    ]
    before = {}
    previous: list[list[int]] = []
    for wave in chunks.waves:
        here = spans[wave.chunks]
        if wave.previous is not None:
            indices = torch.arange(len(previous))[wave.previous].tolist()
            for span, index in zip(here, indices, strict=True):
                before[min(span)] = previous[index]
        previous = here
    assert before == {4: [0, 1, 2, 3], 6: [4, 5], 10: [6, 7, 8, 9], 11: [4, 5], 17: [10]}
    assert [spans[i][-1] for i in chunks.last_chunks_S.tolist()] == [5, 10, 12, 16, 17]


def test_edges_read_along_their_path() -> None:
    layout = make_layout([(-1, 2), (0, 1), (1, 4), (-1, 1)])
    edges = find_edges(layout, 3, CPU)
    taps = dict(zip(edges.tokens_E.tolist(), edges.taps_KE.t().tolist(), strict=True))
    none = layout.num_tokens
    assert taps == {
        0: [0, none, none],
        1: [1, 0, none],
        2: [2, 1, 0],
        3: [3, 2, 1],
        4: [4, 3, 2],
        7: [7, none, none],
    }
    assert find_tails(layout, 2, CPU).tolist() == [[0, 1], [1, 2], [5, 6], [none, 7]]


def test_what_stands_in_another_document_is_not_even_read() -> None:
    """NaN in one document: the others are finite."""
    layout = make_layout([(-1, 5), (-1, 5), (1, 3)])
    for shape in (DELTA, MAMBA2):
        inputs = make_inputs(layout.num_tokens, shape)
        inputs.mixed_TC[:5] = float("nan")
        inputs.mixed_TC.requires_grad_()
        out = scan_pack(inputs, shape, layout)
        assert out[5:].isfinite().all()
        out[5:].sum().backward()
        assert inputs.mixed_TC.grad is not None
        assert inputs.mixed_TC.grad[5:].isfinite().all()
