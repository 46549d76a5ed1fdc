"""Saved weights load in PEFT and in transformers with equal logits, and here again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny_models import (
    LORA,
    collate_documents,
    make_stock_network,
    make_tiny_document,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import add_lora, find_lora_layers
from tunesmith.model.causal_lm import PackedCausalLM, wrap_model
from tunesmith.model.save import load_adapter, save_adapter, save_model, save_serving_files

DOCUMENT = make_tiny_document(31, first_target=1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's


@torch.no_grad()
def logits(model: PackedCausalLM) -> Tensor:
    return model.head.compute_logits(model.compute_hidden(collate_documents([DOCUMENT])))


@torch.no_grad()
def their_logits(network: torch.nn.Module) -> Tensor:
    tokens = torch.from_numpy(DOCUMENT.tokens_L[:31]).long()[None]
    positions = collate_documents([DOCUMENT]).positions_S
    return network(input_ids=tokens, use_cache=False).logits[0, positions].float()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama-tied", {"use_rslora": True}),
        ("gemma2", {"lora_target_modules": ["q_proj", "up_proj"]}),
        ("qwen3", {"lora_target_modules": ["layers.1.self_attn.v_proj", "layers.0.mlp.down_proj"]}),
        ("granite", {"lora_target_modules": "attention"}),
        ("phi3", {"lora_target_modules": r".*\.1\.\w+\.(o|down)_proj"}),
        ("qwen2", {"use_dora": True}),
        ("gpt_oss", {"lora_target_modules": "attention"}),
        ("deepseek_v3", {"lora_target_modules": "attention"}),
        ("phi", {}),
        ("starcoder2", {}),
        ("gpt_neox", {}),
        ("gpt2", {}),
        ("gpt2-scaled", {"use_dora": True, "lora_target_modules": ["c_attn", "c_proj"]}),
        (
            "llama-tied",
            {"use_dora": True, "use_rslora": True, "lora_target_modules": ["v_proj", "down_proj"]},
        ),
    ],
)
def test_an_adapter_loads_in_peft_and_back(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make_tiny_model(family, **settings)
    expected = logits(model)
    save_adapter(model.network, tmp_path, LORA | settings, Path("base-model"))
    theirs = PeftModel.from_pretrained(make_stock_network(family), tmp_path)
    torch.testing.assert_close(their_logits(theirs), expected, rtol=1e-5, atol=1e-5)

    network = make_tiny_network(family)
    add_lora(network, LORA | settings)
    load_adapter(network, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(wrap_model(network, torch.float32)), expected)


def test_an_adapter_of_a_bf16_base_is_saved_in_fp32(tmp_path: Path) -> None:
    model = make_tiny_model(dtype=torch.bfloat16)
    save_adapter(model.network, tmp_path, LORA, Path("base-model"))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert len(stored) == 2 * len(find_lora_layers(model.network))
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "base-model"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lora_target_modules": ["q_proj"]}, "other layers"), ({"lora_r": 2}, "not \\(2, 48\\)")],
)
def test_an_adapter_of_another_shape_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_adapter(make_tiny_model().network, tmp_path, LORA, Path("base-model"))
    other = make_tiny_model(**settings)
    before = logits(other)
    with pytest.raises(InputError, match=message):
        load_adapter(other.network, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize(
    "family", ["llama", "llama-tied", "gemma2", "qwen3", "olmo2", "gpt2", "gpt2-scaled"]
)
def test_a_fully_trained_model_loads_in_transformers(family: str, tmp_path: Path) -> None:
    base, saved = tmp_path / "base", tmp_path / "saved"
    make_stock_network(family).save_pretrained(base)
    model = make_tiny_model(family, method="full")
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.01
    save_model(model.network, saved, base, torch.float32)
    loaded: Any = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    theirs, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(their_logits(theirs.eval()), logits(model), rtol=1e-4, atol=1e-4)


def test_serving_files_say_where_an_answer_ends(tmp_path: Path) -> None:
    base, saved = tmp_path / "base", tmp_path / "saved"
    base.mkdir()
    saved.mkdir()
    (base / "tokenizer.json").write_text("{}")
    (base / "generation_config.json").write_text('{"eos_token_id": 0, "top_p": 0.9}')
    (base / "chat_template.jinja").write_text("not this one")
    save_serving_files(
        saved, base, templates={"default": "{{ messages }}\r\n", "tool_use": "t"}, end_ids=[2, 5]
    )
    assert json.loads((saved / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 5],
        "top_p": 0.9,
    }
    assert (saved / "chat_template.jinja").read_bytes() == b"{{ messages }}\r\n"
    assert (saved / "additional_chat_templates" / "tool_use.jinja").read_text() == "t"
    assert (saved / "tokenizer.json").exists()
