"""The kernels of the convolution and the recurrence equal both token by token in fp64, on forests
of segments, up to the rounding of what they return in bf16."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preflight_models import prepare_model
from scan_reference import (
    NUM_TAPS,
    convolve_path,
    list_path,
    make_inputs,
    make_layout,
    run_recurrence,
)
from tiny_models import CONFIGS
from tunesmith.core.types import PackLayout
from tunesmith.model.kernels import scan as kernels
from tunesmith.model.mixers import scan
from tunesmith.model.mixers.recurrence import list_taps
from tunesmith.model.mixers.scan import ScanInputs, ScanShape, scan_pack
from tunesmith.train.preflight import run_preflight

pytestmark = pytest.mark.skipif(
    not kernels.is_available(), reason="needs a C compiler and AVX512-BF16"
)
BF16_ROUNDING = 2.0**-8
SUM = 1e-5  # of the norm, in fp32 on both sides of a chunk
DELTA = ScanShape(2, 3, key_size=32, value_size=48, is_delta_rule=True)
MAMBA2 = ScanShape(1, 10, key_size=48, value_size=16, is_delta_rule=False)  # heads in two parts
SHAPES = pytest.mark.parametrize("shape", [DELTA, MAMBA2], ids=["delta", "mamba2"])
# ends of chunks of 32 tokens, and of their halves
DOCUMENTS = [(-1, length) for length in (130, 70, 64, 33, 3, 16, 1)]
TREE = [(-1, 40), (0, 33), (0, 5), (1, 64), (1, 1), (-1, 17), (3, 40)]


def narrow_inputs(num_tokens: int, shape: ScanShape) -> ScanInputs:
    """Return the inputs of a layer in bf16."""
    inputs = make_inputs(num_tokens, shape)
    assert inputs.bias_C is not None
    assert inputs.skip_H is not None
    return ScanInputs(
        mixed_TC=inputs.mixed_TC.bfloat16(),
        weight_CK=inputs.weight_CK.bfloat16(),
        bias_C=inputs.bias_C.bfloat16(),
        decay_TH=inputs.decay_TH.float(),
        beta_TH=inputs.beta_TH.float(),
        skip_H=inputs.skip_H.float(),
    )


def widen(inputs: ScanInputs) -> ScanInputs:
    wide = {name: x.double().requires_grad_() for name, x in vars(inputs).items()}
    return ScanInputs(**wide)


def run_exactly(
    active_TC: Tensor, wide: ScanInputs, shape: ScanShape, layout: PackLayout
) -> Tensor:
    pieces = []
    for segment, length in enumerate(layout.lengths):
        path = list_path(layout, segment)
        pieces.append(run_recurrence(active_TC[path], wide, shape, path)[-length:])
    return torch.cat(pieces)


def convolve_exactly(wide: ScanInputs, layout: PackLayout) -> Tensor:
    pieces = []
    for segment, length in enumerate(layout.lengths):
        pieces.append(convolve_path(wide, list_path(layout, segment))[-length:])
    return torch.cat(pieces)


def draw_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def assert_rounded(ours: Tensor, exact: Tensor) -> None:
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=BF16_ROUNDING, atol=1e-5)


def assert_summed(ours: Tensor, exact: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert (ours.double() - exact).norm() <= SUM * exact.norm() + 1e-12


def run_both(
    segments: list[tuple[int, int]], shape: ScanShape
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the output of the kernels with its gradients, and both token by token in fp64."""
    layout = make_layout(segments)
    inputs = narrow_inputs(layout.num_tokens, shape)
    wide = widen(inputs)
    active_TC = F.silu(inputs.mixed_TC)
    exact_TC = active_TC.double().requires_grad_()
    expected = run_exactly(exact_TC, wide, shape, layout)
    dout = draw_like(expected)
    scalars = (inputs.decay_TH, inputs.beta_TH, inputs.skip_H)
    out = kernels.run_recurrence(active_TC, *scalars, layout, shape)
    leaves = (exact_TC, wide.decay_TH, wide.beta_TH)
    ours = kernels.run_recurrence_backward(dout, active_TC, *scalars, layout, shape)
    theirs = torch.autograd.grad(expected, leaves, dout.double())
    return [out, *ours], [expected, *theirs]


@SHAPES
@pytest.mark.parametrize("segments", [DOCUMENTS, TREE], ids=["documents", "tree"])
def test_the_recurrence(segments: list[tuple[int, int]], shape: ScanShape) -> None:
    ours, exact = run_both(segments, shape)
    assert_rounded(ours[0], exact[0])
    for actual, wanted in zip(ours[1:], exact[1:], strict=True):
        assert_summed(actual, wanted)


forests = st.lists(st.tuples(st.integers(-1, 6), st.integers(1, 70)), min_size=1, max_size=4)


@SHAPES
@settings(max_examples=8, deadline=None)
@given(forests)
def test_the_recurrence_on_any_forest(shape: ScanShape, segments: list[tuple[int, int]]) -> None:
    ours, exact = run_both(segments, shape)
    assert_rounded(ours[0], exact[0])
    for actual, wanted in zip(ours[1:], exact[1:], strict=True):
        assert_summed(actual, wanted)


@pytest.mark.parametrize("segments", [DOCUMENTS, TREE], ids=["documents", "tree"])
def test_the_convolution(segments: list[tuple[int, int]]) -> None:
    layout = make_layout(segments)
    inputs = narrow_inputs(layout.num_tokens, DELTA)
    wide = widen(inputs)
    expected = convolve_exactly(wide, layout)
    dactive_TC = draw_like(expected).float()
    assert inputs.bias_C is not None
    weight_KC = inputs.weight_CK.float().flip(1).t().contiguous()
    taps = kernels.Taps(list_taps(layout, NUM_TAPS), weight_KC, inputs.bias_C.float())
    assert_rounded(taps.convolve(inputs.mixed_TC), expected)
    dmixed, dweight, dbias = taps.backward(inputs.mixed_TC, dactive_TC, should_add_weights=True)
    leaves = [wide.mixed_TC, wide.weight_CK, wide.bias_C]
    exact = torch.autograd.grad(expected, leaves, dactive_TC.double())
    assert dweight is not None
    assert dbias is not None
    assert_rounded(dmixed, exact[0])
    assert_summed(dweight, exact[1].t().flip(0))
    assert_summed(dbias, exact[2])


def compute_all(inputs: ScanInputs, shape: ScanShape, layout: PackLayout) -> list[Tensor]:
    """Return the outputs and every gradient of a layer."""
    leaves = [x.detach().requires_grad_() for x in vars(inputs).values() if x is not None]
    present = [name for name, x in vars(inputs).items() if x is not None]
    named = dataclasses.replace(inputs, **dict(zip(present, leaves, strict=True)))
    out = scan_pack(named, shape, layout)
    return [out.detach(), *torch.autograd.grad(out, leaves, draw_like(out))]


@SHAPES
@pytest.mark.parametrize("has_all", [True, False])
def test_a_layer_equals_the_torch_path(shape: ScanShape, has_all: bool) -> None:
    """Both round the convolution to bf16; a sum next to the middle may go either way."""
    layout = make_layout(TREE)
    inputs = narrow_inputs(layout.num_tokens, shape)
    if not has_all:
        inputs = dataclasses.replace(inputs, bias_C=None, skip_H=None)
    assert kernels.is_supported(inputs.mixed_TC, shape)
    ours = compute_all(inputs, shape, layout)
    out = scan._run_reference(inputs, shape, layout)
    grads = scan._run_reference_backward(draw_like(out), inputs, shape, layout, True)
    theirs = [x for x in (out, *grads) if x is not None]
    for actual, wanted in zip(ours, theirs, strict=True):
        assert actual.dtype == wanted.dtype
        assert actual.shape == wanted.shape
        assert (actual.double() - wanted.double()).norm() < 1e-3 * wanted.double().norm()


@SHAPES
def test_what_stands_in_another_document_is_not_even_read(shape: ScanShape) -> None:
    layout = make_layout([(-1, 37), (-1, 37), (1, 3)])
    inputs = narrow_inputs(layout.num_tokens, shape)
    inputs.mixed_TC[:37] = float("nan")
    out, dmixed_TC, *_ = compute_all(inputs, shape, layout)
    assert not out[:37].isfinite().any()
    assert out[37:].isfinite().all()
    assert dmixed_TC[37:].isfinite().all()


@SHAPES
def test_threads_change_nothing(shape: ScanShape) -> None:
    layout = make_layout(TREE)
    inputs = narrow_inputs(layout.num_tokens, shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = compute_all(inputs, shape, layout)
        torch.set_num_threads(3)
        together = compute_all(inputs, shape, layout)
    finally:
        torch.set_num_threads(threads)
    for actual, wanted in zip(alone, together, strict=True):
        assert torch.equal(actual, wanted)


def test_what_the_kernels_leave_to_torch() -> None:
    x = torch.zeros(1, 1, dtype=torch.bfloat16)
    assert kernels.is_supported(x, DELTA)
    assert not kernels.is_supported(x.float(), DELTA)
    assert not kernels.is_supported(x, dataclasses.replace(DELTA, key_size=24))
    assert not kernels.is_supported(x, dataclasses.replace(DELTA, value_size=8))


def test_parts_of_a_group() -> None:
    """Enough tasks for eight threads where the heads allow it, from equal parts of a group."""
    counts = []
    for groups, heads_per_group in ((16, 2), (2, 3), (1, 48), (1, 10), (4, 6), (1, 1)):
        shape = dataclasses.replace(DELTA, num_groups=groups, heads_per_group=heads_per_group)
        counts.append(shape.count_parts())
    assert counts == [1, 3, 8, 10, 2, 1]


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3_5", {"linear_key_head_dim": 16, "linear_value_head_dim": 32}),
        ("granitemoehybrid", {"mamba_d_state": 16}),
    ],
)
def test_preflight_proves_a_network_that_runs_the_kernels(
    family: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy.deepcopy(CONFIGS[family])
    for name, size in sizes.items():
        setattr(config, name, size)
    monkeypatch.setitem(CONFIGS, family, config)
    model, samples = prepare_model(family, torch.bfloat16)
    shapes = [mixer.shape for mixer in model.network.modules() if hasattr(mixer, "shape")]
    assert len(shapes) == 2
    for shape in shapes:
        assert kernels.is_supported(torch.zeros(1, 1, dtype=torch.bfloat16), shape)
    assert run_preflight(model, samples)
