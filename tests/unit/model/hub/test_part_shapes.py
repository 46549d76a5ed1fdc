"""The widths that the plan computes with are those of the networks."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, PreTrainedModel

from layer_shapes import make_headers
from quick_families import leave_others_to_slow
from tiny_models import (
    CONFIGS,
    LORA,
    SIZES,
    compute_step_gradients,
    make_tiny_documents,
    make_tiny_network,
)
from tunesmith.core.model_spec import PartShape
from tunesmith.model.adapters import METHODS, find_linears, get_trainable_parameters
from tunesmith.model.causal_lm import wrap_model
from tunesmith.model.hub.families import count_experts, count_experts_per_token
from tunesmith.model.hub.part_shapes import measure_norms, measure_parts
from tunesmith.model.hub.text_class import build_network
from tunesmith.model.target_modules import PARTS, find_layer, list_linear_paths


def measure_network(network: PreTrainedModel) -> dict[str, PartShape]:
    config = network.config
    sizes = config.to_dict()
    num_chosen = count_experts_per_token(sizes) if count_experts(sizes) else 0
    return measure_parts(make_headers(network), config.model_type, num_chosen)


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_an_adapter_of_a_part_has_the_parameters_that_are_counted(family: str) -> None:
    shapes = measure_network(make_tiny_network(family))
    parts = [part for part in shapes if part in PARTS]
    assert parts
    for part in parts:
        network = make_tiny_network(family)
        METHODS["lora"](network, LORA | {"lora_r": 3, "lora_target_modules": part})
        num_trained = sum(p.numel() for p in get_trainable_parameters(network).values())
        assert num_trained == 3 * (shapes[part].inputs + shapes[part].outputs) > 0, part


@pytest.mark.parametrize("family", leave_others_to_slow(CONFIGS))
def test_every_linear_of_a_layer_is_counted_once(family: str) -> None:
    network = make_tiny_network(family)
    parts = measure_network(network)
    widths = 0
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear) and find_layer(path) is not None:
            widths += module.in_features + module.out_features
    counted = sum(
        shape.inputs + shape.outputs for part, shape in parts.items() if part != "experts"
    )
    # routers, and what PEFT could not load
    assert counted <= widths
    assert counted >= 0.8 * widths


def test_a_norm_of_heads_is_no_linear() -> None:
    """Cohere's has a row of weights for each head, as Command R+."""
    plain, normed = (
        build_network(CohereConfig(**SIZES, use_qk_norm=use_qk_norm))
        for use_qk_norm in (False, True)
    )
    headers = make_headers(normed)
    assert len(headers["model.layers.0.self_attn.q_norm.weight"].shape) == 2
    assert list_linear_paths(headers) == [*find_linears(normed)]
    assert measure_network(normed) == measure_network(plain)
    inner_values = 2 * (48 + 24)  # of q and k, in two layers
    assert measure_norms(headers, "cohere").inner_values == inner_values


def test_a_token_meets_few_experts() -> None:
    shapes = {"up_proj": (8, 24, 48), "down_proj": (8, 48, 24), "gate_up_proj": (8, 48, 48)}
    layer = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})
    network = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": layer})])})
    part = measure_parts(make_headers(network), "qwen3_moe", 2)["experts"]
    values = {0: 2 * (48 + 24) + 2 * 24}
    assert part == PartShape(values, 8 * (48 + 24 + 48), 8 * (24 + 48 + 48), 2 * (24 + 48), 2 * 24)


def test_experts_may_read_a_projection_of_the_hidden_states() -> None:
    """Those of Nemotron 3 Super and Ultra do, by moe_latent_size."""
    config: Any = copy.deepcopy(CONFIGS["nemotron_h-experts"])
    config.moe_latent_size = 20
    network: Any = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    shape = measure_network(network)["experts"]
    up = network.model.layers[2].mixer.experts.up_proj
    num_experts, width, num_inputs = up.shape
    assert num_inputs == 20
    num_layers = len(shape.layer_values)
    assert (shape.inner_outputs, shape.inner_inputs) == (2 * width * num_layers,) * 2
    METHODS["lora"](network, LORA | {"lora_r": 3, "lora_target_modules": "experts"})
    num_trained = sum(p.numel() for p in get_trainable_parameters(network).values())
    assert num_trained == 3 * (shape.inputs + shape.outputs)
    assert shape.inputs == shape.outputs == num_layers * num_experts * (20 + width)
    model = wrap_model(network, torch.float32)
    _, gradients = compute_step_gradients(model, make_tiny_documents(), 40)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
