"""Faults that change logits by less than bf16 rounds, or begin late in a document, are refused on
every family that can have them, in bf16 and in fp32; families without a fault pass."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from preflight_models import get_refusal, prepare_model
from quick_families import leave_others_to_slow
from tiny_models import (
    ATTENTION_CONFIGS,
    CONFIGS,
    EXPERT_FAMILIES,
    HYBRID_CONFIGS,
    TEXT_PART_CONFIGS,
    make_tiny_documents,
)
from tunesmith.core.errors import GateError
from tunesmith.model import causal_lm, layers
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.experts import Experts
from tunesmith.model.layers import Mlp
from tunesmith.model.mixers.convolution import ShortConvolution
from tunesmith.model.mixers.gated_delta import GatedDeltaNet
from tunesmith.model.mixers.mamba2 import Mamba2Mixer
from tunesmith.session.preflight_probe import Subject
from tunesmith.train.preflight import run_preflight
from tunesmith.train.preflight_blocks import TOKEN_TOLERANCE, check_blocks, check_gradients

LONG = make_tiny_documents((9, 330))  # the fault of the rotation begins at token 300
Fault = Callable[[PackedCausalLM, pytest.MonkeyPatch], None]


@contextmanager
def replaced(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> Any:
    weight = module.get_parameter(name)
    module._parameters[name] = nn.Parameter(change(weight.detach()), requires_grad=False)
    yield
    module._parameters[name] = weight


def compute_with(
    kind: type[Any], path: str, name: str, change: Callable[[Tensor], Tensor]
) -> Fault:
    """Return the fault that modules of a kind compute with a changed weight; it stays as it is."""

    def inject(_model: PackedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        right = kind.forward

        def compute(self: Any, *args: Any, **kwargs: Any) -> Any:
            with replaced(self.get_submodule(path), name, change):
                return right(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", compute)

    return inject


def attend_with(change: Callable[[Any], dict[str, Any]]) -> Fault:
    """Return the fault that attention follows other rules."""

    def inject(_model: PackedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        right = layers.attend

        def attend(
            q: Tensor, k: Tensor, v: Tensor, layout: Any, rule: Any, *args: Any, **kwargs: Any
        ) -> Tensor:
            rule = dataclasses.replace(rule, **change(rule))
            return right(q, k, v, layout, rule, *args, **kwargs)

        monkeypatch.setattr(layers, "attend", attend)
        monkeypatch.setattr(causal_lm, "attend", attend)

    return inject


def move_window(by: int) -> Fault:
    return attend_with(lambda rule: {"window": rule.window and rule.window + by})


class SlowRotary(nn.Module):
    """A rotary embedding that is off by 1% from token 300 on."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_late = position_ids >= 300
        positions = torch.where(is_late, position_ids * 1.01, position_ids.float())
        return self.stock(x, positions, *args, **kwargs)


def rotate_late(model: PackedCausalLM, _monkeypatch: pytest.MonkeyPatch) -> None:
    model.decoder.rotary_emb = SlowRotary(model.decoder.rotary_emb)


def swap_activation(model: PackedCausalLM, _monkeypatch: pytest.MonkeyPatch) -> None:
    for module in model.network.modules():
        if isinstance(module, Mlp):
            module.is_gelu = not module.is_gelu
        if isinstance(module, Experts) and module.act_fn is not None:
            module.act_fn = nn.GELU()


def drop_router_bias(model: PackedCausalLM, _monkeypatch: pytest.MonkeyPatch) -> None:
    for name, buffer in model.network.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.zero_()


def drop_weight(ending: str) -> Fault:
    def inject(model: PackedCausalLM, _monkeypatch: pytest.MonkeyPatch) -> None:
        for name, parameter in model.network.named_parameters():
            if name.endswith(ending):
                parameter.data = torch.zeros_like(parameter)

    return inject


FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "lost dt_bias, delta rule": (
        compute_with(GatedDeltaNet, "", "dt_bias", torch.zeros_like),
        ("qwen3_5", "qwen3_next", "olmo_hybrid", "qwen3_5_moe"),
    ),
    "lost dt_bias, Mamba2": (
        compute_with(Mamba2Mixer, "", "dt_bias", torch.zeros_like),
        ("granitemoehybrid", "falcon_h1", "nemotron_h", "nemotron_h-experts"),
    ),
    "wrong sign of A_log, delta rule": (
        compute_with(GatedDeltaNet, "", "A_log", torch.neg),
        ("qwen3_5", "olmo_hybrid"),
    ),
    "wrong sign of A_log, Mamba2": (
        compute_with(Mamba2Mixer, "", "A_log", torch.neg),
        ("granitemoehybrid", "falcon_h1", "nemotron_h"),
    ),
    "taps in the wrong order, delta rule": (
        compute_with(GatedDeltaNet, "conv1d", "weight", lambda w: w.flip(-1)),
        ("qwen3_5", "qwen3_next"),
    ),
    "taps in the wrong order, Mamba2": (
        compute_with(Mamba2Mixer, "conv1d", "weight", lambda w: w.flip(-1)),
        ("falcon_h1", "nemotron_h"),
    ),
    "taps in the wrong order, convolution": (
        compute_with(ShortConvolution, "conv", "weight", lambda w: w.flip(-1)),
        ("lfm2", "lfm3", "lfm2_moe-experts"),
    ),
    "wrong activation of the gate": (
        swap_activation,
        ("llama", "gemma3", "qwen3_moe", "mixtral", "deepseek_v3", "lfm2_moe-experts"),
    ),
    "lost bias of the router": (
        drop_router_bias,
        ("deepseek_v3", "glm4_moe", "nemotron_h-experts", "lfm2_moe-experts"),
    ),
    "lost bias of a linear router": (drop_weight("router.bias"), ("gpt_oss",)),
    "lost weight dt_bias": (drop_weight("dt_bias"), ("qwen3_5", "falcon_h1")),
    "lost sinks": (attend_with(lambda _: {"sinks_N": None}), ("gpt_oss",)),
    "rotation off by 1% from token 300 on": (
        rotate_late,
        ("llama", "qwen3_5", "gpt_oss", "granite4", "gemma4"),
    ),
    "lost soft cap": (attend_with(lambda _: {"softcap": None}), ("gemma2", "vaultgemma")),
    "window one too long": (move_window(1), ("mistral", "gemma3", "gpt_oss", "phi3", "cwm")),
    "window one too short": (move_window(-1), ("mistral", "gemma2", "gemma4-experts")),
}
REFUSAL = "is off by|to other experts|changed before the first step"
PRECISIONS = (torch.bfloat16, torch.float32)


def list_cases() -> Iterator[Any]:
    """Yield each fault with a family in both precisions in turn; the others are slow."""
    for number, (fault, (_, families)) in enumerate(FAULTS.items()):
        for place, family in enumerate(families):
            for dtype in PRECISIONS:
                is_quick = place == 0 and dtype == PRECISIONS[number % 2]
                marks = () if is_quick else pytest.mark.slow
                yield pytest.param(fault, family, dtype, marks=marks)


@pytest.mark.parametrize(("fault", "family", "dtype"), list(list_cases()))
def test_a_fault_is_refused(
    fault: str, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = prepare_model(family, dtype, LONG if "token 300" in fault else None)
    inject, _ = FAULTS[fault]
    inject(model, monkeypatch)
    with torch.no_grad(), pytest.raises(GateError, match=REFUSAL):
        check_blocks(Subject(model, samples))


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_no_family_is_refused_in_bf16(family: str) -> None:
    """With room: the tolerance of blocks is 30 times what differs."""
    subject = Subject(*prepare_model(family, torch.bfloat16))
    with torch.no_grad():
        evidence = check_blocks(subject).evidence
        gradients = check_gradients(subject)
    worst = re.search(r"differ by (\S+) at most", evidence)
    assert worst is not None
    assert 10 * float(worst[1]) < TOKEN_TOLERANCE[torch.float32]
    is_amplifying = family in HYBRID_CONFIGS or family in EXPERT_FAMILIES
    assert float(gradients.evidence.rpartition(" by ")[2][:-1]) < (12 if is_amplifying else 5)


@pytest.mark.parametrize("family", leave_others_to_slow([*TEXT_PART_CONFIGS, *ATTENTION_CONFIGS]))
def test_the_whole_proof_passes_on_text_parts_and_ungated_decoders(family: str) -> None:
    results = run_preflight(*prepare_model(family, torch.float32))
    assert {result.level for result in results} == {"ok"}


def test_a_fault_of_a_block_stops_the_run() -> None:
    """In bf16 the logits of this one differ by no more than rounding."""
    model, samples = prepare_model("lfm2", torch.bfloat16)
    norm: Any = model.decoder.layers[1].operator_norm
    norm.eps *= 300
    assert get_refusal(model, samples).startswith("layers.1.operator_norm is off by")
