"""Families that no table names are accepted from transformers' classes, and compute the same."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.mistral4.modeling_mistral4 import Mistral4Attention, Mistral4ForCausalLM

from preflight_models import prepare_network
from tiny_models import (
    LORA,
    compute_max_difference,
    compute_step_gradients,
    make_tiny_document,
    make_tiny_documents,
)
from transformers_configs import make_config
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import Document
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import compute_stock_logits, load_network, wrap_model
from tunesmith.model.hub.families import find_family
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.hub.text_class import build_network, load_text_config
from tunesmith.session.family_proof import LENGTHS as PROBE_LENGTHS
from tunesmith.session.family_proof import wrap_proven
from tunesmith.train.losses import sum_weights
from tunesmith.train.preflight import run_preflight

TYPES = (
    *("deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text"),  # sparse attention
    *("gemma3n_text", "hy_v3", "laguna", "mimo_v2_flash", "mistral4"),
)
LENGTHS = {"deepseek_v32": 512, "glm_moe_dsa": 512, "minimax_m3_vl_text": 256}
WHOLE = ("exaone4_5", "kimi_k25", "lfm2_vl", "minicpmv4_7", "qwen2_5_vl", "smolvlm")


def save_model(model_type: str, folder: Path) -> Any:
    """Save a random model of transformers' own class, and return it."""
    torch.manual_seed(0)
    config = make_config(model_type)
    if model_type == "mistral4":
        network: Any = Mistral4ForCausalLM(config)
    else:
        network = AutoModelForCausalLM.from_config(config)
    for name, parameter in network.named_parameters():
        offset = 1.0 if "norm" in name else 0.0
        parameter.data.normal_(offset, 0.2)
    network.eval().save_pretrained(folder)
    return network


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_those_of_the_class_of_the_type(model_type: str, tmp_path: Path) -> None:
    network = save_model(model_type, tmp_path)
    tokens = make_tiny_document(60).tokens_L[:60].tolist()
    expected = compute_stock_logits(network, tokens, [0, 30, 59])
    spec = read_spec(tmp_path)
    assert spec.context_length == min(256, LENGTHS.get(model_type, 256))
    actual = compute_stock_logits(load_network(tmp_path, torch.float32), tokens, [0, 30, 59])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def compute_lora_gradients(network: Any, documents: list[Document]) -> dict[str, torch.Tensor]:
    """Return the gradients of an adapter on a stock network, one document at a time."""
    count = sum_weights(documents)
    for document in documents:
        tokens_L = torch.from_numpy(document.tokens_L).long()
        logits = network(input_ids=tokens_L[None, :-1], use_cache=False).logits[0]
        losses = F.cross_entropy(logits, tokens_L[1:], reduction="none")
        (losses @ torch.from_numpy(document.weights_L[1:]).double() / count).backward()
    parameters = get_trainable_parameters(network)
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("model_type", [*TYPES, *WHOLE])
def test_the_gradients_of_an_adapter_are_those_of_the_stock_network(
    model_type: str, tmp_path: Path
) -> None:
    make_config(model_type).save_pretrained(tmp_path)
    torch.manual_seed(0)
    network: Any = build_network(load_text_config(tmp_path), dtype=torch.float64)
    network.requires_grad_(False).eval().set_experts_implementation("eager")
    METHODS["lora"](network, LORA)
    for parameter in get_trainable_parameters(network).values():
        parameter.data.normal_(0, 0.1)
    documents = make_tiny_documents((70, 31, 1, 17))
    expected = compute_lora_gradients(copy.deepcopy(network), documents)
    _, actual = compute_step_gradients(wrap_model(network, torch.float64), documents, 10**6)
    tolerance = 1e-4 if model_type == "minicpmv4_7" else 5e-6  # its stock delta rule is fp32
    assert compute_max_difference(actual, expected) < tolerance


@pytest.mark.parametrize("model_type", ["bert", "opt", "cohere2_vision", "glm5_next", "mllama"])
def test_what_is_no_decoder_of_known_layers_is_refused(model_type: str, tmp_path: Path) -> None:
    text = f'{{"model_type": "{model_type}", "text_config": {{}}, "architectures": ["A"]}}'
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_spec(tmp_path)
    assert caught.value.fix


def test_the_text_parts_of_multimodal_models_are_found() -> None:
    for model_type in WHOLE:
        family = find_family(model_type)
        assert family is not None
        assert family.tensor_prefix.startswith("model.")


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_published_files_name_the_text_part_without_its_prefix(
    model_type: str, tmp_path: Path
) -> None:
    """transformers writes the names of the published files, which belong to the whole class."""
    config: Any = make_config(model_type)
    tiny = {"depth": 1, "embed_dim": 32, "num_heads": 2, "intermediate_size": 40}
    for name, size in (tiny | {"hidden_size": 48, "out_hidden_size": 48}).items():
        setattr(config.vision_config, name, size)
    config.text_config.rope_parameters["mrope_section"] = [2, 2, 2]
    torch.manual_seed(0)
    network: Any = AutoModelForImageTextToText.from_config(config).eval()
    network.save_pretrained(tmp_path)
    tokens = make_tiny_document(60).tokens_L[:60].tolist()
    expected = compute_stock_logits(network, tokens, [0, 30, 59])
    actual = compute_stock_logits(load_network(tmp_path, torch.float32), tokens, [0, 30, 59])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def count_tokens_from(first: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a network whose attention depends on the place in a pack, from a place on."""
    forward: Any = Mistral4Attention.forward

    def count(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        out, weights = forward(self, hidden_states=hidden_states, **kwargs)
        return out * (1 + (torch.arange(out.shape[1]) >= first))[None, :, None], weights

    monkeypatch.setattr(Mistral4Attention, "forward", count)
    torch.manual_seed(0)
    network = Mistral4ForCausalLM(make_config("mistral4")).eval()
    for name, parameter in network.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return network


def test_a_family_that_counts_the_tokens_of_a_pack_is_refused_when_it_is_wrapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = count_tokens_from(max(PROBE_LENGTHS), monkeypatch)
    with pytest.raises(GateError, match=r"differ from transformers' by \d+%"):
        wrap_proven(network, torch.float32)


def test_a_family_that_calls_its_cache_twice_a_layer_is_refused(tmp_path: Path) -> None:
    """In bf16, where a mean over all tokens would hide the few that come from the cache."""
    network = save_model("diffllama", tmp_path).to(torch.bfloat16)
    with pytest.raises(GateError, match=r"differ from transformers' by \d+%"):
        wrap_proven(network, torch.bfloat16)


def test_one_that_counts_beyond_the_probe_is_refused_by_a_full_pack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = make_tiny_documents((20, 9, 33, 14))
    model, samples = prepare_network(count_tokens_from(100, monkeypatch), documents)
    assert run_preflight(model, samples)
    with pytest.raises(GateError, match=r"in a pack differ from those alone|packed loss"):
        run_preflight(model, dataclasses.replace(samples, full_pack=200))
