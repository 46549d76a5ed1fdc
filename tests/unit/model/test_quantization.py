"""4-bit weights: bitsandbytes' format, LoRA gradients on dequantized weights, a model loaded tensor
by tensor."""

import sys
from pathlib import Path

import bitsandbytes.functional as functional
import pytest
import torch
from torch import nn

from tiny_models import (
    LORA,
    collate_documents,
    compute_max_difference,
    compute_mean_loss,
    compute_step_gradients,
    make_tiny_documents,
    make_tiny_network,
)
from tiny_runs import save_model_folder
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import METHODS, find_linears, get_trainable_parameters, replace_module
from tunesmith.model.causal_lm import PackedCausalLM, compute_stock_logits, load_network, wrap_model
from tunesmith.model.frozen_weight import NF4Weight, import_bitsandbytes
from tunesmith.model.lora import QuantizedLinear
from tunesmith.model.quantization import find_quantized_weights, load_quantized, roundtrip_nf4

TOKENS, PLACES = list(range(3, 40)), [0, 7, 36]


def random_weight(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (
        0.02 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs))
    ).to(dtype)


def by_the_book(weight: torch.Tensor) -> torch.Tensor:
    """Dequantize in fp32: code times scale, where the scale is quantized too."""
    values, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = (
        torch.stack((values.view(-1) >> 4, values.view(-1) & 15), -1)
        .view(-1)[: weight.numel()]
        .long()
    )
    return (state.code[codes] * scales.repeat_interleave(64)[: weight.numel()]).view_as(weight)


@pytest.mark.parametrize(
    "shape", [(64, 64), (96, 576), (48, 80), (32, 48), (128, 32), (7, 10), (33, 50)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_is_what_bitsandbytes_makes_of_it(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(*shape, dtype)
    assert torch.equal(NF4Weight(weight, dtype).weight, by_the_book(weight).to(dtype))
    error = (roundtrip_nf4(weight) - weight.float()).norm() / weight.float().norm()
    assert 0.05 < error < 0.11  # a normal distribution loses 9% to NF4


def test_quantizing_does_not_depend_on_the_dtype_of_the_products() -> None:
    weight = random_weight(64, 128)
    wide, narrow = (
        NF4Weight(weight.float(), torch.float32).weight,
        NF4Weight(weight, torch.bfloat16).weight,
    )
    assert torch.equal(wide.bfloat16(), narrow)
    assert torch.equal(NF4Weight(weight, torch.float64).weight, wide.double())


def test_weights_take_at_most_27_percent_of_their_bytes_in_bf16() -> None:
    weight = NF4Weight(random_weight(576, 1536), torch.bfloat16)
    assert weight.num_parameters == 576 * 1536
    assert 0.25 < weight.nbytes / (2 * weight.num_parameters) < 0.27


def test_products_are_those_of_the_dequantized_weight() -> None:
    frozen, generator = (
        NF4Weight(random_weight(96, 64, torch.float32), torch.float64),
        torch.Generator().manual_seed(0),
    )
    x, dy, into = (
        torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (64, 96, 64)
    )
    bias = torch.randn(96, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(frozen.compute_outputs(x, bias), x @ frozen.weight.t() + bias)
    torch.testing.assert_close(frozen.compute_input_grad(dy, None), dy @ frozen.weight)
    torch.testing.assert_close(
        frozen.compute_input_grad(dy, into.clone()), into + dy @ frozen.weight
    )


def twins(family: str, dtype: torch.dtype) -> tuple[PackedCausalLM, PackedCausalLM]:
    """Return a model on 4-bit weights, and LoRA on the dequantized weights with the same
    adapter."""
    models = []
    for quantized in (True, False):
        network = make_tiny_network(family, torch.float32).to(dtype)
        for path, linear in find_linears(network).items():
            assert isinstance(linear, nn.Linear)
            small = QuantizedLinear(linear.weight.float(), linear.bias, dtype)
            linear.weight.data = small.weight
            if quantized:
                replace_module(network, path, small)
        METHODS["qlora" if quantized else "lora"](network, LORA)
        generator = torch.Generator().manual_seed(1)
        for parameter in get_trainable_parameters(network).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        models.append(wrap_model(network, dtype))
    return models[0], models[1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_gradients_are_those_of_lora_on_the_dequantized_weights(family: str) -> None:
    quantized, plain = twins(family, torch.float64)
    loss, gradients = compute_step_gradients(quantized, make_tiny_documents(), 50)
    other_loss, others = compute_step_gradients(plain, make_tiny_documents(), 50)
    assert loss == other_loss
    assert compute_max_difference(gradients, others) == 0.0


def test_gradients_in_bf16_are_bitwise_those_of_lora_on_the_dequantized_weights() -> None:
    quantized, plain = twins("llama", torch.bfloat16)
    (loss, gradients), (other_loss, others) = (
        compute_step_gradients(m, make_tiny_documents(), 50) for m in (quantized, plain)
    )
    assert loss == other_loss
    assert all(torch.equal(gradients[name], others[name]) for name in others)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_the_stock_model_with_dequantized_weights(
    tiny_folder: Path, dtype: torch.dtype
) -> None:
    small, stock = load_quantized(tiny_folder, dtype), load_network(tiny_folder, dtype)
    weights, plain = find_quantized_weights(small), load_network(tiny_folder, torch.float32)
    assert weights.keys() == find_linears(stock).keys()
    for path in weights:
        linear = stock.get_submodule(path)
        linear.weight.data = roundtrip_nf4(plain.get_submodule(path).weight).to(dtype)
    assert torch.equal(
        compute_stock_logits(small, TOKENS, PLACES), compute_stock_logits(stock, TOKENS, PLACES)
    )
    others = {
        name: p
        for name, p in stock.named_parameters()
        if name.removesuffix(".weight") not in weights
    }
    mine = dict(small.named_parameters())
    assert mine.keys() == others.keys()
    assert all(
        torch.equal(mine[name], p) and mine[name].dtype == dtype for name, p in others.items()
    )
    assert not any(p.requires_grad or p.is_meta for p in mine.values())
    assert not any(buffer.is_meta for buffer in small.buffers())


@pytest.mark.parametrize(
    "family", ["llama-tied", "llama", "qwen2", "gemma3", "granite", "phi3", "smollm3"]
)
def test_families_are_loaded_in_shards_with_biases_and_tied_heads(
    family: str, tmp_path: Path
) -> None:
    make_tiny_network(family).save_pretrained(tmp_path, max_shard_size="20KB")
    small, stock = load_quantized(tmp_path, torch.float32), load_network(tmp_path, torch.float32)
    for path, weight in find_quantized_weights(small).items():
        stock.get_submodule(path).weight.data = weight.weight
    assert torch.equal(
        compute_stock_logits(small, TOKENS, PLACES), compute_stock_logits(stock, TOKENS, PLACES)
    )


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = make_tiny_network("llama")
    next(iter(find_linears(network).values())).weight.data[0, 0] = torch.inf
    network.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"q_proj\.weight holds NaN or infinite values"):
        load_quantized(tmp_path, torch.float32)


def test_an_adapter_on_some_layers_leaves_the_others_in_4_bits(tmp_path: Path) -> None:
    network = load_quantized(save_model_folder(tmp_path / "m"), torch.float32)
    METHODS["qlora"](network, LORA | {"lora_target_modules": ["q_proj"]})
    model = wrap_model(network, torch.float32)
    assert len(get_trainable_parameters(network)) == 2 * 2
    assert len(find_quantized_weights(network)) == 2 * 7
    compute_mean_loss(model, collate_documents(make_tiny_documents()), 1.0).backward()
    assert all(p.grad is not None for p in get_trainable_parameters(network).values())


def test_without_bitsandbytes_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"pip install '\.\[qlora\]'"):
        import_bitsandbytes()
    with pytest.raises(InputError, match="need bitsandbytes"):
        load_quantized(tiny_folder, torch.float32)
