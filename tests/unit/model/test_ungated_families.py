"""Decoders without a gated MLP (Phi-2, StarCoder2, GPT-NeoX, GPT-2): what is particular to them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_models import (
    CONFIGS,
    LORA,
    collate_documents,
    make_stock_network,
    make_tiny_document,
    make_tiny_documents,
    make_tiny_model,
    make_tiny_network,
)
from toy_chat import CHATML, CHATML_TOKENS
from toy_chat import write_model_folder as write_tokenizer_folder
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import find_linears, find_lora_layers
from tunesmith.model.causal_lm import compute_stock_logits, load_network
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.hub.validate import check_folder
from tunesmith.model.merge import read_loras, write_merged_weights
from tunesmith.model.quantization import load_quantized
from tunesmith.model.save import save_adapter

FAMILIES = ("phi", "starcoder2", "gpt_neox", "gpt_neox-sequential", "gpt2", "gpt2-scaled")


def write_folder(folder: Path, network: Any, **renamed: str) -> Path:
    """Write a network as a model folder; `renamed` are words in the names of tensors."""
    config = network.config.to_dict() | {"architectures": [type(network).__name__]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in network.named_parameters():
        for word, replacement in renamed.items():
            name = name.replace(word, replacement)
        tensors[name] = parameter.detach().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dropout_of_the_base_is_off(family: str) -> None:
    """A mask over a pack would let documents change each other's loss."""
    stock = make_stock_network(family).train()
    tokens = torch.arange(3, 40)[None]
    differs = not torch.equal(stock(input_ids=tokens).logits, stock(input_ids=tokens).logits)
    assert differs == (family != "gpt_neox-sequential"), "the configs of the others have some"
    model = make_tiny_model(family)
    batch = collate_documents(make_tiny_documents())
    with torch.no_grad():
        evaluated = model.compute_hidden(batch)
        model.network.train()
        assert torch.equal(model.compute_hidden(batch), evaluated)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_read_and_loaded(family: str, tmp_path: Path) -> None:
    network = make_stock_network(family)
    folder = write_folder(tmp_path, network)
    spec = read_spec(folder)
    assert spec.parameters == sum(parameter.numel() for parameter in network.parameters())
    config = CONFIGS[family]
    width = (config.n_inner or 4 * config.n_embd) if "gpt2" in family else config.intermediate_size
    assert spec.intermediate_size == width
    assert spec.context_length == config.max_position_embeddings
    assert spec.tie_word_embeddings == config.tie_word_embeddings
    assert spec.parts.keys() == {"attention", "mlp"}
    tokens = [5, 6, 7, 8]
    logits = compute_stock_logits(load_network(folder, torch.float32), tokens, [0, 3])
    torch.testing.assert_close(logits, compute_stock_logits(network, tokens, [0, 3]))


def test_old_pythia_files_are_read(tmp_path: Path) -> None:
    """The head had another name, and tables that are computed today were stored."""
    network = make_tiny_network("gpt_neox")
    folder = write_folder(tmp_path, network, lm_head="embed_out")
    tensors = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(3),
    }
    for name, parameter in network.named_parameters():
        tensors[name.replace("lm_head", "embed_out")] = parameter.detach().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_spec(folder).parameters == sum(p.numel() for p in network.parameters())
    tokens = [5, 6, 7, 8]
    logits = compute_stock_logits(load_network(folder, torch.float32), tokens, [3])
    torch.testing.assert_close(logits, compute_stock_logits(network, tokens, [3]))


def test_the_first_files_of_gpt2_are_read(tmp_path: Path) -> None:
    """They hold the decoder alone, with the mask of its attention, and no head."""
    network = make_stock_network("gpt2")
    folder = write_folder(tmp_path, network)
    tensors = {
        "h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "h.1.attn.masked_bias": torch.tensor(-1e9),
    }
    for name, parameter in network.named_parameters():
        tensors[name.removeprefix("transformer.")] = parameter.detach().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    spec = read_spec(folder)
    assert spec.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert spec.tie_word_embeddings
    tokens = [5, 6, 7, 8]
    logits = compute_stock_logits(load_network(folder, torch.float32), tokens, [3])
    torch.testing.assert_close(logits, compute_stock_logits(network, tokens, [3]))
    model = make_tiny_model("gpt2")
    save_adapter(model.network, tmp_path / "adapter", LORA, folder)
    file = tmp_path / "merged.safetensors"
    write_merged_weights(folder, read_loras(tmp_path / "adapter", folder), file)
    merged = load_file(file)
    assert merged.keys() == tensors.keys()
    changed = [name for name in tensors if not torch.equal(merged[name], tensors[name])]
    assert set(changed) == {name for name in tensors if re.search(r"\.c_\w+\.weight", name)}
    assert torch.equal(merged["h.0.attn.bias"], tensors["h.0.attn.bias"])


@pytest.mark.parametrize("family", ["gpt2", "gpt2-scaled"])
def test_gpt2_in_4_bits(family: str, tmp_path: Path) -> None:
    """Blocks of 64 values lie along the rows of [O, I], in the run and in the merged file."""
    folder = write_folder(tmp_path, make_stock_network(family))
    network = load_quantized(folder, torch.float32)
    path = "transformer.h.1.mlp.c_fc"
    file = tmp_path / "merged.safetensors"
    write_merged_weights(folder, {}, file, quantized_paths=[path])
    weight_OI = network.get_submodule(path).frozen.weight  # type: ignore[union-attr]
    assert torch.equal(load_file(file)[f"{path}.weight"].t(), weight_OI)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_has_an_adapter_and_they_can_be_merged(family: str, tmp_path: Path) -> None:
    for name in ("base", "adapter", "merged"):
        (tmp_path / name).mkdir()
    base = write_folder(tmp_path / "base", make_stock_network(family))
    model = make_tiny_model(family)
    linears = find_linears(make_tiny_network(family))
    assert find_lora_layers(model.network).keys() == linears.keys()
    save_adapter(model.network, tmp_path / "adapter", LORA, base)
    shutil.copy(base / "config.json", tmp_path / "merged")
    deltas = read_loras(tmp_path / "adapter", base)
    write_merged_weights(base, deltas, tmp_path / "merged" / "model.safetensors")
    document = make_tiny_document(31)
    batch = collate_documents([document])
    with torch.no_grad():
        ours = model.head.compute_logits(model.compute_hidden(batch))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    positions = batch.positions_S.tolist()
    theirs = compute_stock_logits(merged, document.tokens_L[:31].tolist(), positions)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llama4", "attends within chunks"),
        ("mamba", "carry state from token to token"),
    ],
)
def test_others_are_refused_by_name(model_type: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match=f"{model_type} .*{reason}"):
        read_spec(tmp_path)


@pytest.mark.parametrize("name", ["CodeGenTokenizer", "GPTNeoXTokenizer", "GPT2Tokenizer"])
def test_their_tokenizers_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    """Phi-2, Pythia and StarCoder2 name a class: it must encode as tokenizer.json does."""
    folder = write_tokenizer_folder(tmp_path, CHATML, list(CHATML_TOKENS), eos_token="<|im_end|>")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    (folder / "config.json").write_text("{}")
    check_folder(folder, needs_weights=False)
    stock = AutoTokenizer.from_pretrained(folder)
    assert type(stock).__name__ == name
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("the user  asks 12 345<|im_end|>\n\n x", "Größe don't 日本語 🤗", "  a   b"):
        expected = plain.encode(text, add_special_tokens=False).ids
        assert stock(text, add_special_tokens=False)["input_ids"] == expected
