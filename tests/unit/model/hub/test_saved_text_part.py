"""Text parts of Qwen3.5 as transformers saves them by themselves: the config is that of the text
class, the names of the tensors are those of the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from text_part_configs import make_multimodal_configs, make_multimodal_expert_configs
from tiny_models import LORA
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import load_network
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.merge import read_loras, write_merged_weights
from tunesmith.model.save import save_adapter, save_model

CONFIGS = make_multimodal_configs() | make_multimodal_expert_configs()
WEIGHTS = "model.safetensors"
PREFIX = "model.language_model."
IDS = torch.randint(3, 80, (1, 21), generator=torch.Generator().manual_seed(5))
SETTINGS = LORA | {"lora_target_modules": ["q_proj", "in_proj_z"]}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(CONFIGS[request.param])
    for parameter in whole.parameters():
        parameter.data.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("text")
    whole.save_pretrained(folder / "whole")
    AutoModelForCausalLM.from_pretrained(folder / "whole").save_pretrained(folder / "text")
    return folder / "text"


@torch.no_grad()
def compute_logits(network: Any) -> Tensor:
    return network(input_ids=IDS, use_cache=False).logits


def load_stock(folder: Path) -> Any:
    network, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return network.eval()


def test_the_names_of_the_whole_model_are_read(folder: Path) -> None:
    assert all(name.startswith((PREFIX, "lm_head.")) for name in load_file(folder / WEIGHTS))
    network = load_network(folder, torch.float32)
    assert torch.equal(compute_logits(network), compute_logits(load_stock(folder)))
    spec = read_spec(folder)
    assert spec.tensor_prefix == ""
    assert spec.omitted_bytes == 0
    assert spec.parameters == sum(p.numel() for p in network.parameters())


def test_peft_applies_an_adapter_to_this_folder(folder: Path, tmp_path: Path) -> None:
    """transformers loads the text class from it, whose names have no prefix."""
    network: Any = load_network(folder, torch.float32)
    METHODS["lora"](network, SETTINGS)
    for parameter in get_trainable_parameters(network).values():
        parameter.data += 0.1
    save_adapter(network, tmp_path, SETTINGS, folder)
    theirs = PeftModel.from_pretrained(load_stock(folder), tmp_path).eval()
    applied = {name: p for name, p in theirs.named_parameters() if ".lora_" in name}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(applied) == len(stored) == len(get_trainable_parameters(network))
    assert all(bool(parameter.any()) for parameter in applied.values())
    expected = compute_logits(network)
    torch.testing.assert_close(compute_logits(theirs), expected, rtol=1e-5, atol=1e-5)
    assert read_adapter(tmp_path, folder).rank == SETTINGS["lora_r"]
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_merged_weights(folder, read_loras(tmp_path, folder), merged / WEIGHTS)
    torch.testing.assert_close(compute_logits(load_stock(merged)), expected, rtol=1e-4, atol=1e-4)


def test_a_trained_model_loads_in_transformers(folder: Path, tmp_path: Path) -> None:
    network: Any = load_network(folder, torch.float32)
    network.model.norm.weight.data += 0.5
    save_model(network, tmp_path, folder, torch.float32)
    assert torch.equal(compute_logits(load_stock(tmp_path)), compute_logits(network))
