"""Text parts that no table describes compute what the whole model does, and so do their files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tiny_models import LORA
from transformers_configs import make_whole_config
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import get_lm_head, load_network
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.merge import read_loras, write_merged_weights
from tunesmith.model.save import save_adapter, save_config, save_model
from tunesmith.session.family_proof import TOLERANCE, wrap_and_measure

# of each kind of text part; the others are alike
QUICK = ("cosmos3_omni", "glm4v", "muse_glimmer", "step3p7")
SLOW = (
    *("aya_vision", "cosmos3_edge", "fast_vlm", "glm46v", "glmga", "hyperclovax_vision_v2"),
    *("lfm3_vl", "llava_onevision1_5", "ovis2_5", "pp_chart2table"),
)
TYPES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
IDS = torch.randint(3, 80, (1, 21), generator=torch.Generator().manual_seed(5))
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's


@pytest.fixture(scope="module", params=TYPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a whole model, with the names of tensors of published files."""
    torch.manual_seed(0)
    whole: Any = AutoModelForImageTextToText.from_config(make_whole_config(request.param))
    for name, parameter in whole.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    folder = tmp_path_factory.mktemp("whole") / request.param
    whole.save_pretrained(folder)
    return folder


def load_whole(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@torch.no_grad()
def compute_logits(network: Any) -> Tensor:
    return network(input_ids=IDS, use_cache=False).logits


def test_logits_are_those_of_the_whole_model(folder: Path) -> None:
    network: Any = load_network(folder, torch.float32)
    expected = compute_logits(load_whole(folder))
    torch.testing.assert_close(compute_logits(network), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        hidden = network.base_model(input_ids=IDS, use_cache=False).last_hidden_state
        logits = get_lm_head(network).compute_logits(hidden[0])
    torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-5)
    _, difference = wrap_and_measure(network, torch.float32)
    assert difference < TOLERANCE["fp32"] / 1000


def test_an_adapter_is_that_of_the_whole_model_in_peft_and_merged(
    folder: Path, tmp_path: Path
) -> None:
    """PEFT ignores a name that the model does not have, and computes the base model."""
    network: Any = load_network(folder, torch.float32)
    settings = LORA | {"lora_target_modules": "all-linear"}
    METHODS["lora"](network, settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in get_trainable_parameters(network).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(network, tmp_path / "adapter", settings, folder)
    theirs = PeftModel.from_pretrained(load_whole(folder), tmp_path / "adapter").eval()
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    applied = {name: p for name, p in theirs.named_parameters() if ".lora_" in name}
    assert len(applied) == len(stored) == len(get_trainable_parameters(network))
    for name, tensor in stored.items():
        path, _, part = name.rpartition(".")
        assert torch.equal(applied[f"{path}.default.{part}"], tensor)
    expected = compute_logits(network)
    torch.testing.assert_close(compute_logits(theirs), expected, rtol=1e-5, atol=1e-5)
    assert (expected - compute_logits(load_whole(folder))).abs().max() > 0.01
    assert read_adapter(tmp_path / "adapter", folder).rank == settings["lora_r"]
    merged = tmp_path / "merged"
    merged.mkdir()
    save_config(merged, folder, 97, is_packed=True)
    loras = read_loras(tmp_path / "adapter", folder)
    write_merged_weights(folder, loras, merged / "model.safetensors")
    torch.testing.assert_close(compute_logits(load_whole(merged)), expected, rtol=1e-4, atol=1e-4)


def test_a_trained_model_is_saved_whole(folder: Path, tmp_path: Path) -> None:
    network: Any = load_network(folder, torch.float32)
    norms = [weight for name, weight in network.named_parameters() if "norm" in name]
    norms[-1].data += 0.5
    save_model(network, tmp_path, folder, torch.float32)
    expected = compute_logits(network)
    logits = compute_logits(load_whole(tmp_path))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
