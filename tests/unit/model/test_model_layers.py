"""Replacement modules, where the equality of full models (test_families) would not show an
error."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tiny_models import (
    CONFIGS,
    collate_documents,
    make_tiny_document,
    make_tiny_documents,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.model.causal_lm import wrap_model
from tunesmith.model.layers import (
    Attention,
    Mlp,
    PrunedLastLayer,
    RMSNorm,
    build_replacement,
    halve_cos_sin,
    replace_layers,
)


@pytest.mark.parametrize("stock_type", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_norm_rounds_once(stock_type: type[nn.Module], dtype: torch.dtype) -> None:
    """Gemma stores weight - 1: the sum needs more digits than bf16 has."""
    generator = torch.Generator().manual_seed(0)
    stock = stock_type(64)
    stock.weight.data = (0.3 * torch.randn(64, generator=generator)).to(dtype)
    x = torch.randn(5, 64, generator=generator).to(dtype)
    exact = stock.double()(x.double()).detach()
    stock.to(dtype)
    ours = build_replacement(stock)
    assert isinstance(ours, RMSNorm)
    digits = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours(x).detach().double(), exact, rtol=digits, atol=1e-6)


def test_the_last_layer_computes_selected_positions_only() -> None:
    """The pruned layer's outputs are bitwise equal to those of the full layer."""
    model, batch = make_tiny_model(dtype=torch.float64), collate_documents(make_tiny_documents())
    last = model.decoder.layers[-1]
    assert isinstance(last, PrunedLastLayer)
    widths = []
    hook = last.mlp.register_forward_pre_hook(
        lambda _module, inputs: widths.append(inputs[0].shape[1])
    )
    everything = dataclasses.replace(batch, positions_S=torch.arange(batch.layout.num_tokens))
    with torch.no_grad():
        pruned, full = model.compute_hidden(batch), model.compute_hidden(everything)
    hook.remove()
    assert widths == [len(batch.positions_S), batch.layout.num_tokens]
    torch.testing.assert_close(pruned, full[batch.positions_S], rtol=1e-12, atol=1e-12)


def test_unlisted_classes_stay_stock() -> None:
    network = make_tiny_network("olmo2")
    modules = {name: type(module) for name, module in network.named_modules()}
    replace_layers(network)
    assert {name: type(module) for name, module in network.named_modules()} == modules


def test_an_unlisted_activation_stays_stock() -> None:
    config = type(CONFIGS["llama-tied"]).from_dict(
        CONFIGS["llama-tied"].to_dict() | {"hidden_act": "relu"}
    )
    network = AutoModelForCausalLM.from_config(config)
    wrap_model(network, torch.float32)
    kinds = {type(module) for module in network.modules()}
    assert Attention in kinds
    assert Mlp not in kinds


def test_half_angles_are_wide_and_half() -> None:
    table = torch.rand(1, 5, 8).bfloat16()
    cosine, sine = halve_cos_sin(table, table, head_dim=8)
    assert cosine.shape == sine.shape == (5, 4)
    assert cosine.dtype == torch.float32
    assert halve_cos_sin(table.double(), table.double(), head_dim=8)[0].dtype == torch.float64


def test_the_stream_has_the_compute_dtype() -> None:
    """Master weights of a fully trained model are fp32; products still run in bf16."""
    model = make_tiny_model(dtype=torch.bfloat16, method="full")
    assert model.network.get_parameter("model.embed_tokens.weight").dtype == torch.float32
    assert model.compute_hidden(collate_documents(make_tiny_documents())).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "granite", "mistral"])
def test_a_window_is_that_of_the_stock_module(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama config that was made from another one may have the key, which Llama ignores."""
    windowed = copy.deepcopy(CONFIGS[family])
    windowed.sliding_window = 4
    monkeypatch.setitem(CONFIGS, "windowed", windowed)
    assert_equal_to_stock("windowed")


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_scores_are_capped_where_transformers_caps_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 has the key and does not apply it."""
    capped = copy.deepcopy(CONFIGS[family])
    capped.attn_logit_softcapping = 0.5
    monkeypatch.setitem(CONFIGS, "capped", capped)
    assert_equal_to_stock("capped")


def assert_equal_to_stock(family: str) -> None:
    batch = collate_documents([make_tiny_document(31, first_target=1)])
    model = make_tiny_model(family, torch.float64, method=None)
    with torch.no_grad():
        ours = model.head.compute_logits(model.compute_hidden(batch))
        stock = make_tiny_network(family, torch.float64)
        theirs = stock(input_ids=batch.tokens_T[None], use_cache=False).logits[0]
    # norms in fp32
    torch.testing.assert_close(ours, theirs[batch.positions_S], rtol=1e-5, atol=1e-5)
