"""DoRA equals PEFT and plain autograd, starts bitwise as the base, and recomputes its norms when
needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tiny_models import (
    LORA,
    collate_documents,
    compute_step_gradients,
    make_tiny_document,
    make_tiny_documents,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.model.adapters import add_lora, find_lora_layers, get_trainable_parameters
from tunesmith.model.causal_lm import wrap_model
from tunesmith.model.dora import DoraScale
from tunesmith.model.frozen_weight import BlockedWeight, has_onednn_bf16
from tunesmith.model.kernels import ops
from tunesmith.model.layers import Mlp
from tunesmith.model.lora import LoraLinear, QuantizedLinear, project
from tunesmith.model.save import load_adapter, save_adapter
from tunesmith.train.optimizer import make_optimizer, step_optimizer

FP64 = torch.float64


def random(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def linear(
    inputs: int, outputs: int, *, bias: bool = True, seed: int = 0, dtype: torch.dtype = FP64
) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def adapted(
    base: nn.Linear, *, scale: float = 0.7, dropout: float = 0.0, rank: int = 3
) -> LoraLinear:
    """Return a layer whose B and magnitudes are not at their start."""
    generator = torch.Generator().manual_seed(1)
    layer = LoraLinear(
        base, rank=rank, scale=scale, dropout=dropout, generator=generator, dora=True
    )
    with torch.no_grad():
        layer.lora_B.add_(torch.randn(layer.lora_B.shape, generator=generator))
        magnitude_of(layer).mul_(1 + 0.3 * torch.randn(layer.lora_B.shape[0], generator=generator))
    return layer


def magnitude_of(layer: LoraLinear) -> nn.Parameter:
    assert layer.lora_magnitude_vector is not None
    return layer.lora_magnitude_vector


def leaves_of(*layers: LoraLinear) -> list[Tensor]:
    return [p for layer in layers for p in (layer.lora_A, layer.lora_B, magnitude_of(layer))]


def by_hand(layer: LoraLinear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the paper's equation with a constant norm, differentiable by autograd."""
    weight, dropped = layer.frozen.weight, x if mask is None else x * mask
    norms_O = (weight + layer.scale * layer.lora_B @ layer.lora_A).norm(dim=1).detach()
    v = F.linear(x, weight) + layer.scale * F.linear(F.linear(dropped, layer.lora_A), layer.lora_B)
    y = magnitude_of(layer) / norms_O * v
    return y if layer.bias is None else y + layer.bias


def assert_equal(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    dy = random(*ours.shape, seed=9)
    grads, wanted = (torch.autograd.grad(y, leaves, dy) for y in (ours, expected))
    for actual, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- equal to PEFT


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_equals_pefts(rslora: bool, bias: bool) -> None:
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, use_dora=True, target_modules=["0"])
    theirs = get_peft_model(nn.Sequential(linear(7, 4, bias=bias)), config)  # type: ignore[arg-type]
    ours = adapted(linear(7, 4, bias=bias), scale=5 / 3**0.5 if rslora else 5 / 3)
    named = {
        name.partition(".lora_")[2].partition(".")[0]: p
        for name, p in theirs.named_parameters()
        if "lora_" in name
    }
    torch.testing.assert_close(named["magnitude_vector"].data, ours.frozen.weight.norm(dim=1))
    parts: dict[str, Tensor] = dict(
        zip(("A", "B", "magnitude_vector"), leaves_of(ours), strict=True)
    )
    for name, parameter in named.items():
        parameter.data = parts[name].data.clone()
    x, dy = random(2, 5, 7).requires_grad_(), random(2, 5, 4, seed=9)
    y = theirs(x)
    torch.testing.assert_close(ours(x), y, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(ours(x), [x, *parts.values()], dy)
    wanted = torch.autograd.grad(y, [x, *(named[name] for name in parts)], dy)
    for actual, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- equal to its definition


def test_linears_on_the_same_input_some_without_a_magnitude() -> None:
    plain = LoraLinear(
        linear(5, 3, seed=7),
        rank=2,
        scale=0.5,
        dropout=0.0,
        generator=torch.Generator().manual_seed(4),
    )
    layers = [adapted(linear(5, 4)), plain, adapted(linear(5, 3, bias=False, seed=1))]
    x = random(6, 5).requires_grad_()
    by_plain = F.linear(x, plain.frozen.weight, plain.bias) + 0.5 * F.linear(
        F.linear(x, plain.lora_A), plain.lora_B
    )
    expected = torch.cat([by_hand(layers[0], x), by_plain, by_hand(layers[2], x)], dim=-1)
    leaves = [x, *leaves_of(layers[0], layers[2]), plain.lora_A, plain.lora_B]
    assert_equal(torch.cat(project(x, layers), dim=-1), expected, leaves)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_inside_the_mlp(bias: bool, dropout: float) -> None:
    """Dropout drops the inputs of A and nothing else."""
    stock: Any = nn.Module()
    for seed, (name, shape) in enumerate(
        {"gate_proj": (5, 6), "up_proj": (5, 6), "down_proj": (6, 5)}.items()
    ):
        setattr(stock, name, adapted(linear(*shape, bias=bias, seed=seed), dropout=dropout))
    mlp, x = Mlp(stock, is_gelu=False), random(8, 5).requires_grad_()

    def mask(like: Tensor) -> Tensor | None:
        return (torch.rand(like.shape) >= dropout).to(FP64) / (1 - dropout) if dropout else None

    torch.manual_seed(11)
    ours = mlp(x)
    torch.manual_seed(11)
    masks = [mask(x), mask(x)]
    product = F.silu(by_hand(stock.gate_proj, x, masks[0])) * by_hand(stock.up_proj, x, masks[1])
    expected = by_hand(stock.down_proj, product, mask(product))
    assert_equal(ours, expected, [x, *leaves_of(stock.gate_proj, stock.up_proj, stock.down_proj)])


# ---------------------------------------------------------------- its start and its changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_base_to_the_bit(dtype: torch.dtype) -> None:
    network = make_tiny_network("llama-tied", dtype)
    add_lora(network, LORA | {"use_dora": True})
    batch = collate_documents(make_tiny_documents())
    with torch.no_grad():
        ours, base = (
            m.compute_hidden(batch)
            for m in (wrap_model(network, dtype), make_tiny_model("llama-tied", dtype, method=None))
        )
    assert torch.equal(ours, base)


def test_the_norms_follow_every_change(tmp_path: Path) -> None:
    layer, x = adapted(linear(5, 4)), random(3, 5)
    torch.testing.assert_close(layer(x), by_hand(layer, x))
    assert layer.get_dora_scale(FP64) is layer.get_dora_scale(FP64), "made once for many packs"
    layer(x).sum().backward()
    step_optimizer(make_optimizer(layer.parameters(), weight_decay=0.0), 0.5)
    torch.testing.assert_close(layer(x), by_hand(layer, x))
    layer.scale = 0.2
    torch.testing.assert_close(layer(x), by_hand(layer, x))
    layer.scale = 0.0
    assert torch.equal(layer(x), F.linear(x, layer.frozen.weight, layer.bias)), "the base"
    models = [make_tiny_model(use_dora=True, seed=seed) for seed in (1, 2)]
    batch = collate_documents([make_tiny_document(9)])
    with torch.no_grad():
        before = [model.compute_hidden(batch) for model in models]
        save_adapter(models[0].network, tmp_path, LORA | {"use_dora": True}, Path("base"))
        load_adapter(models[1].network, tmp_path / "adapter_model.safetensors")
        assert not torch.equal(*before)
        assert torch.equal(models[1].compute_hidden(batch), before[0])


def test_a_row_of_zeros_stays_zero() -> None:
    base = linear(5, 4)
    base.weight.data[2] = 0
    layer = LoraLinear(base, rank=2, scale=1.0, dropout=0.0, generator=torch.Generator(), dora=True)
    x = random(3, 5).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, base.weight, base.bias))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [x, *leaves_of(layer)]))


def test_only_magnitudes_come_to_an_adapter() -> None:
    plain, dora = (
        get_trainable_parameters(make_tiny_model(use_dora=wish).network) for wish in (False, True)
    )
    assert {name.rpartition(".")[2] for name in dora.keys() - plain.keys()} == {
        "lora_magnitude_vector"
    }
    assert len(dora) - len(plain) == 14
    compute_step_gradients(make_tiny_model(use_dora=True), make_tiny_documents(), 100)


# ---------------------------------------------------------------- in bf16


def test_bf16_follows_fp64() -> None:
    """With the C kernels if available; a gain below bf16's rounding is not lost."""
    narrow = [
        adapted(linear(64, 96, bias=bias, dtype=torch.bfloat16), rank=8) for bias in (False, True)
    ]
    wide = [
        adapted(linear(64, 96, bias=bias, dtype=torch.bfloat16).double(), rank=8)
        for bias in (False, True)
    ]
    x, dy = random(200, 64).bfloat16().requires_grad_(), random(200, 192, seed=9).bfloat16()
    for actual, other in zip(leaves_of(*narrow), leaves_of(*wide), strict=True):
        assert (actual.dtype, other.dtype) == (torch.float32, FP64)
        actual.data = other.data.float()
    ours, exact_x = torch.cat(project(x, narrow), dim=-1), x.detach().double().requires_grad_()
    expected = torch.cat(project(exact_x, wide), dim=-1)
    results = [ours.detach(), *torch.autograd.grad(ours, [x, *leaves_of(*narrow)], dy)]
    exact = [
        expected.detach(),
        *torch.autograd.grad(expected, [exact_x, *leaves_of(*wide)], dy.double()),
    ]
    for actual, other in zip(results, exact, strict=True):
        assert float((actual.double() - other).norm() / other.norm()) < 6e-3


@pytest.mark.skipif(not has_onednn_bf16(), reason="needs oneDNN's bf16 products")
def test_blocked_weights_give_the_same() -> None:
    layer = adapted(linear(64, 96, dtype=torch.bfloat16), rank=8)
    x = random(70, 64).bfloat16()
    with torch.no_grad():
        plain, layer.frozen = layer(x), BlockedWeight(layer.frozen.weight)
        layer._dora_scale = None
        assert torch.equal(layer(x), plain)


def test_weights_in_4_bits_are_taken_as_they_are() -> None:
    quantized = QuantizedLinear(
        random(6, 64).float(), nn.Parameter(random(6), requires_grad=False), FP64
    )
    layer = LoraLinear(
        quantized,
        rank=3,
        scale=0.7,
        dropout=0.0,
        generator=torch.Generator().manual_seed(1),
        dora=True,
    )
    with torch.no_grad():
        layer.lora_B.add_(random(6, 3, seed=2))
        magnitude_of(layer).mul_(1 + 0.3 * random(6, seed=3))
    x = random(5, 64).requires_grad_()
    assert_equal(layer(x), by_hand(layer, x), [x, *leaves_of(layer)])


@pytest.mark.skipif(
    not ops.is_supported(torch.zeros(1, dtype=torch.bfloat16)), reason="needs a C compiler"
)
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (7, 33), (65, 576)])
def test_the_kernels_equal_their_reference(rows: int, width: int) -> None:
    y, dy, gain_O = (
        random(rows, width).bfloat16(),
        random(rows, width, seed=6).bfloat16(),
        random(width, seed=7).float(),
    )
    expected = (y.double() * gain_O.double()).bfloat16()
    assert torch.equal(ops.scale_columns(y.clone(), gain_O), expected)
    dx, sums = ops.scale_columns_backward(dy, y, gain_O)
    assert torch.equal(dx, (dy.double() * gain_O.double()).bfloat16())
    sizes = (dy.double() * y.double()).abs().sum(0)
    assert ((sums.double() - (dy.double() * y.double()).sum(0)).abs() <= 2**-18 * sizes).all()


def test_a_gain_is_not_rounded_to_bf16() -> None:
    """1.01 is 1.0078 in bf16."""
    gain = DoraScale(torch.full((64,), 1.01), torch.ones(64))
    y = random(500, 64).bfloat16()
    ratio = gain.forward(y.clone()).double().abs().mean() / y.double().abs().mean()
    assert float(ratio) == pytest.approx(1.01, abs=3e-4)


def test_layers_say_what_they_are() -> None:
    layers = find_lora_layers(make_tiny_model(use_dora=True).network)
    assert all("dora" in repr(layer) for layer in layers.values())
