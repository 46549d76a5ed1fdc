"""The stock network beside ours: its modules without weights, to compare ours with layer by layer.

    stock = StockNetwork(network)                    before `wrap_model` replaces modules in place
    stock.find_changed_weight(model.network)         a weight that is no longer what it was, or None
    stock.build_shell(model.network, dtype)          all but the layers, with weights
    fill_layer(stock.layers[i], ours, dtype)         a stock layer with the weights of ours
    widen_layer(ours, dtype), widen_model(...)       a copy of ours with wide weights

Weights are ours, widened, so that only the computation is compared and one layer at a time is in
memory. Whether they still are the stock's is checked by samples that are taken before. Experts stay
as they are stored, and are widened one at a time. Left out: the comparison (compare_layers.py)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.expert_weights import FrozenExperts
from tunesmith.model.experts import Experts, is_stock_experts, split_experts
from tunesmith.model.frozen_weight import DenseWeight
from tunesmith.model.hub.text_class import build_network, use_torch_code
from tunesmith.model.layers import Embedding
from tunesmith.model.lora import LoraLinear, QuantizedLinear
from tunesmith.model.new_embeddings import get_new_rows
from tunesmith.model.save import LoraTensors
from tunesmith.model.text_network import EmptyOnMeta
from tunesmith.model.weight_shards import gather_parents, gather_weights

SAMPLED_VALUES = 4096  # of each weight
HEAD_ROWS = 512  # of the vocabulary, for which logits are compared in full precision


class StockNetwork:
    """The modules of a stock network as transformers builds them, with its buffers, and samples of
    its weights in their place."""

    def __init__(self, network: PreTrainedModel) -> None:
        with EmptyOnMeta():
            stock = build_network(copy.deepcopy(network.config), dtype=network.dtype)
        self.network = use_torch_code(stock).eval().requires_grad_(False)
        self.network.set_experts_implementation("eager")  # reads one expert at a time
        # those of files; the others, such as frequencies, are computed anew
        stored = network.state_dict()
        for name, buffer in list(self.network.named_buffers(remove_duplicate=False)):
            path, _, buffer_name = name.rpartition(".")
            value = stored[name].clone() if name in stored else buffer.to(network.device)
            setattr(self.network.get_submodule(path), buffer_name, value)
        self.samples = {name: _sample(weight) for name, weight in _iter_weights(network)}

    @property
    def layers(self) -> nn.ModuleList:
        decoder: Any = self.network.base_model
        return decoder.layers

    def find_changed_weight(self, network: nn.Module, *, is_adapted: bool = False) -> str | None:
        """Return the first weight of ours whose values are not the stock's. With `is_adapted`, what
        is trained has started elsewhere and is left out."""
        for name, (places, values) in self.samples.items():
            weight = read_weight(network, name)
            if is_adapted and weight.requires_grad:
                continue
            path, _, _ = name.rpartition(".")
            module = network.get_submodule(path)
            rows = get_new_rows(module.stock if isinstance(module, Embedding) else module)
            end = weight.numel() if rows is None else rows.span.start * weight.shape[1]
            is_old = places < end
            ours = weight.detach().reshape(-1)[places[is_old].to(weight.device)].cpu()
            if not torch.equal(ours.to(values.dtype), values[is_old]):
                return name
        return None

    def build_shell(self, ours: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
        """Return the stock network with the weights of `ours` in all but its layers, whose
        embeddings come in `dtype` and whose head has a few rows."""
        memo: dict[int, Any] = {id(layer): layer for layer in self.layers}
        in_layers = {id(parameter) for parameter in self.layers.parameters()}
        stock_head = self.network.get_output_embeddings()  # widened below, in few rows
        for path, module in self.network.named_modules():
            keeps_dtype = isinstance(module, nn.Embedding) or module is stock_head
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in in_layers and id(parameter) not in memo:
                    weight = read_weight(ours, f"{path}.{name}")
                    memo[id(parameter)] = _freeze(weight if keeps_dtype else _widen(weight, dtype))
        shell: Any = copy.deepcopy(self.network, memo)
        head = shell.get_output_embeddings()
        rows = choose_head_rows(len(head.weight))
        small = nn.Linear(1, 1, bias=head.bias is not None)
        small.weight = _freeze(head.weight[rows].to(dtype))
        if head.bias is not None:
            small.bias = _freeze(head.bias[rows].to(dtype))
        shell.set_output_embeddings(small)
        _widen_embeddings(shell, dtype)
        return shell


def choose_head_rows(vocab_size: int) -> list[int]:
    """Return rows of the head that are evenly spaced, with the first and the last."""
    return torch.linspace(0, vocab_size - 1, min(HEAD_ROWS, vocab_size)).long().tolist()


def fill_layer(stock: nn.Module, ours: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a stock layer with the weights of ours in `dtype`, adapters merged."""
    memo: dict[int, Any] = {}
    for path, module in stock.named_modules():
        memo |= _share_config(module)
        if is_stock_experts(module):
            stacks = _list_stacks(ours.get_submodule(path), module, dtype)
            memo |= {id(getattr(module, name)): stack for name, stack in stacks.items()}
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in memo:
                weight = read_weight(ours, f"{path}.{name}" if path else name)
                weight_dtype = _choose_dtype(weight, dtype)
                if name == "weight":
                    weight = _merge_adapter(ours.get_submodule(path), weight)
                memo[id(parameter)] = _freeze(weight.to(weight_dtype))
        memo |= _cast_buffers(module, dtype)
    return copy.deepcopy(stock, memo)


def widen_layer(ours: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a layer of ours with its weights in `dtype`."""
    gather_weights(ours)
    return copy.deepcopy(ours, _widen_modules(ours, dtype))


def widen_model(model: PackedCausalLM, dtype: torch.dtype) -> PackedCausalLM:
    """Return a model whose decoder has the layers of `model` and computes all else in `dtype`."""
    wide = copy.copy(model)
    memo: dict[int, Any] = {id(layer): layer for layer in model.decoder.layers}
    for module in model.decoder.children():
        if module is not model.decoder.layers:
            memo |= _widen_modules(module, dtype)
    wide.decoder = copy.deepcopy(model.decoder, memo)
    wide.rotary = wide.decoder.rotary_emb if model.rotary else None
    _widen_embeddings(wide.decoder, dtype)
    return wide


def read_weight(network: nn.Module, name: str) -> Tensor:
    """Return a weight of ours by its stock name, without its adapter."""
    gather_parents(network, name)
    path, _, tensor_name = name.rpartition(".")
    module: Any = network.get_submodule(path)
    if tensor_name == "weight" and isinstance(module, LoraLinear | QuantizedLinear):
        return module.frozen.weight
    return getattr(module, tensor_name)


def _merge_adapter(module: nn.Module, weight_OI: Tensor) -> Tensor:
    """Return the weight of a module with its adapter, if it has one."""
    if not isinstance(module, LoraLinear):
        return weight_OI
    magnitude_O = module.lora_magnitude_vector
    if magnitude_O is None and not module.lora_B.any():
        return weight_OI
    lora = LoraTensors(module.lora_A.detach(), module.lora_B.detach(), module.scale, magnitude_O)
    return lora.merge_into(weight_OI.to(module.lora_A.dtype)).detach()


# ---------------------------------------------------------------- experts


class WideExpertWeight:
    """Matrices of experts that are widened, and merged with their adapter, where they are used.

    It stands in for the stack of our module, and for the parameter of transformers', which
    multiplies by `parameter[expert]`."""

    stacked = None

    def __init__(self, frozen: FrozenExperts, dtype: torch.dtype, is_transposed: bool = False):
        self.frozen = frozen
        self.dtype = dtype
        self.shape = frozen.shape
        self.is_transposed = is_transposed
        self.adapter: tuple[Tensor, Tensor, float] | None = None

    def get_matrix(self, expert: int) -> Tensor:
        """Return the matrix [O, I] of an expert in `dtype`."""
        matrix_OI = self.frozen.get_matrix(expert).detach().to(self.dtype)
        if self.adapter is None:
            return matrix_OI
        a_ERI, b_EOR, scale = self.adapter
        return matrix_OI + (scale * (b_EOR[expert] @ a_ERI[expert])).to(self.dtype)

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """Return the matrix of an expert as transformers' module stores it."""
        matrix_OI = self.get_matrix(int(expert))
        return matrix_OI.t() if self.is_transposed else matrix_OI


def _list_stacks(experts: Any, stock: Any, dtype: torch.dtype) -> dict[str, WideExpertWeight]:
    """Return the name of each stack in transformers' module -> its matrices, adapters merged."""
    stacks: dict[str, WideExpertWeight] = {}
    for name, frozen, lora in (
        (experts.input_name, experts.inputs, experts.input_lora),
        (experts.output_name, experts.outputs, experts.output_lora),
    ):
        stack = WideExpertWeight(frozen, dtype, is_transposed=stock.is_transposed)
        if lora is not None and lora.lora_B.any():
            a_ERI, b_EOR = split_experts(lora.lora_A, lora.lora_B, lora.num_experts)
            stack.adapter = (a_ERI.detach(), b_EOR.detach(), lora.scale)
        stacks[name] = stack
    return stacks


# ---------------------------------------------------------------- copies


def _widen_modules(root: nn.Module, dtype: torch.dtype) -> dict[int, Any]:
    """Return what `deepcopy` puts in the place of weights: wide ones, and a stack of experts that
    widens. Embeddings stay as they are."""
    memo: dict[int, Any] = {}
    for module in root.modules():
        memo |= _share_config(module)
        if isinstance(module, LoraLinear | QuantizedLinear):
            memo[id(module.frozen)] = DenseWeight(module.frozen.weight.to(dtype))
        if isinstance(module, Experts):
            for stack in (module.inputs, module.outputs):
                memo[id(stack)] = WideExpertWeight(stack, dtype)
            for name in (module.input_name, module.output_name):
                if hasattr(module, name):  # a parameter that is widened where it is used
                    memo[id(getattr(module, name))] = getattr(module, name)
        is_embedding = isinstance(module, nn.Embedding | Embedding)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in memo:
                wide = parameter if is_embedding else _widen(parameter, dtype)
                memo[id(parameter)] = _freeze(wide)
        memo |= _cast_buffers(module, dtype)
    return memo


def _cast_buffers(module: nn.Module, dtype: torch.dtype) -> dict[int, Any]:
    """Return narrow buffers in `dtype`; wide ones, such as frequencies, are copied as they are."""
    buffers = [buffer for buffer in module.buffers(recurse=False) if buffer.is_floating_point()]
    narrow = [buffer for buffer in buffers if buffer.dtype.itemsize < dtype.itemsize]
    is_embedding = isinstance(module, nn.Embedding)
    return {} if is_embedding else {id(buffer): buffer.to(dtype) for buffer in narrow}


def _share_config(module: Any) -> dict[int, Any]:
    config = getattr(module, "config", None)
    return {} if config is None else {id(config): config}


def _widen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(_choose_dtype(weight, dtype))


def _choose_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or for a frozen weight that transformers keeps wider its own."""
    return dtype if weight.requires_grad else torch.promote_types(weight.dtype, dtype)


def _freeze(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)


def _widen_embeddings(network: nn.Module, dtype: torch.dtype) -> None:
    """Let embeddings outside of the layers, whose weights stay as they are, return `dtype`."""
    for module in network.modules():
        if isinstance(module, Embedding):
            module.dtype = dtype
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))


# ---------------------------------------------------------------- samples of weights


def _iter_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a stock network under their names; those in 4 bits dequantized, except
    experts."""
    names = [name for name, _ in network.named_parameters()]
    for path, module in network.named_modules():
        if isinstance(module, QuantizedLinear):
            names.append(f"{path}.weight")
    for name in names:
        yield name, read_weight(network, name)


def _sample(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return places in a weight, drawn at random and always the same, and its values there."""
    count = weight.numel()
    if count <= SAMPLED_VALUES:
        places = torch.arange(count)
    else:
        generator = torch.Generator().manual_seed(count)
        places = torch.randint(count, (SAMPLED_VALUES,), generator=generator)
    values = weight.detach().reshape(-1)[places.to(weight.device)]
    return places, values.cpu()
