"""A backward that differs from transformers' is refused, whatever the forward says; right ones
pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from preflight_models import get_refusal, prepare_model
from tunesmith.core.errors import GateError
from tunesmith.model.experts import Experts
from tunesmith.model.layers import Attention, Mlp
from tunesmith.model.lora import LoraLinear
from tunesmith.model.mixers.convolution import ShortConvolution
from tunesmith.model.mixers.gated_delta import GatedDeltaNet
from tunesmith.model.mixers.mamba2 import Mamba2Mixer
from tunesmith.session.preflight_probe import Subject
from tunesmith.train.preflight_blocks import check_blocks, check_gradients

BLOCKS = [
    (Attention, "llama"),
    (Mlp, "gemma2"),
    (Experts, "qwen3_moe"),
    (Experts, "gpt_oss"),
    (GatedDeltaNet, "qwen3_5"),
    (GatedDeltaNet, "olmo_hybrid"),
    (Mamba2Mixer, "falcon_h1"),
    (Mamba2Mixer, "granitemoehybrid"),
    (ShortConvolution, "lfm2"),
]


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is off by 1%."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0] * 1.01


@pytest.mark.parametrize(("block", "family"), BLOCKS)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_a_wrong_backward_is_refused(
    block: type[Any], family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = prepare_model(family, dtype)
    right = block.forward

    def compute(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = right(self, *args, **kwargs)
        if isinstance(out, tuple):
            return (WrongGradient.apply(out[0]), *out[1:])
        return WrongGradient.apply(out)

    monkeypatch.setattr(block, "forward", compute)
    with torch.no_grad(), pytest.raises(GateError, match=r"the gradient of layers\.\d+ is off by"):
        check_gradients(Subject(model, samples))
    with torch.no_grad():
        assert check_blocks(Subject(model, samples)).level == "ok"


def test_a_wrong_gradient_of_an_adapter_stops_the_run() -> None:
    model, samples = prepare_model("olmo2", torch.bfloat16)
    layer: Any = model.decoder.layers[1].self_attn.o_proj
    assert isinstance(layer, LoraLinear)
    layer.lora_A.register_hook(lambda gradient: gradient)
    layer.lora_B.register_hook(lambda gradient: gradient * 1.5)
    name = "the gradient of layers.1.self_attn.o_proj is off by"
    assert get_refusal(model, samples).startswith(name)
