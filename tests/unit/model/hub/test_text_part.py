"""Text parts of multimodal checkpoints: what is loaded, what is left out, and what is written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from text_part_configs import VOCABULARY, make_multimodal_configs
from tiny_models import LORA
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import get_lm_head, load_network, wrap_model
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_model_headers, read_spec
from tunesmith.model.merge import read_loras, read_saved_modules, write_merged_weights
from tunesmith.model.save import (
    load_adapter,
    rescale_adapter,
    save_adapter,
    save_config,
    save_model,
)
from tunesmith.model.target_modules import list_linear_paths

CONFIGS = make_multimodal_configs()
TEXT_CLASSES = {
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "gemma4": ("gemma4_text", "Gemma4ForCausalLM"),
    "gemma4_unified": ("gemma4_unified_text", "Gemma4UnifiedForCausalLM"),
    "mistral3": ("ministral3", "Ministral3ForCausalLM"),
    "qwen3_5": ("qwen3_5_text", "Qwen3_5ForCausalLM"),
    "qwen3_vl": ("qwen3", "Qwen3ForCausalLM"),
}
IDS = torch.randint(3, 80, (1, 21), generator=torch.Generator().manual_seed(5))
UNUSED = re.compile(
    r"model\.language_model\.layers\.[23]\.self_attn\.(k_proj|v_proj|k_norm)\.weight"
)
SETTINGS = LORA | {"lora_target_modules": ["q_proj", "down_proj"]}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's


@pytest.fixture(scope="module", params=CONFIGS)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(model_type: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a whole model, every weight of which has an effect."""
    folder = tmp_path_factory.mktemp("whole") / model_type
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(CONFIGS[model_type])
    for parameter in whole.parameters():
        parameter.data.normal_(0, 0.2)
    for name, buffer in whole.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)
    whole.save_pretrained(folder)
    if model_type == "gemma4":
        rewrite(folder, add_shared_keys)
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / folder.name))


@torch.no_grad()
def compute_whole_logits(folder: Path, adapter: Path | None = None) -> Tensor:
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    if adapter is not None:
        whole = PeftModel.from_pretrained(whole, adapter).eval()
    return whole(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def compute_text_logits(folder: Path) -> Tensor:
    network: Any = load_network(folder, torch.float32)
    return network(input_ids=IDS, use_cache=False).logits


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def add_shared_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with keys and values of the two layers that take those of others:
    published files of Gemma 4 E2B and E4B have them, and no module does."""
    unused: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for layer in (0, 1):
            prefix = f"model.language_model.layers.{layer}.self_attn"
            if name.startswith(prefix) and name.split(".")[5] in ("k_proj", "v_proj", "k_norm"):
                unused[name.replace(f"layers.{layer}", f"layers.{layer + 2}")] = tensor + 0.5
    assert len(unused) == 6
    return tensors | unused


def strip_prefix(name: str) -> str:
    """Return the name of a tensor of the text part in the text class, empty for others. Files of
    gemma3 and mistral3 have older names."""
    if UNUSED.fullmatch(name):
        return ""
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return "lm_head.weight" if name.endswith("lm_head.weight") else ""


# ---------------------------------------------------------------- what is loaded


def test_logits_are_those_of_the_whole_model(folder: Path) -> None:
    assert torch.equal(compute_text_logits(folder), compute_whole_logits(folder))


def test_the_spec_describes_the_text_part(folder: Path, model_type: str) -> None:
    assert resolve_model(str(folder)) == folder.resolve()
    spec = read_spec(folder)
    network: Any = load_network(folder, torch.float32)
    assert (spec.model_type, spec.architecture) == TEXT_CLASSES[model_type]
    assert type(network).__name__ == spec.architecture
    unique = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}
    assert spec.parameters == sum(tensor.numel() for tensor in unique.values())
    assert spec.tensor_prefix == "model.language_model."
    mixers = ("delta", "attention") if model_type == "qwen3_5" else ("attention",) * spec.num_layers
    assert spec.layer_mixers == mixers
    assert spec.vocab_size == VOCABULARY
    assert spec.tie_word_embeddings == (model_type != "mistral3" and model_type != "qwen3_vl")
    linears = [p for p, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
    in_layers = [path for path in linears if ".layers." in path]
    assert sorted(list_linear_paths(read_model_headers(folder))) == sorted(in_layers)
    assert spec.block_parameters == sum(
        network.get_submodule(path).weight.numel() for path in in_layers
    )
    stored = load_file(folder / "model.safetensors")
    left_out = [tensor for name, tensor in stored.items() if not strip_prefix(name)]
    assert spec.omitted_bytes == sum(4 * tensor.numel() for tensor in left_out)
    assert left_out


def test_a_config_alone_promises_the_same(copied: Path) -> None:
    spec = read_spec(copied)
    headers = read_model_headers(copied)
    (copied / "model.safetensors").unlink()
    promised = read_spec(copied)
    assert promised.parameters == spec.parameters
    assert promised.block_parameters == spec.block_parameters
    promised_headers = read_model_headers(copied)
    shapes = {name: header.shape for name, header in promised_headers.items()}
    stored = {name: header.shape for name, header in headers.items()}
    assert shapes == stored


def test_older_names_of_the_same_tensors(copied: Path) -> None:
    """Versions of transformers before 4.52 called them otherwise."""
    expected = compute_text_logits(copied)

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            path = strip_prefix(name)
            older = f"language_model.{path}" if path else name.removeprefix("model.")
            renamed[older] = tensor
        return renamed

    rewrite(copied, rename)
    assert torch.equal(compute_text_logits(copied), expected)


def test_no_tensor_starts_at_random(copied: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(copied, lambda tensors: {n: t for n, t in tensors.items() if strip_prefix(n) != name})
    with pytest.raises(InputError, match=r"have no model\.layers\.1\.mlp\.up_proj\.weight"):
        load_network(copied, torch.float32)


def test_the_head_reads_the_text_config(folder: Path, model_type: str) -> None:
    """A trainer that read the outer config lost the soft cap."""
    softcap = {"gemma4": 9.0}.get(model_type, 0.0)
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    assert get_lm_head(whole).softcap == get_lm_head(load_network(folder, torch.float32)).softcap
    assert get_lm_head(whole).softcap == softcap


# ---------------------------------------------------------------- what is written


def make_adapted(folder: Path) -> Any:
    network: Any = load_network(folder, torch.float32)
    METHODS["lora"](network, SETTINGS)
    generator = torch.Generator().manual_seed(1)
    for parameter in get_trainable_parameters(network).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def test_peft_applies_every_tensor_of_an_adapter_to_the_whole_model(
    folder: Path, tmp_path: Path
) -> None:
    """PEFT ignores a name that the model does not have, and computes the base model."""
    network = make_adapted(folder)
    save_adapter(network, tmp_path / "adapter", SETTINGS, folder)
    with torch.no_grad():
        expected = network(input_ids=IDS, use_cache=False).logits
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    theirs = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    applied = {name: p for name, p in theirs.named_parameters() if ".lora_" in name}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(applied) == len(stored) == len(get_trainable_parameters(network))
    for name, tensor in stored.items():
        path, _, part = name.rpartition(".")
        assert torch.equal(applied[f"{path}.default.{part}"], tensor)
    with torch.no_grad():
        logits = theirs(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits - compute_whole_logits(folder)).abs().max() > 0.01
    assert read_adapter(tmp_path / "adapter", folder).rank == SETTINGS["lora_r"]


def test_an_adapter_with_names_of_the_text_class_is_read(folder: Path, tmp_path: Path) -> None:
    """Others train the text class, and their files have its names."""
    network = make_adapted(folder)
    save_adapter(network, tmp_path, SETTINGS, folder)
    whole_names = read_loras(tmp_path, folder)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n.replace("language_model.", ""): t for n, t in tensors.items()}, file)
    text_names = read_loras(tmp_path, folder)
    assert whole_names.keys() == text_names.keys()
    for path, lora in whole_names.items():
        assert torch.equal(lora.a_RI, text_names[path].a_RI)
    fresh: Any = load_network(folder, torch.float32)
    METHODS["lora"](fresh, SETTINGS)
    load_adapter(fresh, file)
    with torch.no_grad():
        expected = network(input_ids=IDS, use_cache=False).logits
        assert torch.equal(fresh(input_ids=IDS, use_cache=False).logits, expected)


def test_merged_weights_keep_the_towers_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    network = make_adapted(folder)
    save_adapter(network, tmp_path / "adapter", SETTINGS, folder)
    merged = tmp_path / "merged"
    merged.mkdir()
    save_config(merged, folder, VOCABULARY, is_packed=True)
    loras = read_loras(tmp_path / "adapter", folder)
    write_merged_weights(folder, loras, merged / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sorted(map(strip_prefix, changed)) == sorted(f"{path}.weight" for path in loras)
    with torch.no_grad():
        expected = network(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(compute_whole_logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_layers_for_further_tokens_come_back_in_any_dtype(copied: Path, tmp_path: Path) -> None:
    extra = {
        "mtp.fc.weight": torch.randn(3, 5).bfloat16(),
        "mtp.position_ids": torch.arange(7),
        "mtp.plain_fp8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    before_bytes = read_spec(copied).omitted_bytes
    rewrite(copied, lambda tensors: tensors | extra)
    assert read_spec(copied).omitted_bytes == before_bytes + 30 + 56 + 3
    write_merged_weights(copied, {}, tmp_path / "merged.safetensors")
    save_model(load_network(copied, torch.float32), tmp_path, copied, torch.float32)
    for name in ("merged.safetensors", "model.safetensors"):
        after = load_file(tmp_path / name)
        for key, tensor in extra.items():
            assert after[key].dtype == tensor.dtype
            assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8))


def test_a_trained_model_is_saved_whole(folder: Path, tmp_path: Path) -> None:
    network: Any = load_network(folder, torch.float32)
    network.model.norm.weight.data += 0.5
    save_model(network, tmp_path, folder, torch.float32)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert list(map(strip_prefix, changed)) == ["model.norm.weight"]
    with torch.no_grad():
        expected = network(input_ids=IDS, use_cache=False).logits
    assert torch.equal(compute_whole_logits(tmp_path), expected)


def test_patterns_and_modules_have_names_of_the_whole_model(gemma3: Path, tmp_path: Path) -> None:
    """Ranks and alphas of single layers, modules trained in full, and another scale."""
    settings = SETTINGS | {
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3},
        "modules_to_save": ["model.norm"],
    }
    network: Any = load_network(gemma3, torch.float32)
    METHODS["lora"](network, settings)
    for parameter in get_trainable_parameters(network).values():
        parameter.data += 0.1
    folder = tmp_path / "adapter"
    save_adapter(network, folder, settings, gemma3)
    adapter = read_adapter(folder, gemma3)
    assert adapter.rank_pattern == {"model.layers.1.self_attn.q_proj": 2}
    assert adapter.alpha_pattern == {"model.layers.0.self_attn.q_proj": 3}
    assert adapter.saved_parameters == ("model.norm.weight",)
    with torch.no_grad():
        expected = network(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(compute_whole_logits(gemma3, folder), expected, rtol=1e-5, atol=1e-5)
    before = load_file(folder / "adapter_model.safetensors")
    modules = read_saved_modules(folder, gemma3)
    rescale_adapter(folder, 0.5, {}, modules)
    after = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after.keys() == before.keys()
    assert read_adapter(folder, gemma3).alpha == SETTINGS["lora_alpha"] / 2


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def gemma3(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(CONFIGS["gemma3"]).save_pretrained(tmp_path / "gemma3")
    return tmp_path / "gemma3"


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("text_config"), "gemma3 has no text part: config.json has no text_config"),
        (
            lambda c: c["text_config"].update(model_type="mamba"),
            "the text part of gemma3, mamba, has layers that carry state",
        ),
        (
            lambda c: c["text_config"].update(use_bidirectional_attention=True),
            "gemma3 attends in both directions",
        ),
        (
            lambda c: c["text_config"].update(layer_types=["full_attention", "chunked_attention"]),
            "layers of type chunked_attention",
        ),
        (lambda c: c["text_config"].update(hidden_size=40), "the embedding .* has shape"),
    ],
)
def test_other_configs_are_refused_by_name(
    gemma3: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_config(gemma3, change)
    with pytest.raises(InputError, match=message) as caught:
        read_spec(gemma3)
    assert caught.value.fix


def test_towers_without_a_text_part_are_refused(gemma3: Path) -> None:
    rewrite(gemma3, lambda tensors: {n: t for n, t in tensors.items() if "vision_tower" in n})
    with pytest.raises(InputError, match="the weights have no text part") as caught:
        read_spec(gemma3)
    assert caught.value.fix


def test_an_adapter_of_another_class_is_refused(gemma3: Path, tmp_path: Path) -> None:
    network = make_adapted(gemma3)
    save_adapter(network, tmp_path / "adapter", SETTINGS, gemma3)
    text_model = tmp_path / "text"
    base: Any = load_network(gemma3, torch.float32)
    base.save_pretrained(text_model)
    with pytest.raises(InputError, match="for a multimodal model, but the base is not") as caught:
        read_adapter(tmp_path / "adapter", text_model)
    assert "multimodal checkpoint" in caught.value.fix
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tower = {
        n.replace("language_model.layers", "vision_tower.layers"): t for n, t in tensors.items()
    }
    save_file(tower, file)
    with pytest.raises(InputError, match="which is not in the text part"):
        read_adapter(tmp_path / "adapter", gemma3)
    text = {n.replace("language_model.", ""): t for n, t in tensors.items()}
    name = next(iter(text))
    save_file(tensors | {name: text[name].clone()}, file)
    with pytest.raises(InputError, match="under two names"):
        read_adapter(tmp_path / "adapter", gemma3)


def test_an_adapter_of_unused_keys_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForImageTextToText.from_config(CONFIGS["gemma4"]).save_pretrained(base)
    rewrite(base, add_shared_keys)
    settings = LORA | {"lora_target_modules": ["k_proj"]}
    network: Any = load_network(base, torch.float32)
    METHODS["lora"](network, settings)
    save_adapter(network, tmp_path, settings, base)
    assert read_adapter(tmp_path, base).target_modules == ("k_proj",)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    unused = {n.replace("rs.0", "rs.2"): t.clone() for n, t in tensors.items() if "rs.0" in n}
    save_file(tensors | unused, file)
    with pytest.raises(InputError, match=r"layers\.2\.self_attn\.k_proj"):
        read_adapter(tmp_path, base)


def test_a_trained_text_part_runs_packed(folder: Path) -> None:
    model = wrap_model(load_network(folder, torch.float32), torch.float32)
    with pytest.raises(TypeError, match="layout"):
        model.network(input_ids=IDS)
