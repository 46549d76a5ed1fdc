"""Each value of a config.json varied alone: packed documents have the loss and the gradients that
transformers has one document at a time, or the config is refused by name while it is read."""

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tiny_models import (
    CONFIGS,
    collate_documents,
    compute_mean_loss,
    make_tiny_documents,
)
from tunesmith.core.errors import InputError
from tunesmith.model.causal_lm import load_network, wrap_model
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.hub.text_class import LOAD_ERRORS
from tunesmith.model.target_modules import is_transposed_linear
from tunesmith.train.losses import sum_weights
from varied_configs import Values, list_variants
from wide_configs import SETTINGS, make_wide_config

pytestmark = [
    pytest.mark.slow,
    # a family without rotations may have one in its config
    pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning"),
]
FAMILIES = (
    *("apertus", "arcee", "bitnet", "cwm", "deepseek_v3", "ernie4_5", "ernie4_5_moe", "falcon_h1"),
    *("gemma4", "glm", "glm4", "glm4_moe_lite", "gpt2", "gpt_neox", "gpt_oss", "granite_swa"),
    *("helium", "iquestcoder", "jais2", "lfm2", "ministral3", "mixtral", "nemotron_h"),
    *("nemotron_h-experts", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "phi", "qwen3_5"),
    *("qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_next-experts", "starcoder2"),
)
# transformers computes norms, routers and recurrences in fp32
TOLERANCE, DELTA_TOLERANCE = 5e-5, 1e-3
DELTA_FAMILIES = ("qwen3_5", "qwen3_next", "olmo_hybrid")
LOSS_TOLERANCE = 1e-6
DOCUMENTS = make_tiny_documents((5, 17, 1, 45, 13))
# of all gradients together: a smaller one is compared relative to this
SMALL_SHARE = 1e-4
FROZEN = (".experts.", "e_score_correction_bias")  # experts, and what a router counts


def find_config(family: str) -> PreTrainedConfig:
    if family == "qwen3_next-experts":
        config: Any = copy.deepcopy(CONFIGS["qwen3_next"])
        config.mlp_only_layers = [1]
        return config
    if family in CONFIGS:
        return copy.deepcopy(CONFIGS[family])
    assert family in SETTINGS
    config = make_wide_config(family)
    config.update({"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2})
    config.head_dim = 12 if family == "helium" else 16  # whose output has the size of its input
    if family == "olmo3":
        config.layer_types, config.sliding_window = ["sliding_attention", "full_attention"], 8
    return config


def describe(config: PreTrainedConfig) -> Values:
    """Return the values of config.json as they are saved."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    values = {key: value for key, value in config.to_dict().items() if key != "dtype"}
    return values | {"architectures": [type(network).__name__]}


def save_stock_model(values: Values, folder: Path) -> Any:
    """Save a model with these values, all weights with an effect, and return it in fp64."""
    for file in folder.iterdir():
        file.unlink()
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(values), encoding="utf-8")
    config = AutoConfig.from_pretrained(folder)
    network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or ".ln_" in name:
            parameter.data += 0.3 * noise
        else:
            parameter.data = 0.5 * noise - 3 if name.endswith("A_log") else 0.2 * noise
    network.save_pretrained(folder)
    config_file.write_text(json.dumps(values), encoding="utf-8")
    return use_fp64_experts(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))


def use_fp64_experts(network: Any) -> Any:
    """torch's grouped product has no fp64."""
    if any("Experts" in type(module).__name__ for module in network.modules()):
        network.set_experts_implementation("eager")
    return network.eval()


def compute_stock(network: Any) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients, each document in a network of its own: dynamic rotations remember
    the longest."""
    count, total, gradients = sum_weights(DOCUMENTS), 0.0, dict[str, Tensor]()
    for document in DOCUMENTS:
        fresh = copy.deepcopy(network).requires_grad_(True)
        tokens_L = torch.from_numpy(document.tokens_L).long()
        logits = fresh(input_ids=tokens_L[None, :-1], use_cache=False).logits[0]
        losses = F.cross_entropy(logits.double(), tokens_L[1:], reduction="none")
        loss = (losses * torch.from_numpy(document.weights_L)[1:].double()).sum() / count
        loss.backward()
        total += float(loss.detach())
        for name, parameter in fresh.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0) + parameter.grad
    return total, gradients


def compute_packed(folder: Path) -> tuple[float, dict[str, Tensor]]:
    network: Any = use_fp64_experts(load_network(folder, torch.float64))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not any(word in name for word in FROZEN))
    model = wrap_model(network, torch.float64)
    loss = compute_mean_loss(model, collate_documents(DOCUMENTS), sum_weights(DOCUMENTS))
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.network.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            gradients[name] = gradient.t() if is_transposed_linear(name) else gradient
    return float(loss.detach()), gradients


def measure_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of a gradient, relative to its norm."""
    smallest = SMALL_SHARE * float(torch.stack([x.norm() for x in theirs.values()]).norm())
    worst = 0.0
    for name, expected in theirs.items():
        if any(word in name for word in FROZEN) or float(expected.norm()) < 1e-5 * smallest:
            continue
        difference = float((ours[name] - expected).norm())
        worst = max(worst, difference / max(float(expected.norm()), smallest))
    return worst


def try_variant(values: Values, folder: Path) -> tuple[float, float] | str:
    """Return how far loss and gradients are from transformers', or why there is nothing to
    compare. A config that transformers cannot compute may be refused, or fail there again."""
    try:
        expected_loss, expected = compute_stock(save_stock_model(values, folder))
    except (*LOAD_ERRORS, RuntimeError) as error:
        with suppress(InputError):
            read_spec(folder)
        return f"transformers: {type(error).__name__}"
    try:
        read_spec(folder)
        loss, gradients = compute_packed(folder)
    except InputError as refusal:
        return f"refused: {refusal}"
    return abs(loss - expected_loss) / expected_loss, measure_difference(gradients, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_value_is_computed_as_in_transformers_or_refused(family: str, tmp_path: Path) -> None:
    values = describe(find_config(family))
    tolerance = DELTA_TOLERANCE if family.startswith(DELTA_FAMILIES) else TOLERANCE
    variants = list_variants(values)
    wrong: dict[str, tuple[float, float]] = {}
    num_equal = 0
    for label, changes in variants.items():
        outcome = try_variant(values | changes, tmp_path)
        if isinstance(outcome, str):
            continue
        is_equal = outcome[0] < LOSS_TOLERANCE and outcome[1] < tolerance
        num_equal += is_equal
        if not is_equal:
            wrong[label] = outcome
    assert wrong == {}
    # transformers cannot compute some rotations, and values without others that go with them
    assert num_equal > 0.6 * len(variants)
