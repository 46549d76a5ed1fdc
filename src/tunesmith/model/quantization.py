"""Networks that are built without weights and then filled: 4-bit models and truncated ones.

In: a model folder that `hub/resolve.py` has checked. `load_quantized` returns the stock network
with a QuantizedLinear for each linear but the head and routers, and 4-bit experts, loaded one
tensor at a time, so the model is never in memory in full precision; embeddings, head, routers and
norms are in `dtype`. It holds the dequantized weights, so it is the oracle of a quantized run.
Weights are quantized from the values in the file, for any `dtype`. `build_truncated_network`
returns the first layers with dummy weights, to measure how long a step takes. Left out: the 4-bit
format (frozen_weight.py), adapters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.model.adapters import find_expert_modules, find_linears, replace_module
from tunesmith.model.expert_weights import NF4ExpertWeight
from tunesmith.model.experts import Experts, list_stacks
from tunesmith.model.frozen_weight import NF4Weight, import_bitsandbytes
from tunesmith.model.hub.packed_tensors import MXFP4_DTYPE
from tunesmith.model.hub.stored_tensors import StoredParameter
from tunesmith.model.lora import LoraLinear, QuantizedLinear
from tunesmith.model.text_network import (
    build_empty_network,
    check_weight_shapes,
    finish_network,
    iter_by_layer,
    list_stored_parameters,
    pick_dtype,
    put_tensor,
    read_finite_parameter,
    set_packed_experts,
)
from tunesmith.model.weight_shards import WeightShards

# of dummy weights: neither zero nor subnormal, which some processors multiply at another speed
FILL_VALUE = 0.01
STACK_NAMES = ("gate_up_proj", "up_proj", "down_proj")  # of the matrices of a layer's experts


def load_quantized(
    folder: Path, dtype: torch.dtype, device: str = "cpu", shards: WeightShards | None = None
) -> PreTrainedModel:
    """Load a network like `load_network`, with the decoder's linears in 4 bits.

    Raises InputError without bitsandbytes, for weights that do not match the config, and for NaN or
    infinite values."""
    import_bitsandbytes()
    check_weight_shapes(folder)
    network = build_empty_network(folder, dtype)
    linears = find_linears(network)
    experts = QuantizedExperts(network, dtype)
    for name, stored in iter_by_layer(network, list_stored_parameters(network, folder), shards):
        if stored.headers[0].dtype == MXFP4_DTYPE:  # in 4 bits already
            set_packed_experts(network, name, stored, dtype, device)
            continue
        if experts.has_stack(name):
            experts.quantize(name, _iter_matrices(name, stored, folder, device))
            continue
        tensor = read_finite_parameter(name, stored, folder, device)
        path, _, tensor_name = name.rpartition(".")
        if tensor_name == "weight" and path in linears:
            layer = QuantizedLinear(tensor, linears[path].bias, dtype)
            replace_module(network, path, layer)
        else:
            put_tensor(network, name, tensor.to(pick_dtype(network, name, dtype, stored)))
    return finish_network(network, folder, device)


class QuantizedExperts:
    """The experts of a network that is being loaded: matrices in 4 bits until all are there."""

    def __init__(self, network: PreTrainedModel, dtype: torch.dtype) -> None:
        self.network = network
        self.dtype = dtype
        self.modules: dict[str, Any] = dict(find_expert_modules(network))
        self.weights: dict[str, NF4ExpertWeight] = {}

    def has_stack(self, name: str) -> bool:
        """Return whether a parameter is a stack of matrices; biases of experts are none."""
        path, _, tensor_name = name.rpartition(".")
        return path in self.modules and tensor_name in STACK_NAMES

    def quantize(self, name: str, matrices: Iterable[Tensor]) -> None:
        """Quantize a stack, one expert after another, each as transformers stores it. With both
        stacks of a layer, our module takes the place of transformers'."""
        path, _, tensor_name = name.rpartition(".")
        stock = self.modules[path]
        self.weights[name] = NF4ExpertWeight(
            matrices,
            self.dtype,
            num_parts=count_parts(tensor_name),
            is_transposed=stock.is_transposed,
        )
        inputs, outputs = (self.weights.get(f"{path}.{stack}") for stack in list_stacks(stock))
        if inputs is not None and outputs is not None:
            replace_module(self.network, path, Experts(stock, weights=(inputs, outputs)))


def _iter_matrices(
    name: str, stored: StoredParameter, folder: Path, device: str
) -> Iterator[Tensor]:
    """Read a stack expert by expert if the file holds it so."""
    if not stored.num_experts:
        yield from read_finite_parameter(name, stored, folder, device)
    for expert in range(stored.num_experts):
        matrix = StoredParameter(stored.get_expert(expert))
        yield read_finite_parameter(name, matrix, folder, device)


def build_truncated_network(
    folder: Path, dtype: torch.dtype, num_layers: int, *, is_quantized: bool
) -> PreTrainedModel:
    """Build the first `num_layers` with dummy weights. Only config.json is needed."""
    network = build_empty_network(folder, dtype, num_layers)
    quantized_linears = find_linears(network) if is_quantized else {}
    experts = QuantizedExperts(network, dtype)
    for name, parameter in list(network.named_parameters()):
        if is_quantized and experts.has_stack(name):
            matrix = torch.full(parameter.shape[1:], FILL_VALUE, dtype=dtype)
            experts.quantize(name, itertools.repeat(matrix, len(parameter)))
            continue
        path, _, tensor_name = name.rpartition(".")
        weight = torch.full(parameter.shape, FILL_VALUE, dtype=dtype)
        if path not in quantized_linears:
            setattr(network.get_submodule(path), tensor_name, nn.Parameter(weight))
        elif tensor_name == "weight":
            replace_module(network, path, QuantizedLinear(weight, None, dtype))
    network.tie_weights()
    model: Any = network
    return model.eval().requires_grad_(False)


def find_quantized_weights(network: nn.Module) -> dict[str, NF4Weight]:
    """Return path -> 4-bit weight, with or without an adapter; each matrix of each expert."""
    weights: dict[str, NF4Weight] = {}
    for path, module in network.named_modules():
        if isinstance(module, LoraLinear | QuantizedLinear) and isinstance(
            module.frozen, NF4Weight
        ):
            weights[path] = module.frozen
        elif isinstance(module, Experts):
            for name, parts in module.list_quantized().items():
                weights[f"{path}.{name}"] = parts
    return weights


def roundtrip_nf4(weight_OI: Tensor) -> Tensor:
    """Quantize a weight to 4 bits and return its dequantized values in fp32."""
    return NF4Weight(weight_OI, torch.float32).weight


def count_parts(name: str) -> int:
    """Return in how many parts a matrix of an expert is quantized: gate and up apart."""
    return 2 if name.endswith("gate_up_proj") else 1


def roundtrip_experts(name: str, weight: Tensor) -> Tensor:
    """Quantize a stack of experts [E, O, I], or a matrix of one expert, in the parts in which
    `load_quantized` quantizes it, and return its dequantized values in fp32."""
    if weight.ndim == 2:
        return roundtrip_nf4(weight)
    num_parts = count_parts(name)
    matrices: list[Tensor] = []
    for matrix_OI in weight.detach():
        parts = [roundtrip_nf4(part.contiguous()) for part in matrix_OI.chunk(num_parts)]
        matrices.append(torch.cat(parts))
    return torch.stack(matrices)


def roundtrip_network(network: PreTrainedModel) -> None:
    """Give a stock network the weights that `load_quantized` computes with."""
    for linear in find_linears(network).values():
        assert isinstance(linear, nn.Linear), "the network is not quantized"
        linear.weight.data = roundtrip_nf4(linear.weight.detach()).to(linear.weight.dtype)
    for module in find_expert_modules(network).values():
        for name in list_stacks(module):
            parameter = module.get_parameter(name)
            parameter.data = roundtrip_experts(name, parameter).to(parameter.dtype)
