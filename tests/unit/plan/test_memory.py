"""Predicted bytes: components that add up, sizes that are known, and what each grows with."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from layer_shapes import describe_layers, make_headers
from quick_families import leave_others_to_slow
from tiny_models import CONFIGS, LORA, make_tiny_network
from tunesmith.core.model_spec import NormShape
from tunesmith.core.types import ModelSpec
from tunesmith.model.adapters import METHODS, find_linears, find_lora_layers
from tunesmith.model.causal_lm import wrap_model
from tunesmith.model.hub.part_shapes import measure_parts
from tunesmith.model.layers import Mlp, RMSNorm
from tunesmith.model.target_modules import find_part
from tunesmith.plan.activations import REPLACED_MLP_TYPES, REPLACED_NORM_TYPES
from tunesmith.plan.memory import (
    EXPERT_KERNEL_BYTES,
    CacheSize,
    compute_cache_bytes,
    count_dora_magnitudes,
    count_lora_parameters,
    estimate_peak_memory,
)
from tunesmith.plan.memory_budget import estimate_memory
from tunesmith.plan.rules import RuleContext

SETTINGS: dict[str, Any] = {"method": "lora", "dtype": "bf16", "rank": 16, "pack_tokens": 2048}


@pytest.fixture
def spec(make_context: Callable[..., RuleContext]) -> ModelSpec:
    return make_context().model


def test_an_adapter_of_smollm2_has_305_thousand_parameters_a_rank(spec: ModelSpec) -> None:
    assert count_lora_parameters(spec, 1) == 305_280
    assert count_lora_parameters(spec, 16) == 16 * 305_280


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_components_add_up(method: str, dtype: str, spec: ModelSpec) -> None:
    parts = estimate_peak_memory(spec, **(SETTINGS | {"method": method, "dtype": dtype}))
    assert all(value >= 0 for value in parts.values())
    assert parts.pop("peak") == sum(parts.values())


def test_weights_are_counted_once(spec: ModelSpec) -> None:
    def bytes_of(**changed: Any) -> tuple[int, int]:
        parts = estimate_peak_memory(spec, **(SETTINGS | changed))
        return parts["weights"], parts["trained"]

    assert bytes_of() == (2 * spec.parameters, 16 * count_lora_parameters(spec, 16))
    assert bytes_of(dtype="fp32") == (4 * spec.parameters, 16 * count_lora_parameters(spec, 16))
    assert bytes_of(method="full", dtype="fp32") == (0, 16 * spec.parameters)
    assert bytes_of(method="full") == (2 * spec.block_parameters, 16 * spec.parameters)


@pytest.mark.parametrize(
    ("component", "changed", "factor"),
    [
        ("activations", {"pack_tokens": 4096}, 2),
        ("trained", {"rank": 64}, 4),
        ("weights", {"rank": 64}, 1),
        ("weights", {"pack_tokens": 4096}, 1),
    ],
)
def test_each_component_grows_with_its_own_cause(
    component: str, changed: dict[str, Any], factor: float, spec: ModelSpec
) -> None:
    before, after = (
        estimate_peak_memory(spec, **SETTINGS),
        estimate_peak_memory(spec, **(SETTINGS | changed)),
    )
    assert after[component] == pytest.approx(factor * before[component])


def test_the_head_never_holds_all_logits(spec: ModelSpec) -> None:
    wide = dataclasses.replace(spec, vocab_size=2 * spec.vocab_size)
    long = SETTINGS | {"pack_tokens": 8192}
    assert (
        estimate_peak_memory(wide, **SETTINGS)["head"]
        == 2 * estimate_peak_memory(spec, **SETTINGS)["head"]
    )
    assert (
        estimate_peak_memory(spec, **long)["head"] == estimate_peak_memory(spec, **SETTINGS)["head"]
    )
    assert estimate_peak_memory(spec, **long)["head"] < 8192 * spec.vocab_size


def test_what_is_computed_anew_is_not_kept(spec: ModelSpec) -> None:
    """SmolLM2 by hand: values a token and layer, and the temporaries of the widest layer."""
    h, q, kv, mlp = 576, 576, 192, 2 * 1536
    layer = 4 * h + 2 * q + 2 * kv + mlp
    tables = 2 * 64  # cosines and sines, in fp32
    wanted = {"none": 30 * layer, "selective": 30 * (layer - mlp), "full": 30 * h + layer}
    for policy, values in wanted.items():
        saved = estimate_peak_memory(spec, **SETTINGS, gradient_checkpointing=policy)["activations"]
        assert saved == 2048 * 2 * (values + tables + 6 * 1536)


def test_a_family_with_more_norms_keeps_their_inputs(spec: ModelSpec) -> None:
    def values(norms: NormShape) -> float:
        described = describe_layers(spec, norms=norms)
        return estimate_peak_memory(described, **SETTINGS)["activations"] / (2048 * 2 * 30)

    heads, outputs = 576 + 192, 2 * 576
    plain = values(NormShape(60))
    assert round(values(NormShape(60, 30 * heads)) - plain) == heads
    assert round(values(NormShape(120)) - plain) == outputs


@pytest.mark.parametrize("family", ["llama-tied", "arcee", "apertus", "bitnet"])
def test_adapters_have_the_parameters_that_are_counted(family: str) -> None:
    config = CONFIGS[family]
    network = AutoModelForCausalLM.from_config(config)
    METHODS["lora"](network, LORA | {"lora_r": 3})
    layers = find_lora_layers(network).values()
    actual = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)
    assert count_lora_parameters(make_spec(config), 3) == actual


def test_an_adapter_of_some_parts_has_their_parameters(spec: ModelSpec) -> None:
    attention, mlp, both = (
        count_lora_parameters(spec, 2, targets)
        for targets in ("attention", ["mlp"], ("mlp", "attention"))
    )
    assert attention == 2 * 30 * (3 * 576 + 576 + 576 + 2 * 192 + 576)
    assert both == attention + mlp == count_lora_parameters(spec, 2)
    assert count_lora_parameters(spec, 2, ["q_proj"]) == both, "names count as all linears"
    assert count_dora_magnitudes(spec, "attention") == 30 * (576 + 2 * 192 + 576)
    settings = SETTINGS | {"targets": "attention"}
    assert estimate_peak_memory(spec, **settings)["trained"] == 16 * 8 * attention


def make_spec(config: PreTrainedConfig) -> ModelSpec:
    heads = config.num_attention_heads
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    parameters = network.model.layers.parameters()
    block_parameters = sum(p.numel() for p in parameters if p.ndim == 2)
    return ModelSpec(
        "tiny",
        Path("/m"),
        "",
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.intermediate_size,
        config.vocab_size,
        256,
        False,
        1,
        "fp32",
        block_parameters=block_parameters,
        active_parameters=block_parameters,
        layer_mixers=("attention",) * config.num_hidden_layers,
        parts=measure_parts(make_headers(network), config.model_type),
    )


def test_ungated_mlps_and_stock_modules_keep_other_values(spec: ModelSpec) -> None:
    def values(described: ModelSpec) -> float:
        return estimate_peak_memory(described, **SETTINGS)["activations"] / (2048 * 2 * 30)

    ungated = describe_layers(spec, mlp_inputs=1)
    assert round(values(spec) - values(ungated)) == 1536
    stock = dataclasses.replace(spec, model_type="cwm")
    more = 2 * 576 + 2 * 1536  # norms in fp32, activation and product
    assert round(values(stock) - values(spec)) == more


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_the_plan_knows_which_modules_are_ours(family: str) -> None:
    model = wrap_model(make_tiny_network(family), torch.float32)
    model_type = CONFIGS[family].model_type
    modules = [type(module) for module in model.network.modules()]
    assert (RMSNorm in modules) == (model_type in REPLACED_NORM_TYPES)
    has_dense_mlp = any(find_part(path) == "mlp" for path in find_linears(model.network))
    if has_dense_mlp:
        assert (Mlp in modules) == (model_type in REPLACED_MLP_TYPES)


def test_each_size_of_a_pack_leaves_code_up_to_a_bound(spec: ModelSpec) -> None:
    """Products in fp32 are another library's."""
    few, many, more = (
        estimate_peak_memory(spec, **SETTINGS, packs=packs)["kernels"] for packs in (2, 100, 10_000)
    )
    assert (many, more) == (50 * few, many)
    sparse = dataclasses.replace(spec, num_experts=8)
    of_experts = estimate_peak_memory(sparse, **SETTINGS, packs=2)["kernels"] - few
    assert of_experts == EXPERT_KERNEL_BYTES
    assert estimate_peak_memory(spec, **(SETTINGS | {"dtype": "fp32"}), packs=100)["kernels"] == 0


def test_moments_in_8_bits_take_a_quarter(spec: ModelSpec) -> None:
    full = SETTINGS | {"method": "full"}
    wide, small = (
        estimate_peak_memory(spec, **full),
        estimate_peak_memory(spec, **full, optim="adamw_8bit"),
    )
    assert wide["trained"] - small["trained"] == pytest.approx(
        spec.parameters * (8 - 2 * 260 / 256)
    )
    assert (wide["update"], small["update"]) == (0, 16 * spec.vocab_size * spec.hidden_size)
    assert small["peak"] < wide["peak"]


def test_a_step_in_the_backward_keeps_the_gradient_of_one_tensor(spec: ModelSpec) -> None:
    full = SETTINGS | {"method": "full"}
    with_gradients, without = (
        estimate_peak_memory(spec, **full),
        estimate_peak_memory(spec, **full, step_in_backward=True),
    )
    largest = spec.vocab_size * spec.hidden_size
    assert with_gradients["trained"] - without["trained"] == 4 * (spec.parameters - largest)


def test_4_bit_weights_take_a_quarter_and_the_ends_stay_wide(spec: ModelSpec) -> None:
    plain, small = (
        estimate_peak_memory(spec, **SETTINGS),
        estimate_peak_memory(spec, **(SETTINGS | {"method": "qlora"})),
    )
    ends = 2 * (spec.parameters - spec.block_parameters)
    assert small["weights"] - ends == pytest.approx(0.258 * (plain["weights"] - ends), rel=1e-3)
    assert small["widened"] == 2 * 2 * spec.hidden_size * spec.intermediate_size
    assert plain["widened"] == 0
    same = ("trained", "activations", "head")
    assert {key: small[key] for key in same} == {key: plain[key] for key in same}


def test_answers_written_side_by_side_count_where_they_take_more_than_a_step(
    make_context: Callable[..., RuleContext],
) -> None:
    spec, machine = make_context().model, make_context().machine
    held = {**SETTINGS, "packs": 1, "layouts": 1, "has_evaluation": False}
    few, many = (
        estimate_memory(spec, machine, **held, cache=CacheSize(1, tokens))
        for tokens in (1000, 100_000)
    )
    assert few["KV cache"] == 0
    step_bytes = sum(many[part] for part in ("activations", "head", "fragments"))
    head_bytes = spec.vocab_size * spec.hidden_size * 2  # generation has a second copy
    cache_bytes = compute_cache_bytes(spec, CacheSize(1, 100_000), 2)
    assert many["KV cache"] == cache_bytes + head_bytes - step_bytes > 0
    assert many["peak"] - few["peak"] == many["KV cache"]
