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
    Footprint,
    MemoryParts,
    compute_cache_bytes,
    count_dora_magnitudes,
    count_lora_parameters,
    estimate_peak_memory,
)
from tunesmith.plan.rules import RuleContext

FULL: dict[str, Any] = {"method": "full"}


def estimate(
    spec: ModelSpec, *, pack_tokens: int = 2048, packs: int = 1, **changed: Any
) -> MemoryParts:
    run = Footprint(**({"method": "lora", "dtype": "bf16", "rank": 16} | changed))
    return estimate_peak_memory(spec, run, pack_tokens=pack_tokens, packs=packs)


@pytest.fixture
def spec(make_context: Callable[..., RuleContext]) -> ModelSpec:
    return make_context().model


def test_weights_are_counted_once_and_components_add_up(spec: ModelSpec) -> None:
    adapter_bytes = 16 * 16 * 305_280  # 305 thousand parameters a rank
    wanted = {
        ("lora", "bf16"): (2 * spec.parameters, adapter_bytes),
        ("lora", "fp32"): (4 * spec.parameters, adapter_bytes),
        ("full", "fp32"): (0, 16 * spec.parameters),
        ("full", "bf16"): (2 * spec.block_parameters, 16 * spec.parameters),
    }
    for (method, dtype), sizes in wanted.items():
        parts = estimate(spec, method=method, dtype=dtype)
        assert (parts.weights, parts.trained) == sizes
        stored = parts.to_dict()
        assert stored.pop("peak") == sum(stored.values()) == parts.fixed + parts.step


@pytest.mark.parametrize(
    ("component", "changed", "factor"),
    [
        ("activations", {"pack_tokens": 4096}, 2),
        ("trained", {"rank": 64}, 4),
        ("weights", {"rank": 64, "pack_tokens": 4096}, 1),
        ("head", {"pack_tokens": 8192}, 1),
    ],
)
def test_each_component_grows_with_its_own_cause(
    component: str, changed: dict[str, Any], factor: float, spec: ModelSpec
) -> None:
    before, after = (
        getattr(parts, component) for parts in (estimate(spec), estimate(spec, **changed))
    )
    assert after == pytest.approx(factor * before)


def test_what_is_computed_anew_is_not_kept(spec: ModelSpec) -> None:
    """SmolLM2 by hand: values a token and layer, and the temporaries of the widest layer."""
    h, q, kv, mlp = 576, 576, 192, 2 * 1536
    layer = 4 * h + 2 * q + 2 * kv + mlp
    tables = 2 * 64  # cosines and sines, in fp32
    wanted = {"none": 30 * layer, "selective": 30 * (layer - mlp), "full": 30 * h + layer}
    for policy, values in wanted.items():
        saved = estimate(spec, gradient_checkpointing=policy).activations
        assert saved == 2048 * 2 * (values + tables + 6 * 1536)


def count_values(described: ModelSpec) -> float:
    """Return the values that a layer keeps of a token."""
    return estimate(described).activations / (2048 * 2 * 30)


def test_a_family_with_more_norms_keeps_their_inputs(spec: ModelSpec) -> None:
    heads, outputs = 576 + 192, 2 * 576
    plain = count_values(describe_layers(spec, norms=NormShape(60)))
    with_heads = count_values(describe_layers(spec, norms=NormShape(60, 30 * heads)))
    assert round(with_heads - plain) == heads
    assert round(count_values(describe_layers(spec, norms=NormShape(120))) - plain) == outputs


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
    assert estimate(spec, targets="attention").trained == 16 * 8 * attention


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
    ungated = describe_layers(spec, mlp_inputs=1)
    assert round(count_values(spec) - count_values(ungated)) == 1536
    stock = dataclasses.replace(spec, model_type="cwm")
    more = 2 * 576 + 2 * 1536  # norms in fp32, activation and product
    assert round(count_values(stock) - count_values(spec)) == more


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
    few, many, more = (estimate(spec, packs=packs).kernels for packs in (2, 100, 10_000))
    assert (many, more) == (50 * few, many)
    sparse = dataclasses.replace(spec, num_experts=8)
    assert estimate(sparse, packs=2).kernels - few == EXPERT_KERNEL_BYTES
    assert estimate(spec, packs=100, dtype="fp32").kernels == 0


def test_moments_in_8_bits_take_a_quarter(spec: ModelSpec) -> None:
    wide, small = estimate(spec, **FULL), estimate(spec, **FULL, optim="adamw_8bit")
    saved_bytes = spec.parameters * (8 - 2 * 260 / 256)
    assert wide.trained - small.trained == pytest.approx(saved_bytes)
    assert (wide.update, small.update) == (0, 16 * spec.vocab_size * spec.hidden_size)
    assert small.peak < wide.peak


def test_a_step_in_the_backward_keeps_the_gradient_of_one_tensor(spec: ModelSpec) -> None:
    without = estimate(spec, **FULL, step_in_backward=True)
    largest = spec.vocab_size * spec.hidden_size
    assert estimate(spec, **FULL).trained - without.trained == 4 * (spec.parameters - largest)


def test_4_bit_weights_take_a_quarter_and_the_ends_stay_wide(spec: ModelSpec) -> None:
    plain, small = estimate(spec), estimate(spec, method="qlora")
    ends = 2 * (spec.parameters - spec.block_parameters)
    assert small.weights - ends == pytest.approx(0.258 * (plain.weights - ends), rel=1e-3)
    widened = 2 * 2 * spec.hidden_size * spec.intermediate_size
    assert small == dataclasses.replace(plain, weights=small.weights, widened=widened)


def test_answers_count_where_they_take_more_than_a_step(spec: ModelSpec) -> None:
    run = Footprint("lora", "bf16", rank=16)
    few, many = (
        estimate_peak_memory(spec, run, pack_tokens=2048, cache=CacheSize(1, tokens))
        for tokens in (1000, 100_000)
    )
    assert few.cache == 0
    head_bytes = spec.vocab_size * spec.hidden_size * 2  # generation has a second copy
    cache_bytes = compute_cache_bytes(spec, CacheSize(1, 100_000), 2)
    assert many.cache == cache_bytes + head_bytes - many.step > 0
    assert many.peak - few.peak == many.cache
