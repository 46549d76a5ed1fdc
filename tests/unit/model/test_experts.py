"""Experts: ours = transformers', adapters = PEFT's `target_parameters`, 4-bit experts are in 4
bits."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from quick_families import leave_others_to_slow
from tiny_models import (
    CONFIGS,
    EXPERT_FAMILIES,
    LORA,
    collate_documents,
    compute_max_difference,
    compute_mean_loss,
    compute_step_gradients,
    make_tiny_document,
    make_tiny_documents,
    make_tiny_model,
    make_tiny_network,
)
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import (
    METHODS,
    add_lora,
    find_expert_modules,
    get_trainable_parameters,
    scaled_adapter,
)
from tunesmith.model.causal_lm import wrap_model
from tunesmith.model.expert_weights import (
    DenseExpertWeight,
    ExpertGroups,
    NF4ExpertWeight,
    StackedMatrices,
    can_group,
    choose_window,
    multiply_groups,
    multiply_groups_backward,
)
from tunesmith.model.experts import (
    Experts,
    find_expert_loras,
    find_experts,
    list_stacks,
    split_experts,
)
from tunesmith.model.save import collect_adapter_tensors, load_adapter, save_adapter

# PEFT 0.21 asks transformers 5.24 by an old name
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
NUM_TOKENS = 23
SHARED_FAMILIES = (
    *("glm4_moe", "qwen2_moe", "qwen3_5_moe", "nemotron_h-experts", "hunyuan_v1_moe"),
    *("ernie4_5_moe", "granitemoeshared"),
)
EXPERTS = {"lora_target_modules": ["attention", "experts"]}


def make_stock_experts(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the last experts of a tiny network with random weights."""
    network = make_tiny_network(family, dtype)
    return list(find_expert_modules(network).values())[-1]


def make_inputs(num_experts: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return hidden states, choices and probabilities; the last expert is chosen by no token."""
    generator = torch.Generator().manual_seed(5)
    x_TH = torch.randn(NUM_TOKENS, 48, generator=generator, dtype=dtype).requires_grad_()
    scores = torch.rand(NUM_TOKENS, num_experts - 1, generator=generator)
    probabilities = torch.rand(NUM_TOKENS, 2, generator=generator).to(dtype).requires_grad_()
    return x_TH, scores.topk(2).indices, probabilities


def run_backward(module: nn.Module, x: Tensor, choices: Tensor, p: Tensor) -> list[Tensor]:
    out = module(x, choices, p)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), [x, p])]


# ---------------------------------------------------------------- ours = transformers'


@pytest.mark.parametrize("family", leave_others_to_slow(EXPERT_FAMILIES))
@pytest.mark.parametrize("should_recompute", [False, True])
def test_outputs_and_gradients_equal_the_stock_experts(family: str, should_recompute: bool) -> None:
    stock: Any = make_stock_experts(family)
    inputs = make_inputs(stock.num_experts)
    ours = Experts(stock)
    ours.should_recompute = should_recompute
    for actual, expected in zip(
        run_backward(ours, *inputs), run_backward(stock, *inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_no_token_chooses_any_expert_of_an_empty_pack() -> None:
    ours = Experts(make_stock_experts("qwen3_moe"))
    x_TH, choices, p = make_inputs(8)
    assert ours(x_TH[:0], choices[:0], p[:0]).shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_grouped_product_of_torch_equals_the_loop(dtype: torch.dtype) -> None:
    """It runs on CUDA only; what it computes is the same on a CPU."""
    generator = torch.Generator().manual_seed(0)
    choices = torch.rand(NUM_TOKENS, 7, generator=generator).topk(2).indices
    groups = ExpertGroups.from_choices(choices, 8)
    x_RI = torch.randn(2 * NUM_TOKENS, 48, generator=generator).to(dtype)
    matrices = StackedMatrices(torch.randn(8, 24, 48, generator=generator).to(dtype))
    forward = F.grouped_mm(x_RI, matrices.stacked.transpose(1, 2), offs=groups.ends_E)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    y_RO = multiply_groups(x_RI, matrices, groups)
    torch.testing.assert_close(y_RO, forward, rtol=tolerance, atol=tolerance)
    backward = F.grouped_mm(y_RO, matrices.stacked, offs=groups.ends_E)
    dx_RI = multiply_groups_backward(y_RO, matrices, groups)
    torch.testing.assert_close(dx_RI, backward, rtol=tolerance, atol=10 * tolerance)


def test_before_torch_2_10_there_is_no_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    stacked = torch.zeros(8, 24, 48, dtype=torch.bfloat16)
    assert can_group(rows_on_gpu, stacked)
    assert not can_group(rows_on_gpu, stacked[:, :4])
    monkeypatch.delattr(F, "grouped_mm")
    assert not can_group(rows_on_gpu, stacked)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 63, 130, 200])
def test_products_of_bf16_have_few_numbers_of_rows(count: int) -> None:
    """Each number is compiled. The rows of neighbors that fill it up are computed for nothing."""
    x_RI = torch.zeros(200, 8, dtype=torch.bfloat16)
    for begin in {0, (200 - count) // 2, 200 - count}:
        window, rows = choose_window(x_RI, begin, begin + count)
        indices = torch.arange(200)[window][rows]
        assert indices.tolist() == list(range(begin, begin + count))
        size = window.stop - window.start
        assert size == 200 or size % 16 == 0
        assert size < 1.15 * count + 16
    assert choose_window(x_RI.float(), 3, 20) == (slice(3, 20), slice(0, 17))


def test_experts_in_bf16_equal_those_in_fp64() -> None:
    stock: Any = make_stock_experts("qwen3_moe")
    exact = Experts(stock)
    exact.add_lora(rank=4, scale=1.5, generator=torch.Generator().manual_seed(2))
    for lora in (exact.input_lora, exact.output_lora):
        assert lora is not None
        lora.lora_B.data += 0.1
    rounded = copy.deepcopy(exact)
    for parameter in (rounded.gate_up_proj, rounded.down_proj):
        parameter.data = parameter.data.bfloat16()
    x, choices, p = make_inputs(stock.num_experts)
    expected = run_backward(exact, x, choices, p)
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, p)]
    actual = run_backward(rounded, narrow[0], choices, narrow[1])
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_experts_save_what_the_plan_counts() -> None:
    """One x per token and U x per row; x alone with recomputation."""
    stock: Any = make_stock_experts("qwen3_moe", torch.float32)
    inputs = make_inputs(stock.num_experts, torch.float32)
    ours = Experts(stock)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for should_recompute, expected in ((False, 48 + 2 * 48 + 2), (True, 48 + 2)):
        saved.clear()
        ours.should_recompute = should_recompute
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours(*inputs)
        assert sum(tensor.numel() for tensor in saved) == NUM_TOKENS * expected


def test_routers_are_frozen_and_add_no_noise_and_no_loss() -> None:
    model = make_tiny_model("mixtral")
    model.network.train()
    batch = collate_documents(make_tiny_documents())
    losses = [compute_mean_loss(model, batch, 1.0).item() for _ in range(2)]
    assert losses[0] == losses[1]
    assert not model.network.config.output_router_logits
    names = get_trainable_parameters(model.network)
    assert names
    assert not [name for name in names if ".gate" in name or "router" in name]


@pytest.mark.parametrize("family", leave_others_to_slow(EXPERT_FAMILIES))
def test_all_linear_leaves_routers_and_experts_alone(family: str) -> None:
    network = make_tiny_network(family)
    add_lora(network, LORA)
    for name in get_trainable_parameters(network):
        path = name.rpartition(".")[0]
        assert not path.endswith((".gate", ".router", ".proj", ".shared_expert_gate", ".experts"))
    assert not find_expert_loras(network)


# ---------------------------------------------------------------- adapters


def merge_by_hand(stock: Any, ours: Experts) -> nn.Module:
    """Return the stock module with W + scale B A, differentiable in ours' A and B."""
    adapted = copy.deepcopy(stock)
    for name, lora in zip(list_stacks(stock), (ours.input_lora, ours.output_lora), strict=True):
        assert lora is not None
        a_ERI, b_EOR = split_experts(lora.lora_A, lora.lora_B, ours.num_experts)
        delta = lora.scale * b_EOR @ a_ERI
        weight = getattr(stock, name).detach()
        delattr(adapted, name)
        setattr(adapted, name, weight + (delta.mT if stock.is_transposed else delta))
    return adapted


@pytest.mark.parametrize("family", leave_others_to_slow(EXPERT_FAMILIES))
def test_adapters_equal_changed_weights(family: str) -> None:
    stock: Any = make_stock_experts(family)
    inputs = make_inputs(stock.num_experts)
    ours = Experts(stock)
    generator = torch.Generator().manual_seed(2)
    ours.add_lora(rank=4, scale=1.5, generator=generator)
    parameters = [p for p in ours.parameters() if p.requires_grad and p.ndim == 2]
    parameters = [*ours.input_lora.parameters(), *ours.output_lora.parameters()]  # type: ignore[union-attr]
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    results: list[tuple[Tensor, ...]] = []
    for module in (ours, merge_by_hand(stock, ours)):
        out = module(*inputs)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out)
        x, _, p = inputs
        results.append((out, *torch.autograd.grad((out * direction).sum(), [x, p, *parameters])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert (parameters[0].grad is None) == (parameters[1].grad is None)


def test_gradients_equal_those_of_peft() -> None:
    settings = LORA | {"lora_target_modules": ["experts"]}
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=targets)
    theirs: Any = get_peft_model(make_tiny_network("qwen3_moe"), config)
    network = make_tiny_network("qwen3_moe")
    add_lora(network, settings)
    loras = find_expert_loras(network)
    generator = torch.Generator().manual_seed(4)
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for path, lora in loras.items():
        for name, parameter in lora.named_parameters():
            other = theirs.get_parameter(f"base_model.model.{path}.{name}.default.weight")
            values = 0.1 * torch.randn(other.shape, generator=generator)
            parameter.data, other.data = values, values.clone()
            pairs.append((parameter, other))
    assert len(pairs) == 8
    document = make_tiny_document(31)
    batch = collate_documents([document])
    loss = compute_mean_loss(wrap_model(network, torch.float32), batch, 1.0)
    loss.backward()
    tokens_L = torch.from_numpy(document.tokens_L).long()
    logits = theirs(input_ids=tokens_L[None, :-1], use_cache=False).logits[0]
    their_losses = F.cross_entropy(logits, tokens_L[1:], reduction="none")
    their_loss = (their_losses * torch.from_numpy(document.weights_L)[1:]).sum()
    their_loss.backward()
    assert abs(loss - their_loss) < 1e-5 * their_loss
    for ours, other in pairs:
        assert ours.grad is not None
        assert other.grad is not None
        assert (ours.grad - other.grad).norm() < 1e-6 * other.grad.norm()


@torch.no_grad()
def compute_logits(network: nn.Module) -> Tensor:
    tokens = torch.from_numpy(make_tiny_document(31).tokens_L[:31]).long()[None]
    return network(input_ids=tokens, use_cache=False).logits[0].float()


@torch.no_grad()
def compute_our_logits(model: Any) -> Tensor:
    batch = collate_documents([make_tiny_document(31)])
    hidden = model._run_decoder(batch.tokens_T, batch.positions_T, batch.layout)
    return model.head.compute_logits(hidden).float()


@pytest.mark.parametrize(
    "case",
    leave_others_to_slow(
        [
            *((family, ["attention", "experts"]) for family in EXPERT_FAMILIES),
            # PEFT takes the names of shared experts for the experts
            *((family, ["mlp"]) for family in SHARED_FAMILIES),
            ("deepseek_v3", "all-linear"),
            ("mixtral", ["experts"]),
        ]
    ),
)
def test_adapters_load_in_peft_and_back(case: tuple[str, Any], tmp_path: Path) -> None:
    family, targets = case
    settings = {"lora_target_modules": targets}
    model = make_tiny_model(family, **settings)
    expected = compute_our_logits(model)
    save_adapter(model.network, tmp_path, LORA | settings, Path("base-model"))
    theirs = PeftModel.from_pretrained(make_tiny_network(family), tmp_path)
    torch.testing.assert_close(compute_logits(theirs), expected, rtol=1e-5, atol=1e-5)
    base = compute_logits(make_tiny_network(family))
    assert (expected - base).abs().max() > 1e-2, "the adapter has an effect"
    num_loaded = sum("lora_" in name for name, _ in theirs.named_parameters())
    assert num_loaded == len(collect_adapter_tensors(model.network))

    network = make_tiny_network(family)
    add_lora(network, LORA | settings)
    load_adapter(network, tmp_path / "adapter_model.safetensors")
    assert torch.equal(compute_our_logits(wrap_model(network, torch.float32)), expected)


def test_scale_zero_is_the_base_model() -> None:
    model = make_tiny_model("qwen3_moe", **EXPERTS)
    expected = compute_our_logits(wrap_model(make_tiny_network("qwen3_moe"), torch.float32))
    assert not torch.allclose(compute_our_logits(model), expected)
    with scaled_adapter(model.network, 0.0):
        assert torch.equal(compute_our_logits(model), expected)


# ---------------------------------------------------------------- 4 bits


def quantize(stock: Any, dtype: torch.dtype) -> Experts:
    inputs, outputs = (getattr(stock, name).detach() for name in list_stacks(stock))
    num_parts = 2 if stock.has_gate else 1
    weights = (
        NF4ExpertWeight(inputs, dtype, num_parts=num_parts),
        NF4ExpertWeight(outputs, dtype, num_parts=1),
    )
    return Experts(stock, weights=weights)


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h-experts"])
def test_four_bit_experts_equal_their_dequantized_weights(family: str) -> None:
    stock: Any = make_stock_experts(family, torch.float32)
    ours = quantize(stock, torch.float32)
    wide = copy.deepcopy(stock)
    for name, weight in zip(list_stacks(stock), (ours.inputs, ours.outputs), strict=True):
        matrices = [weight.get_matrix(expert) for expert in range(stock.num_experts)]
        getattr(wide, name).data = torch.stack(matrices)
        error = (getattr(wide, name) - getattr(stock, name)).norm() / getattr(stock, name).norm()
        assert 0.01 < error < 0.15, "4 bits lose about a tenth"
    inputs = make_inputs(stock.num_experts, torch.float32)
    for actual, expected in zip(
        run_backward(ours, *inputs), run_backward(wide, *inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_four_bit_experts_are_in_four_bits() -> None:
    """Nothing of the module holds the wide weights: peers skip fused experts silently."""
    stock = nn.Module()
    stock.gate_up_proj = nn.Parameter(torch.randn(4, 256, 512))
    stock.down_proj = nn.Parameter(torch.randn(4, 512, 128))
    stock.has_gate, stock.is_concatenated, stock.act_fn = True, True, F.silu
    stock.has_post_expert_norm, stock.is_transposed = False, False
    ours = quantize(stock, torch.bfloat16)
    assert not list(ours.parameters())
    parts = ours.list_quantized()
    assert len(parts) == 4 * 3
    num_weights = stock.gate_up_proj.numel() + stock.down_proj.numel()
    assert sum(part.num_parameters for part in parts.values()) == num_weights
    num_bytes = sum(part.nbytes for part in parts.values())
    assert num_bytes < 0.55 * num_weights
    assert all(part._values.dtype == torch.uint8 for part in parts.values())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", leave_others_to_slow(EXPERT_FAMILIES))
def test_full_training_is_refused(family: str) -> None:
    with pytest.raises(InputError, match="full does not train the experts") as caught:
        METHODS["full"](make_tiny_network(family), {})
    assert "method: lora" in (caught.value.fix or "")


@pytest.mark.parametrize(("key", "value"), [("lora_dropout", 0.1), ("use_dora", True)])
@pytest.mark.parametrize("targets", [["experts"], ["mlp"]])
def test_dropout_and_dora_are_refused_where_peft_has_none(
    key: str, value: object, targets: list[str]
) -> None:
    settings = LORA | {"lora_target_modules": targets, key: value}
    with pytest.raises(InputError, match=r"but an adapter of .* has none"):
        add_lora(make_tiny_network("glm4_moe"), settings)
    add_lora(make_tiny_network("glm4_moe"), settings | {"lora_target_modules": "attention"})


# ---------------------------------------------------------------- whole models


def test_dense_experts_stay_parameters_of_the_stock_names() -> None:
    network = make_tiny_network("qwen3_moe")
    names = set(dict(network.named_parameters()))
    model = wrap_model(network, torch.float32)
    assert set(dict(model.network.named_parameters())) == names
    for experts in find_experts(model.network).values():
        assert isinstance(experts.inputs, DenseExpertWeight)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_gradient(mode: str) -> None:
    documents = make_tiny_documents()
    results = []
    for gradient_checkpointing in ("none", mode):
        model = make_tiny_model(
            "qwen3_moe", gradient_checkpointing=gradient_checkpointing, **EXPERTS
        )
        model.network.train()
        results.append(compute_step_gradients(model, documents, 10**6)[1])
    assert compute_max_difference(results[1], results[0]) < 1e-6


def test_every_family_has_a_config() -> None:
    assert set(EXPERT_FAMILIES) <= set(CONFIGS)
