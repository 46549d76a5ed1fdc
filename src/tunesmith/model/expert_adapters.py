"""Adapters of experts: their tensors in PEFT's files, the change of a weight, and vLLM's names.

In: a network with our experts, or tensors under PEFT's names (hub/expert_names.py has the names and
the layout). Left out: the modules (experts.py), reading and writing files (save.py). Legend: E
experts, O outputs, I inputs, r rank."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.expert_weights import StackedMatrices
from tunesmith.model.experts import ExpertLora, Experts, find_experts, split_experts
from tunesmith.model.hub.expert_names import INNER, OUTPUT_STACK, is_expert_path

# matrices of an expert that are one matrix in transformers' stack
GATED_PARTS = ("gate_proj", "up_proj")
OUTPUT_WORDS = {"down_proj", "w2"}
SECOND_WORDS = {"up_proj", "w3"}  # of what lies below the gate in the stack


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


def split_into_experts(tensors: Mapping[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """Return an adapter of gated experts with two matrices for each matrix of each expert,
    <experts>.N.{gate_proj,up_proj,down_proj}.lora_{A,B}.weight.

    Gate and up share the A of their stack; each has its rows of B. Other tensors are unchanged."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, part = name.removesuffix(".weight").rpartition(".")
        if not is_expert_path(path):
            split[name] = tensor
        elif part == "lora_A":
            a_ERI, b_EOR = split_experts(tensor, tensors[f"{path}.lora_B.weight"], num_experts)
            experts_path = path.removesuffix(f".{INNER}")
            words = (OUTPUT_STACK,)
            if path != experts_path:
                words = GATED_PARTS
            for expert in range(num_experts):
                rows = b_EOR[expert].chunk(len(words))
                for word, rows_OR in zip(words, rows, strict=True):
                    prefix = f"{experts_path}.{expert}.{word}"
                    split[f"{prefix}.lora_A.weight"] = a_ERI[expert].clone()
                    split[f"{prefix}.lora_B.weight"] = rows_OR.contiguous()
    return split
