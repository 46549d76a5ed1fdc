"""A leak between documents that begins after the tokens of the isolation check is refused, in bf16
too, where summed losses hide it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from preflight_models import get_refusal, prepare_model
from tiny_models import make_tiny_documents
from tunesmith.core.types import PackLayout
from tunesmith.model import layers
from tunesmith.model.mixers import convolution, gated_delta, recurrence, scan
from tunesmith.session.preflight_probe import ISOLATION_TOKENS
from tunesmith.train.preflight import run_preflight
from tunesmith.train.preflight_forward import FEW_TOKENS, GROUP_TOKENS, compare_hidden

ROWS = (100, 130, 160, 250)
REFUSALS = ("hidden states in a pack differ", "packed loss", "is off by")


def continue_long_documents(layout: PackLayout) -> PackLayout:
    """Let each document longer than those of the isolation check continue the one before."""
    if layout.parents:
        return layout
    parents: list[int] = []
    for segment, length in enumerate(layout.lengths):
        parents.append(segment - 1 if length > ISOLATION_TOKENS else -1)
    return PackLayout(layout.starts, layout.lengths, tuple(parents))


def leak_layout(function: Callable[..., Tensor], place: int) -> Callable[..., Tensor]:
    def leak(*args: object) -> Tensor:
        layout = args[place]
        assert isinstance(layout, PackLayout)
        return function(*args[:place], continue_long_documents(layout), *args[place + 1 :])

    return leak


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("lfm2", torch.bfloat16),
        ("granitemoehybrid", torch.float32),
        ("olmo_hybrid", torch.bfloat16),
        ("qwen3_5", torch.float32),
    ],
)
def test_a_state_that_continues_in_the_next_document_is_refused(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = prepare_model(family, dtype, candidates=make_tiny_documents(ROWS))
    assert run_preflight(model, samples)
    monkeypatch.setattr(gated_delta, "scan_pack", leak_layout(gated_delta.scan_pack, 2))
    monkeypatch.setattr(convolution, "convolve_pack", leak_layout(convolution.convolve_pack, 3))
    refusal = get_refusal(model, samples)
    assert any(text in refusal for text in REFUSALS)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe"])
def test_attention_to_the_document_before_is_refused(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = prepare_model(family, torch.bfloat16, make_tiny_documents(ROWS))
    assert run_preflight(model, samples)
    monkeypatch.setattr(layers, "attend", leak_layout(layers.attend, 3))
    refusal = get_refusal(model, samples)
    assert any(text in refusal for text in REFUSALS)


def test_the_worst_group_of_tokens_counts() -> None:
    alone_SH = torch.ones(10 * GROUP_TOKENS, 4)
    packed_SH = alone_SH.clone()
    packed_SH[-1] = 0
    error = compare_hidden(packed_SH, alone_SH, has_experts=False)
    assert error == pytest.approx(GROUP_TOKENS**-0.5)
    one = packed_SH[-1:], alone_SH[-1:]
    assert compare_hidden(*one, has_experts=False) == pytest.approx(FEW_TOKENS**-0.5)
    assert compare_hidden(*one, has_experts=True) == pytest.approx(GROUP_TOKENS**-0.5)
    packed_SH[0] = torch.nan
    assert compare_hidden(packed_SH, alone_SH, has_experts=True) != pytest.approx(error)


def run_backward_across(gradient: Tensor, weight: Tensor, _edges: object) -> Tensor:
    """The gradient of a convolution as if the pack were one document."""
    whole = PackLayout((0,), (len(gradient),))
    whole_edges = recurrence.find_edges(whole, weight.shape[1], gradient.device)
    return convolve_backward(gradient, weight, whole_edges)


convolve_backward = convolution.convolve_backward


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("lfm2", torch.bfloat16),
        ("granitemoehybrid", torch.float32),
        ("qwen3_5", torch.bfloat16),
    ],
)
def test_a_gradient_that_crosses_documents_is_refused(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward is right, so no loss and no hidden state shows it."""
    model, samples = prepare_model(family, dtype)
    for module in (convolution, scan):
        monkeypatch.setattr(module, "convolve_backward", run_backward_across)
    assert "attend to each other" in get_refusal(model, samples)
    monkeypatch.undo()
    assert run_preflight(model, samples)
