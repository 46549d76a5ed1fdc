"""Frozen experts of a mixture as one node of the autograd graph, with adapters if asked for.

    Experts(stock)                  stands in for transformers' module of all experts of a layer
    experts.add_lora(...)           trainable A_e and B_e for each expert e

y_t = sum over the chosen experts e of p_te D_e act(U_e x_t), where U_e stacks gate and up if the
experts are gated, and W_e is W_e + scale B_e A_e with an adapter. That is what PEFT computes for
`target_parameters`, without its [E, O, I] of B A. The router stays transformers' own and frozen;
the gradient of its p_te flows on into x. The forward saves x once per token, U x of each row, and
A x; the backward recomputes act.

Left out: where the matrices come from and how they are stored (expert_weights.py), reading and
writing adapter files (save.py; hub/expert_names.py has PEFT's names). No gradient of the experts
themselves: `full` is refused (adapters.py).
Legend: T tokens, K experts per token, R = T K rows sorted by expert, E experts, H hidden, F width
of an expert, G = 2 F if gated, else F; r rank."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.expert_weights import (
    DenseExpertWeight,
    ExpertGroups,
    FrozenExperts,
    NF4ExpertWeight,
    StackedMatrices,
    multiply_groups,
    multiply_groups_backward,
    sum_outer_products,
)
from tunesmith.model.frozen_weight import NF4Weight
from tunesmith.model.hub.expert_names import INNER, OUTPUT_STACK, is_expert_path
from tunesmith.model.packed_formats import Mxfp4ExpertWeight

DEFAULT_GATE = "transformers.integrations.moe"  # the module of act(gate) * up
OUTPUT_WORDS = {"down_proj", "w2"}
SECOND_WORDS = {"up_proj", "w3"}  # of what lies below the gate in the stack


class ExpertLora(nn.Module):
    """Trainable A_e [r, I] and B_e [O, r] of one stack of matrices. `scale` 0 gives the base model.

    The parameters have the shapes of PEFT's files: A [E r, I] expert by expert, B [O, r E] with the
    expert as the fastest index. Initialized as PEFT does: A ~ U(-1/sqrt(I), 1/sqrt(I)), B = 0."""

    def __init__(
        self,
        frozen: FrozenExperts,
        *,
        rank: int,
        scale: float,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.num_experts, num_outputs, num_inputs = frozen.shape
        self.rank = rank
        self.scale = scale
        shape = (self.num_experts * rank, num_inputs)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1
        self.lora_A = nn.Parameter((uniform / math.sqrt(num_inputs)).to(device, dtype))
        zeros = torch.zeros(num_outputs, rank * self.num_experts, device=device, dtype=dtype)
        self.lora_B = nn.Parameter(zeros)
        self._cast_cache: tuple[tuple[object, ...], StackedMatrices, StackedMatrices] | None = None

    def cast(self, dtype: torch.dtype) -> tuple[StackedMatrices, StackedMatrices]:
        """Return A [E, r, I] and B [E, O, r] in `dtype`, laid out for products.

        While nothing trains they are cached by their versions, as in `prepare_group`: generation
        casts them once, not at every token."""
        key = (dtype, self.lora_A._version, self.lora_B._version)
        if self._cast_cache is not None and self._cast_cache[0] == key:
            return self._cast_cache[1:]
        a_ERI, b_EOR = split_experts(self.lora_A.detach(), self.lora_B.detach(), self.num_experts)
        a = StackedMatrices(a_ERI.to(dtype))
        b = StackedMatrices(b_EOR.to(dtype).contiguous())
        is_training = torch.is_grad_enabled() or self.training
        self._cast_cache = None if is_training else (key, a, b)
        return a, b

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, rank={self.rank}, scale={self.scale}"


def split_experts(lora_A: Tensor, lora_B: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return views A [E, r, I] and B [E, O, r] of PEFT's A [E r, I] and B [O, r E]."""
    a_ERI = lora_A.view(num_experts, -1, lora_A.shape[1])
    b_EOR = lora_B.view(len(lora_B), -1, num_experts).permute(2, 0, 1)
    return a_ERI, b_EOR


class PreparedExperts:
    """One stack of matrices with its adapter, prepared for products in one dtype."""

    def __init__(
        self, frozen: FrozenExperts, bias_EO: Tensor | None, lora: ExpertLora | None, x: Tensor
    ) -> None:
        self.frozen = frozen
        self.bias_EO = None if bias_EO is None else bias_EO.detach().to(x.dtype)
        self.scale = 0.0
        self.parameters: tuple[Tensor, ...] = ()
        if lora is not None and lora.scale != 0:
            self.scale = lora.scale
            # on a CPU oneDNN would compile each of the many small products of bf16
            dtype = x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
            self.a, self.b = lora.cast(dtype)
            self.parameters = (lora.lora_A, lora.lora_B)

    def forward(self, x_RI: Tensor, groups: ExpertGroups) -> tuple[Tensor, Tensor | None]:
        """Return the outputs [R, O], and z = A x [R, r] with an adapter."""
        y_RO = multiply_groups(x_RI, self.frozen, groups)
        if self.bias_EO is not None:
            y_RO += self.bias_EO[groups.experts_R]
        if not self.scale:
            return y_RO, None
        z = multiply_groups(x_RI, self.a, groups)
        return y_RO.add_(multiply_groups(z, self.b, groups), alpha=self.scale), z

    def backward(self, dy_RO: Tensor, groups: ExpertGroups) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the inputs and of z."""
        dx_RI = multiply_groups_backward(dy_RO, self.frozen, groups)
        if not self.scale:
            return dx_RI, None
        dz = multiply_groups_backward(dy_RO, self.b, groups).mul_(self.scale)
        return dx_RI.add_(multiply_groups_backward(dz, self.a, groups)), dz

    def compute_parameter_grads(
        self,
        x_RI: Tensor,
        dy_RO: Tensor,
        z: Tensor | None,
        dz: Tensor | None,
        groups: ExpertGroups,
    ) -> tuple[Tensor, ...]:
        """Return the gradients of A and B, none without an adapter."""
        if z is None or dz is None:
            return ()
        parameter_a, parameter_b = self.parameters
        grad_a = sum_outer_products(dz, x_RI, groups).to(parameter_a.dtype)
        grad_b = sum_outer_products(dy_RO, z, groups).to(parameter_b.dtype).mul_(self.scale)
        return grad_a.view_as(parameter_a), grad_b.permute(1, 2, 0).reshape(parameter_b.shape)


class _RunExperts(torch.autograd.Function):
    """The experts of a layer. Saves x and, unless `experts.should_recompute`, U x of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        probabilities_TK: Tensor,
        experts: Experts,
        groups: ExpertGroups,
        inputs: PreparedExperts,
        outputs: PreparedExperts,
        *_parameters: Tensor,
    ) -> Tensor:
        hidden_RG, z_in = inputs.forward(x_TH[groups.tokens_R], groups)
        y_RH, z_out = outputs.forward(experts.apply_activation(hidden_RG), groups)
        p_R1 = probabilities_TK.flatten()[groups.order_R, None]
        ctx.prepared = (experts, groups, inputs, outputs)
        should_save = not experts.should_recompute
        ctx.save_for_backward(
            x_TH,
            probabilities_TK,
            hidden_RG if should_save else None,
            z_in if should_save else None,
            z_out,
        )
        return groups.sum_by_token(y_RH * p_R1).to(x_TH.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        experts, groups, inputs, outputs = ctx.prepared
        x_TH, probabilities_TK, hidden_RG, z_in, z_out = ctx.saved_tensors
        x_RH = x_TH[groups.tokens_R]
        if hidden_RG is None:
            hidden_RG, z_in = inputs.forward(x_RH, groups)
        p_R1 = probabilities_TK.flatten()[groups.order_R, None].to(x_TH.dtype)
        dy_RH = gradients[0].to(x_TH.dtype)[groups.tokens_R]
        with torch.enable_grad():
            hidden_RG = hidden_RG.detach().requires_grad_()
            product_RF = experts.apply_activation(hidden_RG)
        # of the outputs before they are weighted: dp is <dy, D act> = <D' dy, act>, and D act is
        # neither saved nor computed again
        dproduct_RF, dz_out = outputs.backward(dy_RH, groups)
        accumulated = torch.promote_types(x_TH.dtype, torch.float32)
        dp_R = (dproduct_RF.to(accumulated) * product_RF.detach()).sum(1)
        if outputs.bias_EO is not None:
            dp_R += (dy_RH.to(accumulated) * outputs.bias_EO[groups.experts_R]).sum(1)
        dz_out = None if dz_out is None else dz_out * p_R1
        output_grads = outputs.compute_parameter_grads(
            product_RF.detach(), dy_RH * p_R1, z_out, dz_out, groups
        )
        (dhidden_RG,) = torch.autograd.grad(product_RF, hidden_RG, dproduct_RF * p_R1)
        dx_RH, dz_in = inputs.backward(dhidden_RG, groups)
        input_grads = inputs.compute_parameter_grads(x_RH, dhidden_RG, z_in, dz_in, groups)
        dx_TH = groups.sum_by_token(dx_RH).to(x_TH.dtype)
        dp_TK = groups.restore_order(dp_R).to(probabilities_TK.dtype)
        return (dx_TH, dp_TK, None, None, None, None, *input_grads, *output_grads)


class Experts(nn.Module):
    """All experts of a layer: gated as in most families, without a gate (Nemotron-H), or with the
    clamped gate and the biases of gpt-oss.

    Parameters keep the names of the stock module, so a dense stack is loaded and saved as there;
    a quantized one is no parameter."""

    def __init__(
        self, stock: Any, *, weights: tuple[FrozenExperts, FrozenExperts] | None = None
    ) -> None:
        """Take the stock module's matrices, or `weights` in their place: of the inputs, and of the
        outputs."""
        super().__init__()
        assert not stock.has_post_expert_norm, "no listed family has one"
        self.has_gate: bool = stock.has_gate
        self.is_transposed: bool = stock.is_transposed
        is_interleaved = not stock.is_concatenated
        self.input_name, self.output_name = list_stacks(stock)
        self.act_fn = None if is_interleaved else getattr(stock, "act_fn", None)
        self.other_gate = None if is_interleaved else _find_other_gate(stock)
        self.clamp = (float(stock.alpha), float(stock.limit)) if is_interleaved else None
        for name in (self.input_name, self.output_name):
            setattr(self, f"{name}_bias", getattr(stock, f"{name}_bias", None))
        if weights is None:
            weights = self._take_parameters(stock)
        self.inputs, self.outputs = weights
        self.num_experts = self.inputs.shape[0]
        self.input_lora: ExpertLora | None = None
        self.output_lora: ExpertLora | None = None
        self.should_recompute = False

    def _take_parameters(self, stock: Any) -> tuple[FrozenExperts, FrozenExperts]:
        weights: list[FrozenExperts] = []
        for name in (self.input_name, self.output_name):
            parameter = getattr(stock, name)
            if isinstance(parameter, Mxfp4ExpertWeight):  # packed by the file
                weights.append(parameter)
                continue
            setattr(self, name, parameter)
            weights.append(DenseExpertWeight(parameter, is_transposed=self.is_transposed))
        return weights[0], weights[1]

    def add_lora(self, *, rank: int, scale: float, generator: torch.Generator) -> None:
        """Add an adapter to both stacks. It changes nothing, because B is 0."""
        device, dtype = self.get_placement()
        loras: list[ExpertLora] = []
        for frozen in (self.inputs, self.outputs):
            lora = ExpertLora(
                frozen, rank=rank, scale=scale, generator=generator, device=device, dtype=dtype
            )
            loras.append(lora)
        self.input_lora, self.output_lora = loras

    def get_placement(self) -> tuple[torch.device, torch.dtype]:
        """Return the device of the matrices, and the dtype of trained parameters beside them."""
        matrix = self.inputs.get_matrix(0)
        return matrix.device, torch.promote_types(matrix.dtype, torch.float32)

    def list_quantized(self) -> dict[str, NF4Weight]:
        """Return name -> 4-bit matrix, empty if the matrices are not in 4 bits."""
        named: dict[str, NF4Weight] = {}
        for name, weight in ((self.input_name, self.inputs), (self.output_name, self.outputs)):
            if isinstance(weight, NF4ExpertWeight):
                parts = itertools.chain.from_iterable(weight.parts)
                named |= {f"{name}.{index}": part for index, part in enumerate(parts)}
        return named

    def apply_activation(self, hidden_RG: Tensor) -> Tensor:
        """Return act(gate) * up, or act(up) without a gate [R, F]."""
        if self.clamp is not None:
            alpha, limit = self.clamp
            gate = hidden_RG[:, ::2].clamp(max=limit)
            up = hidden_RG[:, 1::2].clamp(-limit, limit)
            return (up + 1) * gate * torch.sigmoid(alpha * gate)
        if self.other_gate is not None:
            return self.other_gate(hidden_RG)
        assert self.act_fn is not None
        if not self.has_gate:
            return self.act_fn(hidden_RG)
        gate, up = hidden_RG.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, choices: Tensor, probabilities: Tensor) -> Tensor:
        """Return [T, H] of hidden states [T, H] and a router's choices and probabilities [T, K]."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        groups = ExpertGroups.from_choices(choices, self.num_experts)
        input_bias: Tensor | None = getattr(self, f"{self.input_name}_bias")
        output_bias: Tensor | None = getattr(self, f"{self.output_name}_bias")
        inputs = PreparedExperts(self.inputs, input_bias, self.input_lora, x_TH)
        outputs = PreparedExperts(self.outputs, output_bias, self.output_lora, x_TH)
        parameters = (*inputs.parameters, *outputs.parameters)
        y_TH = _RunExperts.apply(x_TH, probabilities, self, groups, inputs, outputs, *parameters)
        return y_TH.view_as(hidden_states)


def list_stacks(stock: Any) -> tuple[str, str]:
    """Return the names of the two stacks of a stock module: of the inputs and of the outputs."""
    return "gate_up_proj" if stock.has_gate else "up_proj", "down_proj"


def find_experts(network: nn.Module) -> dict[str, Experts]:
    """Return path -> our module of experts."""
    return {path: m for path, m in network.named_modules() if isinstance(m, Experts)}


def is_stock_experts(module: Any) -> bool:
    """Return whether a module is a stack of experts that `Experts` stands in for."""
    if not hasattr(module, "is_concatenated") or module.has_post_expert_norm:
        return False
    is_plain = module.is_concatenated and not (module.has_bias or module.is_transposed)
    return is_plain or type(module).__name__ == "GptOssExperts"


def _find_other_gate(stock: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the gate of experts that have another one than most, without their weights."""
    gate = getattr(type(stock), "_apply_gate", None)
    if gate is None or gate.__module__ == DEFAULT_GATE or not stock.has_gate:
        return None
    values = {name: value for name, value in vars(stock).items() if not name.startswith("_")}
    values["act_fn"] = getattr(stock, "act_fn", None)
    return MethodType(gate, SimpleNamespace(**values))


def freeze_routing(network: Any) -> None:
    """Switch off what training would add to the routing: noise on the router's inputs, which is
    drawn per pack, and the collection of its logits for a balancing loss.

    That loss is no sum over tokens: it would depend on what else is in the pack. The router is
    frozen."""
    network.config.get_text_config().output_router_logits = False
    for module in network.modules():
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.0


def find_expert_loras(network: nn.Module) -> dict[str, ExpertLora]:
    """Return PEFT's path of each adapted stack of experts -> its adapter."""
    loras: dict[str, ExpertLora] = {}
    for path, experts in find_experts(network).items():
        if experts.input_lora is not None and experts.output_lora is not None:
            loras[f"{path}.{INNER}"] = experts.input_lora
            loras[path] = experts.output_lora
    return loras


def list_target_parameters(network: nn.Module) -> list[str]:
    """Return the names of the adapted stacks, as PEFT's `target_parameters` takes them."""
    names: list[str] = []
    for path, experts in find_experts(network).items():
        if experts.input_lora is not None:
            names += [f"{path}.{experts.input_name}", f"{path}.{OUTPUT_STACK}"]
    return names


@dataclass(frozen=True, eq=False)
class ExpertLoraTensors:
    """The adapter of a stack of experts in fp32: W_e + scale * B_e A_e."""

    a_ERI: Tensor
    b_EOR: Tensor
    scale: float

    @classmethod
    def from_peft(
        cls, lora_A: Tensor, lora_B: Tensor, *, num_experts: int, scale: float
    ) -> ExpertLoraTensors:
        """Take the tensors of PEFT's file."""
        a_ERI, b_EOR = split_experts(lora_A.float(), lora_B.float(), num_experts)
        return cls(a_ERI, b_EOR, scale)

    def scale_by(self, factor: float) -> ExpertLoraTensors:
        """Return the adapter times `factor`."""
        return replace(self, scale=self.scale * factor)

    def merge_into(self, weight: Tensor) -> Tensor:
        """Return the adapted stack from an fp32 stack [E, O, I] on any device; a matrix [O, I] if
        this is the adapter of one expert."""
        delta_EOI = self.scale * torch.bmm(self.b_EOR, self.a_ERI).to(weight.device)
        return weight + (delta_EOI[0] if weight.ndim == 2 else delta_EOI)

    def merge_into_stored(self, weight: Tensor, *, is_transposed: bool) -> Tensor:
        """Return the same from the stack as a module or a file has it: [E, I, O] if
        `is_transposed`. The shape does not say it, for some matrices are square."""
        if not is_transposed:
            return self.merge_into(weight)
        return self.merge_into(weight.transpose(1, 2)).transpose(1, 2).contiguous()

    def get_expert(self, expert: int, rows: slice) -> ExpertLoraTensors:
        """Return the adapter of some rows of one expert's matrix."""
        stack = slice(expert, expert + 1)
        return replace(self, a_ERI=self.a_ERI[stack], b_EOR=self.b_EOR[stack, rows])


def has_transposed_stacks(network: nn.Module, path: str) -> bool:
    """Return whether the module at PEFT's path of a stack has its stacks as [E, I, O]."""
    module: Any = network.get_submodule(path.removesuffix(f".{INNER}"))
    return module.is_transposed


def find_expert_delta(
    name: str, num_rows: int, deltas: Mapping[str, Any]
) -> ExpertLoraTensors | None:
    """Return the change of a tensor of experts (`is_expert_matrix`): of a stack, or of one matrix
    with `num_rows` rows. None if it does not change. `deltas` have PEFT's paths."""
    path, _, word = name.removesuffix(".weight").rpartition(".")
    expert_path, _, index = path.rpartition(".")
    is_single = index.isdigit()
    path = expert_path if is_single else path
    delta = deltas.get(path if word in OUTPUT_WORDS else f"{path}.{INNER}")
    if not is_single or delta is None:
        return delta
    num_outputs = delta.b_EOR.shape[1]
    is_second_half = word in SECOND_WORDS and num_outputs == 2 * num_rows
    begin = num_rows if is_second_half else 0
    return delta.get_expert(int(index), slice(begin, begin + num_rows))


@contextmanager
def adapted_experts(network: nn.Module, loras: Mapping[str, Any]) -> Iterator[None]:
    """Let stock modules of experts compute with adapted weights inside the block, as PEFT does:
    W + scale B A in the dtype of W, of one layer at a time. `loras` have PEFT's paths."""
    hooks: list[Any] = []
    originals: list[Any] = []
    for path, output_delta in loras.items():
        if is_expert_path(path) and not path.endswith(f".{INNER}"):
            module = network.get_submodule(path)
            deltas = (loras[f"{path}.{INNER}"], output_delta)
            adapt = functools.partial(_adapt_weights, deltas=deltas, originals=originals)
            restore = functools.partial(_restore_weights, originals=originals)
            hooks.append(module.register_forward_pre_hook(adapt))
            hooks.append(module.register_forward_hook(restore))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adapt_weights(
    module: Any, _inputs: Any, *, deltas: Sequence[ExpertLoraTensors], originals: list[Any]
) -> None:
    for (target, name), delta in zip(_list_weights(module), deltas, strict=True):
        original = getattr(target, name)
        originals.append(original)
        adapted = _adapt_weight(original, delta, is_transposed=module.is_transposed)
        setattr(target, name, adapted)


def _restore_weights(module: Any, _inputs: Any, _output: Any, *, originals: list[Any]) -> None:
    for target, name in reversed(_list_weights(module)):
        setattr(target, name, originals.pop())


def _list_weights(module: Any) -> list[tuple[Any, str]]:
    """Return the objects and attributes that hold the matrices: of a stock module its parameters'
    data, of ours the frozen weights."""
    if isinstance(module, Experts):
        return [(module, "inputs"), (module, "outputs")]
    input_name = "gate_up_proj" if module.has_gate else "up_proj"
    return [(getattr(module, input_name), "data"), (getattr(module, OUTPUT_STACK), "data")]


def _adapt_weight(weight: Any, delta: ExpertLoraTensors, *, is_transposed: bool) -> Any:
    if isinstance(weight, Tensor):
        return delta.merge_into_stored(weight.float(), is_transposed=is_transposed).to(weight)
    matrices = [weight.get_matrix(expert) for expert in range(weight.shape[0])]
    stacked = torch.stack(matrices)
    return StackedMatrices(delta.merge_into(stacked.float()).to(stacked))
