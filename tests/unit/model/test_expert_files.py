"""Files of experts: adapters are read and merged, and 4-bit experts are loaded expert by expert."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quick_families import leave_others_to_slow
from tiny_models import (
    CONFIGS,
    EXPERT_FAMILIES,
    LORA,
    SQUARE_CONFIGS,
    collate_documents,
    make_tiny_document,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import add_lora, find_expert_modules, find_linears
from tunesmith.model.causal_lm import load_network, wrap_model
from tunesmith.model.experts import find_experts
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.hub.stored_tensors import read_naming
from tunesmith.model.merge import merge_into_network, read_loras, write_merged_weights
from tunesmith.model.quantization import (
    find_quantized_weights,
    load_quantized,
    roundtrip_network,
)
from tunesmith.model.save import load_adapter, save_adapter, stock_with_adapter

# one matrix per expert in the files, and one tensor for all
FAMILIES = (
    *("qwen3_moe", "mixtral", "glm4_moe", "nemotron_h-experts", "qwen3_5_moe"),
    *("granitemoehybrid-experts", "gpt_oss", "granitemoe", "minimax_m2", "ernie4_5_moe"),
)
CHANGED = (*leave_others_to_slow(FAMILIES), *SQUARE_CONFIGS)
WEIGHTS = "adapter_model.safetensors"
SETTINGS = {"lora_target_modules": ["attention", "experts"]}


@pytest.fixture(autouse=True)
def square_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, config in SQUARE_CONFIGS.items():
        monkeypatch.setitem(CONFIGS, family, config)


def save_base(family: str, folder: Path) -> Path:
    make_tiny_network(family).save_pretrained(folder)
    return folder


def save_trained(family: str, base: Path, folder: Path) -> Any:
    """Save an adapter that has an effect, and return its model."""
    model = make_tiny_model(family, **SETTINGS)
    save_adapter(model.network, folder, LORA | SETTINGS, base)
    return model


@torch.no_grad()
def compute_logits(network: nn.Module) -> Tensor:
    tokens = torch.from_numpy(make_tiny_document(31).tokens_L[:31]).long()[None]
    return network(input_ids=tokens, use_cache=False).logits[0].float()


@torch.no_grad()
def compute_our_logits(model: Any) -> Tensor:
    batch = collate_documents([make_tiny_document(31)])
    batch = dataclasses.replace(batch, positions_S=torch.arange(31))
    return model.head.compute_logits(model.compute_hidden(batch)).float()


@pytest.mark.parametrize("family", leave_others_to_slow(EXPERT_FAMILIES))
def test_every_family_is_loaded_from_its_files(family: str, tmp_path: Path) -> None:
    network = load_network(save_base(family, tmp_path), torch.float32)
    assert torch.equal(compute_logits(network), compute_logits(make_tiny_network(family)))


@pytest.mark.parametrize("family", leave_others_to_slow(FAMILIES))
def test_an_adapter_is_read_with_its_targets(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    save_trained(family, base, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", base)
    assert "experts" in adapter.target_modules
    assert not {"up_proj", "down_proj"} & set(adapter.target_modules)
    assert (adapter.rank, adapter.alpha, dict(adapter.rank_pattern)) == (4, 6, {})


@pytest.mark.parametrize("family", CHANGED)
def test_merged_weights_equal_the_adapter(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    expected = compute_our_logits(save_trained(family, base, tmp_path / "adapter"))
    merged = tmp_path / "merged"
    merged.mkdir()
    loras = read_loras(tmp_path / "adapter", base)
    write_merged_weights(base, loras, merged / "model.safetensors")
    shutil.copyfile(base / "config.json", merged / "config.json")
    network = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(compute_logits(network), expected, rtol=1e-4, atol=1e-4)
    network = make_tiny_network(family)
    merge_into_network(network, loras)
    torch.testing.assert_close(compute_logits(network), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_files_hold_stacks_as_the_stock_module_does(family: str) -> None:
    network = make_tiny_network(family)
    naming = read_naming(network.config.to_dict())
    modules = list(find_expert_modules(network).values())
    assert modules
    assert {module.is_transposed for module in modules} == {naming.has_transposed_stacks}


@pytest.mark.parametrize("family", CHANGED)
def test_the_stock_network_computes_the_adapter(family: str, tmp_path: Path) -> None:
    """It is the oracle of a run that continues an adapter, and is unchanged afterwards."""
    base = save_base(family, tmp_path / "base")
    expected = compute_our_logits(save_trained(family, base, tmp_path / "adapter"))
    network = make_tiny_network(family)
    before = compute_logits(network)
    with stock_with_adapter(network, read_adapter(tmp_path / "adapter", base)):
        torch.testing.assert_close(compute_logits(network), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(compute_logits(network), before)


# ---------------------------------------------------------------- refused


def change_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


PATH = "base_model.model.model.layers.1.mlp"
EXPERTS = f"{PATH}.experts"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{EXPERTS}.lora_A.weight": None, f"{EXPERTS}.lora_B.weight": None},
            r"no \S+\.experts\.lora_A\.weight, which",
        ),
        ({f"{EXPERTS}.lora_A.weight": torch.zeros(4, 24)}, r"it must be \[32, 24\]"),
        (
            {
                f"{PATH}.gate.lora_A.weight": torch.zeros(4, 48),
                f"{PATH}.gate.lora_B.weight": torch.zeros(8, 4),
            },
            "changes the router",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base = save_base("qwen3_moe", tmp_path / "base")
    save_trained("qwen3_moe", base, tmp_path / "adapter")
    change_tensors(tmp_path / "adapter", changes)
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "adapter", base)


def test_an_adapter_of_experts_on_a_dense_base_is_refused(tmp_path: Path) -> None:
    save_trained("qwen3_moe", save_base("qwen3_moe", tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(InputError, match="is not a linear layer of the base"):
        read_adapter(tmp_path / "adapter", save_base("qwen3", tmp_path / "dense"))


# ---------------------------------------------------------------- 4 bits


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_quantized_from_the_files(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path)
    network = load_quantized(base, torch.float32)
    stacks = find_experts(network)
    weights = find_quantized_weights(network)
    num_matrices = 2 if family == "nemotron_h-experts" else 3  # gate and up apart
    expected = num_matrices * sum(experts.num_experts for experts in stacks.values())
    assert stacks
    assert sum(".experts." in name for name in weights) == expected
    for name, parameter in network.named_parameters():
        assert ".experts." not in name or (name.endswith("_bias") and parameter.ndim == 2)
    dense = make_tiny_network(family)
    roundtrip_network(dense)
    assert len(find_linears(dense)) == len(weights) - expected
    torch.testing.assert_close(compute_logits(network), compute_logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *SQUARE_CONFIGS])
def test_an_adapter_on_four_bit_experts_is_merged_into_them(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    save_trained(family, base, tmp_path / "adapter")
    network = load_quantized(base, torch.float32)
    with stock_with_adapter(network, read_adapter(tmp_path / "adapter", base)):
        oracle = compute_logits(network)
    add_lora(network, LORA | SETTINGS)
    load_adapter(network, tmp_path / "adapter" / WEIGHTS)
    expected = compute_our_logits(wrap_model(network, torch.float32))
    torch.testing.assert_close(oracle, expected, rtol=1e-4, atol=1e-4)
    merged = tmp_path / "merged"
    merged.mkdir()
    paths = set(find_linears(make_tiny_network(family)))
    loras = read_loras(tmp_path / "adapter", base)
    write_merged_weights(base, loras, merged / "model.safetensors", paths)
    shutil.copyfile(base / "config.json", merged / "config.json")
    network = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(compute_logits(network), expected, rtol=1e-4, atol=1e-4)


def test_the_config_of_an_adapter_names_no_old_experts(tmp_path: Path) -> None:
    """PEFT takes gate_proj, up_proj and down_proj in target_modules for the experts."""
    model = make_tiny_model("glm4_moe")
    save_adapter(model.network, tmp_path, LORA, Path("base"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"]
    for name in config["target_parameters"]:
        assert name.endswith("_proj.weight")
