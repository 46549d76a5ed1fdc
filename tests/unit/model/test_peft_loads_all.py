"""PEFT loads every tensor of an adapter onto the stock model of every family, and computes what we
do. It rewrites the targets of some model types, and then a tensor without a module is dropped."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import transformers_weight_conversion as peft_conversion
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from quick_families import leave_others_to_slow
from tiny_models import (
    CONFIGS,
    LORA,
    SQUARE_CONFIGS,
    collate_documents,
    make_stock_network,
    make_tiny_document,
    make_tiny_model,
)
from tunesmith.core.errors import InputError
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.hub.expert_names import PEFT_EXPERT_TYPES
from tunesmith.model.hub.families import find_family
from tunesmith.model.save import save_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
MLP = ["gate_proj", "up_proj", "down_proj"]


def vary(family: str, **changes: Any) -> PreTrainedConfig:
    config = copy.deepcopy(CONFIGS[family])
    for key, value in changes.items():
        setattr(config, key, value)
    return config


# types with experts, without a layer that has some
DENSE_CONFIGS = {
    "qwen3_moe-dense": vary("qwen3_moe", mlp_only_layers=[0, 1]),
    "glm4_moe-dense": vary("glm4_moe", first_k_dense_replace=2),
    "glm4_moe_lite-dense": vary("glm4_moe_lite", mlp_layer_types=["dense", "dense"]),
    "deepseek_v2-dense": vary("deepseek_v2", first_k_dense_replace=2),
    "deepseek_v3-dense": vary("deepseek_v3", first_k_dense_replace=2),
}


def compare_with_peft(family: str, folder: Path, targets: Any, **changed: Any) -> dict[str, Any]:
    """Assert that PEFT loads all tensors and computes our logits. Return the adapter's config."""
    model = make_tiny_model(family, lora_target_modules=targets, **changed)
    batch = collate_documents([make_tiny_document(31, first_target=1)])
    with torch.no_grad():
        ours = model.head.compute_logits(model.compute_hidden(batch)).float()
    settings = LORA | {"lora_target_modules": targets} | changed
    save_adapter(model.network, folder, settings, Path("base"))
    stock = make_stock_network(family)
    with torch.no_grad():
        base = stock(input_ids=batch.tokens_T[None], use_cache=False).logits[0]
        theirs = PeftModel.from_pretrained(stock, str(folder))
        logits = theirs(input_ids=batch.tokens_T[None], use_cache=False).logits[0]
    stored = load_file(folder / "adapter_model.safetensors")
    loaded: dict[str, torch.Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        if "lora_" in name:
            loaded[name.replace(".default", "")] = tensor
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    difference = (logits[batch.positions_S] - ours).norm() / ours.norm()
    effect = (base[batch.positions_S] - ours).norm() / ours.norm()
    assert difference < 1e-5
    assert effect > 1e-4
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("family", leave_others_to_slow([*CONFIGS, *DENSE_CONFIGS]))
def test_every_tensor_finds_its_module(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in DENSE_CONFIGS:
        monkeypatch.setitem(CONFIGS, family, DENSE_CONFIGS[family])
    config = compare_with_peft(family, tmp_path, "all-linear")
    assert config["target_modules"], "token mixers are adapted as modules"
    assert not any("." in name for name in config["target_modules"])


@pytest.mark.parametrize("family", SQUARE_CONFIGS)
def test_square_experts_are_adapted_as_peft_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, family, SQUARE_CONFIGS[family])
    config = compare_with_peft(family, tmp_path, ["attention", "experts"])
    assert config["target_parameters"]


@pytest.mark.parametrize("family", DENSE_CONFIGS)
@pytest.mark.parametrize("targets", [MLP, ["down_proj"], r".*layers\.0\.mlp\.up_proj"])
def test_dense_layers_alone_of_a_type_with_experts(
    family: str, targets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, family, DENSE_CONFIGS[family])
    config = compare_with_peft(family, tmp_path, targets)
    assert config["target_modules"] == []


@pytest.mark.parametrize("family", DENSE_CONFIGS)
@pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_what_peft_cannot_do_with_such_a_layer_is_refused(
    family: str, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, family, DENSE_CONFIGS[family])
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.gate_proj has none"):
        make_tiny_model(family, **setting)
    make_tiny_model(family, **setting, lora_target_modules="attention")


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not:RuntimeWarning")
@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_moe-dense"])
def test_a_layer_with_a_rank_of_its_own(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT names a layer by its weight where it adapts that."""
    if family in DENSE_CONFIGS:
        monkeypatch.setitem(CONFIGS, family, DENSE_CONFIGS[family])
    base = tmp_path / "base"
    make_stock_network(family).save_pretrained(base)
    ranks = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.self_attn.q_proj": 3}
    alphas = {"model.layers.0.mlp.up_proj": 9.0}
    changed = {"rank_pattern": ranks, "alpha_pattern": alphas}
    compare_with_peft(family, tmp_path, "all-linear", **changed)
    adapter = read_adapter(tmp_path, base)
    assert (adapter.rank_pattern, adapter.alpha_pattern) == (ranks, alphas)


def test_the_types_that_peft_rewrites() -> None:
    bases = peft_conversion._MODEL_TO_CONVERSION_PATTERN
    rewritten = {
        name
        for name in bases
        if find_family(name) and bases[name] in peft_conversion._MOE_TARGET_MODULE_MAPPING
    }
    assert rewritten == PEFT_EXPERT_TYPES
