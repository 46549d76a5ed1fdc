"""Preflight of models with experts: what is rounding passes, a leak and a wrong block are
refused."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from preflight_models import get_refusal, prepare_model, prepare_network, prepare_sharing_model
from quick_families import leave_others_to_slow
from tiny_models import EXPERT_FAMILIES, HYBRID_CONFIGS, make_tiny_documents
from tunesmith.core.errors import GateError
from tunesmith.core.types import PackLayout
from tunesmith.model import layers
from tunesmith.model.attention import BACKENDS, AttentionConfig, reference_attention
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.experts import Experts, find_experts
from tunesmith.model.layers import Attention
from tunesmith.session.preflight_probe import PreflightSamples, Subject, pack_documents
from tunesmith.train.preflight import run_preflight
from tunesmith.train.preflight_blocks import check_blocks
from tunesmith.train.preflight_forward import refuse_leakage
from wide_configs import make_wide_config

RECURRENT = ("granitemoehybrid", "qwen3_5", "falcon_h1")


def run_checks(model: PackedCausalLM, samples: PreflightSamples) -> dict[str, str]:
    results = run_preflight(model, samples)
    assert all(result.level == "ok" for result in results), results
    return {result.kind: result.evidence for result in results}


# ---------------------------------------------------------------- all is well


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_isolation_is_proven_by_gradients(family: str) -> None:
    evidence = run_checks(*prepare_sharing_model(family))
    for kind in ("no cross-document attention", "prefix-shared loss = unshared loss"):
        assert "by their gradient, which is 0" in evidence[kind]


def test_a_dense_model_is_isolated_bitwise() -> None:
    evidence = run_checks(*prepare_model("llama"))
    assert evidence["no cross-document attention"].endswith("the others unchanged bitwise")


def make_deep_network(num_layers: int) -> PreTrainedModel:
    """Return a random dense network whose scores are not scaled: rounding to bf16 grows with each
    layer."""
    config: Any = make_wide_config("gemma4_text")
    config.num_hidden_layers = num_layers
    config.layer_types = ["sliding_attention", "full_attention"] * (num_layers // 2)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return network.eval().requires_grad_(False)


@pytest.mark.promise
def test_a_dense_network_that_amplifies_rounding_is_proven_by_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A leak and a wrong block of the same network are refused."""
    model, samples = prepare_network(make_deep_network(12))
    evidence = {result.kind: result.evidence for result in run_preflight(model, samples)}
    logits = evidence["logits match transformers"]
    assert float(logits.split("%")[0].rpartition(" ")[2]) > 6
    assert evidence["negative controls"].startswith("4 of 5 injected faults detected")
    monkeypatch.setitem(BACKENDS, "broken", attend_across)
    model.backend = "broken"
    assert "layers.0.self_attn is off by" in get_refusal(model, samples)
    model.backend = "auto"
    wrong: Any = model.decoder.get_submodule("layers.7.self_attn")
    wrong.scaling = 0.95
    assert get_refusal(model, samples).startswith("layers.7.self_attn is off by ")


# ---------------------------------------------------------------- leaks


def forget_tokens(self: Experts, x_TH: Tensor, choices: Tensor, p: Tensor) -> Tensor:
    """Experts with a capacity: each computes its first rows of a pack only."""
    capacity = -(-choices.numel() // self.num_experts)
    place_TK = torch.zeros_like(choices)
    for expert in range(self.num_experts):
        is_expert = choices == expert
        place_TK[is_expert] = torch.arange(int(is_expert.sum()))
    return run_experts(self, x_TH, choices, p * (place_TK < capacity))


run_experts = Experts.forward


def test_experts_with_a_capacity_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice has no gradient, so only transformers' documents alone show it."""
    monkeypatch.setattr(Experts, "forward", forget_tokens)
    model, samples = prepare_model("qwen3_moe")
    with torch.no_grad(), pytest.raises(GateError, match=r"layers\.0\.mlp is off by"):
        check_blocks(Subject(model, samples))


def attend_across_a_little(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, rule: AttentionConfig
) -> Tensor:
    """Attention with a leak that is smaller than rounding."""
    leaky = reference_attention(q, k, v, PackLayout((0,), (layout.num_tokens,)), rule)
    return reference_attention(q, k, v, layout, rule) + 1e-12 * leaky


def attend_across(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, rule: AttentionConfig
) -> Tensor:
    return reference_attention(q, k, v, PackLayout((0,), (layout.num_tokens,)), rule)


@pytest.mark.parametrize("broken", [attend_across, attend_across_a_little])
def test_attention_across_documents_is_refused(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the leak is: its gradient is not zero."""
    monkeypatch.setitem(BACKENDS, "broken", broken)
    model, samples = prepare_model("qwen3_moe")
    model.backend = "broken"
    batch = pack_documents(samples.documents)
    with torch.no_grad(), pytest.raises(GateError, match="attend to each other"):
        refuse_leakage(model, batch, batch.layout)


def test_hidden_states_without_a_gradient_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = prepare_model("qwen3_moe")
    right = model.compute_hidden
    monkeypatch.setattr(model, "compute_hidden", lambda batch: detach_rows(right(batch)))
    batch = pack_documents(samples.documents)
    with torch.no_grad(), pytest.raises(GateError, match="gradient check inconclusive"):
        refuse_leakage(model, batch, batch.layout)


def detach_rows(hidden: Tensor) -> Tensor:
    return hidden * 0.0 + hidden.detach()


# ---------------------------------------------------------------- block by block


def test_blocks_are_compared_in_fp32_and_as_they_are_trained() -> None:
    model, samples = prepare_model("qwen3_moe", torch.bfloat16)
    with torch.no_grad():
        evidence = check_blocks(Subject(model, samples)).evidence
    assert evidence.startswith("15 parts in float32 on transformers' inputs, ")
    assert "; in bfloat16 by 0." in evidence
    decisions = re.search(r"router decisions equal at (\S+)/(\d+)", evidence)
    assert decisions is not None
    equal, total = decisions.groups()
    assert 0 < int(equal) <= int(total)


def test_a_fault_of_bf16_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hide in the rounding of the logits."""
    model, samples = prepare_model("qwen3_moe", torch.bfloat16)
    right = layers.Attention.forward

    def compute(self: Any, hidden_states: Tensor, **others: Any) -> Any:
        out, nothing = right(self, hidden_states, **others)
        return (out * 1.05 if out.dtype == torch.bfloat16 else out), nothing

    monkeypatch.setattr(layers.Attention, "forward", compute)
    with torch.no_grad(), pytest.raises(GateError, match="self_attn is off by"):
        check_blocks(Subject(model, samples))


@pytest.mark.parametrize(
    ("family", "path"),
    [("qwen3_moe", "layers.1.self_attn"), ("gemma4-experts", "layers.1.self_attn")],
)
def test_a_wrong_mixer_is_named(family: str, path: str) -> None:
    model, samples = prepare_model(family, torch.bfloat16)
    wrong: Any = model.decoder.get_submodule(path)
    wrong.scaling = 0.5  # of transformers' module
    if isinstance(wrong, Attention):
        wrong.attention_config = dataclasses.replace(wrong.attention_config, scale=0.5)
    refusal = get_refusal(model, samples)
    assert refusal.startswith(f"{path} is off by ")


def test_a_weight_that_changed_after_it_was_loaded_is_named() -> None:
    model, samples = prepare_model("qwen3_moe", torch.bfloat16)
    wrong: Any = model.decoder.get_submodule("layers.1.self_attn")
    weight = wrong.o_proj.frozen.weight
    weight.copy_(weight.roll(1, dims=0))
    name = "model.layers.1.self_attn.o_proj.weight"
    assert get_refusal(model, samples).startswith(f"{name} changed before")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_experts_are_named(dtype: torch.dtype) -> None:
    model, samples = prepare_model("qwen3_moe", dtype)
    experts = find_experts(model.network)["model.layers.0.mlp.experts"]
    experts.apply_activation = lambda hidden_RG: hidden_RG.chunk(2, dim=-1)[1]  # without the gate
    assert get_refusal(model, samples).startswith("layers.0.mlp is off by ")


def test_wrong_sums_between_the_blocks_are_named() -> None:
    model, samples = prepare_model("qwen3_moe")
    model.decoder.layers[1].residual_multiplier = 0.5
    assert get_refusal(model, samples).startswith("layers.1.post_attention_layernorm is off")


def test_a_wrong_head_is_named() -> None:
    model, samples = prepare_model("granitemoehybrid-experts")
    model.network.config.logits_scaling = 2.0  # type: ignore[attr-defined]
    assert get_refusal(model, samples).startswith("the head is off by ")


def test_logits_of_a_model_that_was_not_recorded_are_refused() -> None:
    model, samples = prepare_model("qwen3_moe")
    model.decoder.layers[1].residual_multiplier = 0.5
    nothing = dataclasses.replace(samples, stock=None)
    assert "logits differ from transformers" in get_refusal(model, nothing)


LONG_ROWS = (9, 20, 300)


@pytest.mark.parametrize("family", leave_others_to_slow([*EXPERT_FAMILIES, *RECURRENT]))
def test_long_documents_with_experts_pass_in_bf16(family: str) -> None:
    evidence = run_checks(
        *prepare_model(family, torch.bfloat16, candidates=make_tiny_documents(LONG_ROWS))
    )
    assert f"{sum(LONG_ROWS)} tokens in 1 pack" in evidence["blocks match transformers"]


def test_hybrids_without_experts_stay_bitwise() -> None:
    for family in ("lfm2", *RECURRENT):
        assert family in HYBRID_CONFIGS
        model, samples = prepare_model(family, candidates=make_tiny_documents((9, 20, 14)))
        batch = pack_documents(samples.documents)
        with torch.no_grad():
            assert refuse_leakage(model, batch, batch.layout).is_bitwise
