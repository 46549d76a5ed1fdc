"""Adapted linears and their hand-written gradients equal PEFT and plain autograd."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import gradcheck

from tiny_models import (
    collate_documents,
    compute_max_difference,
    compute_step_gradients,
    make_tiny_documents,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.data.packing import count_input_tokens
from tunesmith.model.adapters import find_lora_layers, get_trainable_parameters
from tunesmith.model.layers import Mlp
from tunesmith.model.lora import (
    Fp32MasterLinear,
    LinearGroup,
    LoraLinear,
    PreparedLinear,
    prepare_group,
    project,
)
from tunesmith.train.losses import sum_weights
from tunesmith.train.optimizer import make_optimizer, step_optimizer

FP64 = torch.float64


def linear(
    inputs: int, outputs: int, *, bias: bool = True, seed: int = 0, dtype: torch.dtype = FP64
) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def adapted(base: nn.Linear, *, scale: float = 0.7, dropout: float = 0.0) -> LoraLinear:
    """Return a layer whose B is not 0."""
    layer = LoraLinear(
        base, rank=3, scale=scale, dropout=dropout, generator=torch.Generator().manual_seed(1)
    )
    layer.lora_B.data = torch.randn(
        layer.lora_B.shape, generator=torch.Generator().manual_seed(2)
    ).to(layer.lora_B)
    return layer


def random(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def by_hand(layer: LoraLinear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute a LoraLinear in operations that autograd differentiates."""
    dropped = x if mask is None else x * mask
    return F.linear(x, layer.frozen.weight, layer.bias) + layer.scale * F.linear(
        F.linear(dropped, layer.lora_A), layer.lora_B
    )


def dropout_mask(like: Tensor, rate: float) -> Tensor:
    return (torch.rand(like.shape) >= rate).to(like.dtype) / (1 - rate)


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    dy = random(*y.shape, seed=9).to(y.dtype)
    return list(torch.autograd.grad(y, leaves, dy))


# ---------------------------------------------------------------- equal to PEFT


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_equals_pefts(rslora: bool, bias: bool) -> None:
    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules=["0"], lora_dropout=0.0
    )
    theirs = get_peft_model(nn.Sequential(linear(7, 4, bias=bias)), config)  # type: ignore[arg-type]
    ours = adapted(linear(7, 4, bias=bias), scale=5 / 3**0.5 if rslora else 5 / 3)
    named = {name.split(".")[-3]: p for name, p in theirs.named_parameters() if "lora_" in name}
    named["lora_A"].data, named["lora_B"].data = ours.lora_A.data.clone(), ours.lora_B.data.clone()
    x = random(2, 5, 7).requires_grad_()
    y = theirs(x)
    torch.testing.assert_close(ours(x), y, rtol=1e-12, atol=1e-12)
    for actual, other in zip(
        gradients(ours(x), [x, ours.lora_A, ours.lora_B]),
        gradients(y, [x, named["lora_A"], named["lora_B"]]),
        strict=True,
    ):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # asked for by PEFT
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "lora_target_modules": ["q_proj", "down_proj"]}),
        ("gemma2", {"lora_target_modules": ["k_proj", "o_proj", "gate_proj"]}),
        ("qwen2", {}),
        ("phi3", {"use_rslora": True}),
        ("llama", {"use_dora": True, "use_rslora": True}),
        ("qwen2", {"use_dora": True}),
        ("gemma2", {"use_dora": True, "lora_target_modules": ["o_proj", "gate_proj"]}),
        ("phi3", {"use_dora": True}),
    ],
)
def test_a_model_equals_pefts(family: str, settings: dict[str, Any]) -> None:
    """Return the loss and the gradient of every A and B from PEFT, one document at a time."""
    ours, documents = make_tiny_model(family, FP64, **settings), make_tiny_documents()
    theirs = get_peft_model(
        make_tiny_network(family, FP64),
        LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=bool(settings.get("use_dora")),
            target_modules=settings.get("lora_target_modules", "all-linear"),
        ),
    )
    weights = {
        re.sub(r"\.default(\.weight)?$", "", name): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    mine = {
        f"base_model.model.{name}": p for name, p in get_trainable_parameters(ours.network).items()
    }
    assert weights.keys() == mine.keys()
    for name, parameter in weights.items():
        parameter.data = mine[name].data.clone()
    total = torch.zeros((), dtype=FP64)
    for document in documents:
        tokens_L = torch.from_numpy(document.tokens_L).long()
        logits = (
            theirs(input_ids=tokens_L[None, : count_input_tokens(document)], use_cache=False)
            .logits[0]
            .double()
        )
        losses = F.cross_entropy(logits, tokens_L[1:], reduction="none")
        total = total + (
            losses * torch.from_numpy(document.weights_L[1:]).double()
        ).sum() / sum_weights(documents)
    total.backward()
    loss, grads = compute_step_gradients(ours, documents, 40)
    assert abs(loss - float(total.detach())) < 1e-6  # transformers' norms compute in fp32
    expected = {
        name.removeprefix("base_model.model."): p.grad
        for name, p in weights.items()
        if p.grad is not None
    }
    assert compute_max_difference(grads, expected) < 5e-6


# ---------------------------------------------------------------- hand-written gradients


def parameters_of(*modules: nn.Module) -> list[Tensor]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def test_gradcheck_of_projections() -> None:
    """Return several linears for one input: adapted with and without bias, trained, frozen, and
    with scale 0."""
    off = adapted(linear(5, 2, seed=4), scale=0.0).requires_grad_(False)
    modules = [
        adapted(linear(5, 4)),
        adapted(linear(5, 3, bias=False, seed=1)),
        Fp32MasterLinear(linear(5, 2, seed=2).requires_grad_(True)),
        linear(5, 3, seed=3),
        off,
    ]
    x = random(2, 3, 5).requires_grad_()
    assert gradcheck(lambda *_: project(x, modules), (x, *parameters_of(*modules)))


class Gated(nn.Module):
    """Modules of a stock MLP's shape."""

    def __init__(self, *, full: bool, dropout: float = 0.0) -> None:
        super().__init__()
        bases = linear(5, 6), linear(5, 6, seed=1), linear(6, 5, seed=2)
        layers: list[Any] = [
            Fp32MasterLinear(b.requires_grad_(True)) if full else adapted(b, dropout=dropout)
            for b in bases
        ]
        self.gate_proj, self.up_proj, self.down_proj = layers


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_gradcheck_of_the_mlp(gelu: bool, full: bool) -> None:
    mlp, x = Mlp(Gated(full=full), is_gelu=gelu), random(2, 2, 5).requires_grad_()
    assert gradcheck(lambda *_: mlp(x), (x, *parameters_of(mlp)))


def test_a_frozen_input_needs_no_gradient() -> None:
    """The first layer's input comes from a frozen embedding: only the gradients of A and B are
    computed."""
    layer, x = adapted(linear(5, 4)), random(3, 5)
    for actual, other in zip(
        gradients(layer(x), [layer.lora_A, layer.lora_B]),
        gradients(by_hand(layer, x), [layer.lora_A, layer.lora_B]),
        strict=True,
    ):
        torch.testing.assert_close(actual, other)


# ---------------------------------------------------------------- dropout


def test_dropout_equals_its_definition() -> None:
    """Masks of several linears are sampled in order; a manual computation with the same seed is
    equal."""
    layers, x = (
        [adapted(linear(5, 4), dropout=0.4), adapted(linear(5, 3, seed=1), dropout=0.4)],
        random(7, 5),
    )
    x.requires_grad_()
    leaves = [x, *parameters_of(*layers)]
    torch.manual_seed(11)
    ours = torch.cat(project(x, layers), dim=-1)
    torch.manual_seed(11)
    masks = [dropout_mask(x, 0.4) for _ in layers]
    expected = torch.cat(
        [by_hand(layer, x, mask) for layer, mask in zip(layers, masks, strict=True)], dim=-1
    )
    assert not masks[0].bool().all()
    torch.testing.assert_close(ours, expected)
    for actual, other in zip(gradients(ours, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(actual, other)


def test_dropout_inside_the_mlp_equals_its_definition() -> None:
    stock, x = Gated(full=False, dropout=0.3), random(6, 5).requires_grad_()
    mlp = Mlp(stock, is_gelu=False)
    leaves = [x, *parameters_of(mlp)]
    torch.manual_seed(11)
    ours = mlp(x)
    torch.manual_seed(11)
    masks = [dropout_mask(x, 0.3), dropout_mask(x, 0.3)]
    product = F.silu(by_hand(stock.gate_proj, x, masks[0])) * by_hand(stock.up_proj, x, masks[1])
    expected = by_hand(stock.down_proj, product, dropout_mask(product, 0.3))
    torch.testing.assert_close(ours, expected)
    for actual, other in zip(gradients(ours, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(actual, other)


def test_no_dropout_outside_of_training() -> None:
    layer, x = adapted(linear(5, 4), dropout=0.5), random(7, 5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), by_hand(layer, x))


def test_prepared_products_are_cached_while_nothing_trains() -> None:
    """The cache follows every change of the parameters."""
    layers, x = [adapted(linear(5, 4, seed=seed)).eval() for seed in range(2)], random(7, 5)

    def right() -> LinearGroup:
        with torch.no_grad():
            for y, layer in zip(project(x, layers), layers, strict=True):
                torch.testing.assert_close(y, by_hand(layer, x))
            return prepare_group(layers, x.dtype)

    output = right()
    assert right() is output
    with torch.no_grad():
        layers[1].lora_A.add_(1)
    assert right() is not output
    layers[0].lora_B.data = random(4, 3)
    right()
    layers[1].scale = 2.0
    right()
    layers[1].scale = 0.0
    output = right()
    project(x, layers)  # with gradients: another group, and the kept one is let go
    assert right() is not output
    layers[0].train()
    with torch.no_grad():
        assert prepare_group(layers, x.dtype) is not prepare_group(layers, x.dtype)


@pytest.mark.parametrize("rows", [1, 7, 70])
def test_prepared_products_in_bf16_follow_too(rows: int) -> None:
    """With lora.c if available, for few rows too."""
    layers = [adapted(linear(64, 48, seed=seed, dtype=torch.bfloat16)).eval() for seed in range(2)]
    x = random(rows, 64).bfloat16()

    def right() -> None:
        with torch.no_grad():
            for y, layer in zip(project(x, layers), layers, strict=True):
                wide = F.linear(x.float(), layer.frozen.weight.float(), layer.bias.float())
                wide += layer.scale * F.linear(F.linear(x.float(), layer.lora_A), layer.lora_B)
                torch.testing.assert_close(y.float(), wide, rtol=0.02, atol=0.05)

    right()
    with torch.no_grad():
        layers[0].lora_A.mul_(-3)
        layers[1].lora_B.add_(1)
    right()
    layers[1].scale = -1.0
    right()


# ---------------------------------------------------------------- precision and scale


def test_scale_0_is_the_base_bitwise() -> None:
    layer, x = adapted(linear(5, 4, dtype=torch.bfloat16)), random(3, 5).bfloat16()
    assert not torch.equal(layer(x), F.linear(x, layer.frozen.weight, layer.bias))
    layer.scale = 0.0
    assert torch.equal(layer(x), F.linear(x, layer.frozen.weight, layer.bias))


def test_masters_of_an_adapter_are_fp32() -> None:
    layer, x = (
        adapted(linear(64, 48, dtype=torch.bfloat16)),
        random(30, 64).bfloat16().requires_grad_(),
    )
    y = layer(x)
    assert y.dtype == layer.frozen.weight.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    grads = gradients(y, [x, layer.lora_A, layer.lora_B])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    wide = adapted(linear(64, 48, dtype=torch.bfloat16).double())
    x_wide = x.detach().double().requires_grad_()
    exact = gradients(wide(x_wide), [x_wide, wide.lora_A, wide.lora_B])
    for actual, other in zip(grads, exact, strict=True):
        assert float((actual.double() - other).norm() / other.norm()) < 1e-2


def test_a_narrow_copy_follows_its_master() -> None:
    """The cast weight is computed once, and again after every change that training makes."""
    layer = Fp32MasterLinear(linear(5, 4, dtype=torch.float32).requires_grad_(True))
    x = random(3, 5).bfloat16()

    def fresh() -> bool:
        return torch.equal(
            layer(x), F.linear(x, layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16())
        )

    assert fresh()
    assert (
        PreparedLinear(layer, torch.bfloat16).frozen.weight
        is PreparedLinear(layer, torch.bfloat16).frozen.weight
    )
    layer(x).float().sum().backward()
    step_optimizer(make_optimizer(layer.parameters(), weight_decay=0.0), 0.5)
    assert fresh()
    with torch.no_grad():
        layer.weight.copy_(torch.ones(4, 5))
    assert fresh()
    assert layer.weight.dtype == torch.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_an_adapter_starts_as_nothing_and_by_its_seed() -> None:
    layers = [
        LoraLinear(
            linear(16, 4),
            rank=2,
            scale=1.0,
            dropout=0.0,
            generator=torch.Generator().manual_seed(s),
        )
        for s in (1, 1, 2)
    ]
    assert torch.equal(layers[0].lora_A, layers[1].lora_A)
    assert not torch.equal(layers[0].lora_A, layers[2].lora_A)
    assert 0 < float(layers[0].lora_A.detach().abs().max()) <= 16**-0.5
    assert not layers[0].lora_B.any()


def test_only_adapters_get_gradients() -> None:
    model = make_tiny_model("llama")
    compute_step_gradients(model, make_tiny_documents(), 100)
    assert all("lora_" in name for name in get_trainable_parameters(model.network))
    assert len(find_lora_layers(model.network)) == 14
    assert collate_documents(make_tiny_documents()).tokens_T.dtype == torch.int64


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_stock_module_may_change_outputs_in_place(settings: dict[str, bool]) -> None:
    """OLMo clamps queries, keys and values (clip_qkv)."""
    documents = make_tiny_documents()
    model = make_tiny_model("olmo", torch.float64, **settings)
    loss, gradients = compute_step_gradients(model, documents, 10**6)
    separate_loss, separate = compute_step_gradients(model, documents, 1)
    assert abs(loss - separate_loss) < 1e-6
    assert compute_max_difference(gradients, separate) < 5e-6
