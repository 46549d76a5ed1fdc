"""Compare our network with the stock one block by block, each on the stock's own inputs.

    stock = StockNetwork(network)                    modules, buffers and samples of weights
    for difference in compare_layers(model, stock, packs, dtype): ...

In: our model, the stock's modules, and packs of documents. Out: the difference of every block
(attention, other mixers, MLPs, experts, norms, routers), of each layer, of the embeddings, of the
final norm and of the head. Transformers computes each document alone, one layer after another; our
layer gets the same inputs, packed. After a block of ours has run, its output is replaced by the
stock's: a difference is a block's own, however deep the network is, and a router that meets a tie
does not change what follows.

Weights are ours, so that only the computation is compared and one layer at a time is in memory.
Whether they still are the stock's is checked by samples that are taken before. With `dtype` wider
than the model's, copies of the layers compute in it: what remains is no rounding of bf16. Experts
stay as they are stored, and are widened one at a time. Left out: tolerances and errors (train/)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.core.types import Batch
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.expert_weights import FrozenExperts
from tunesmith.model.experts import Experts, is_stock_experts, split_experts
from tunesmith.model.frozen_weight import DenseWeight
from tunesmith.model.hub.text_class import build_network, use_torch_code
from tunesmith.model.layers import Embedding
from tunesmith.model.lora import LoraLinear, QuantizedLinear
from tunesmith.model.new_embeddings import get_new_rows
from tunesmith.model.save import LoraTensors
from tunesmith.model.target_modules import PART_BY_MODULE, ROUTER, is_norm
from tunesmith.model.text_network import EmptyOnMeta
from tunesmith.model.weight_shards import gather_parents, gather_weights

SAMPLED_VALUES = 4096  # of each weight
HEAD_ROWS = 512  # of the vocabulary, for which logits are compared in full precision
# children of a layer that are blocks, beside norms; the others are activations
BLOCK_NAMES = {name for name, part in PART_BY_MODULE.items() if part != ROUTER} | {"mixer"}
TUPLE_LAYERS = ("FalconH1DecoderLayer",)  # layers that return their output in a tuple
# of the largest gradient of a layer's adapters: smaller ones may be rounding alone, such as that of
# queries where every document has one token
SMALL_GRADIENT = 0.01
TINY = 1e-30  # a gradient where none is expected has an error without end
SMALL_ROW = 0.1  # of the mean norm of a block's rows: smaller rows are as precise as this


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


@dataclass(frozen=True, eq=False)
class ComparedPack:
    """A pack for our network. `index_T` says which token of `documents`, one after another, each of
    its tokens is."""

    documents: tuple[Tensor, ...]  # of token ids
    batch: Batch
    index_T: Tensor


@dataclass(frozen=True)
class Difference:
    """The difference of a part of ours from the stock's, relative to the norm of its output: of the
    token that differs most, and of all tokens. `num_equal_choices` of the `num_choices` tokens of a
    router go to the same experts."""

    path: str
    worst_token: float
    mean: float
    num_equal_choices: int = 0
    num_choices: int = 0
    is_adapter: bool = False  # the gradient of an adapter


Outputs = dict[str, tuple[Tensor, ...]]  # path of a block -> its outputs, a row for each token


@dataclass(frozen=True, eq=False)
class _Call:
    """The arguments that a decoder passes to a layer; the first are hidden states [1, T, H]."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@torch.no_grad()
def compare_layers(
    model: PackedCausalLM, stock: StockNetwork, packs: Sequence[ComparedPack], dtype: torch.dtype
) -> Iterator[Difference]:
    """Yield the differences of the network's parts on each pack, from the bottom to the top."""
    is_wide = dtype != model.dtype
    shell = stock.build_shell(model.network, dtype)
    ours = widen_model(model, dtype) if is_wide else model
    runs = [_PackRun(pack, shell, stock, ours) for pack in packs]
    for run in runs:
        yield run.compare_embeddings()
    for index, layer in enumerate(model.decoder.layers):
        stock_layer = fill_layer(stock.layers[index], layer, dtype)
        our_layer = widen_layer(layer, dtype) if is_wide else layer
        for run in runs:
            yield from run.compare_layer(index, stock_layer, our_layer)
    for run in runs:
        yield from run.compare_head(shell, stock, ours)


def compare_gradients(
    model: PackedCausalLM, stock: StockNetwork, pack: ComparedPack, dtype: torch.dtype
) -> Iterator[Difference]:
    """Yield the differences of the gradients of a layer's input and adapters, of the sum of its
    outputs times random numbers, for the first layer of each kind and the last one. Transformers'
    gradient of B, where W + scale B A is the weight, is that of W times A and the scale."""
    is_wide = dtype != model.dtype
    with torch.no_grad():
        shell = stock.build_shell(model.network, dtype)
        run = _PackRun(pack, shell, stock, widen_model(model, dtype) if is_wide else model)
    layers = list(model.decoder.layers)
    kinds = [_describe_kind(layer) for layer in layers]
    compared = {kinds.index(kind) for kind in kinds} | {len(layers) - 1}
    for index, layer in enumerate(layers[: max(compared) + 1]):
        stock_layer = fill_layer(stock.layers[index], layer, dtype)
        our_layer = widen_layer(layer, dtype) if is_wide else layer
        if index not in compared:
            run.skip_layer(index, stock_layer, our_layer)
            continue
        yield from run.compare_gradients(index, stock_layer, our_layer)


class _PackRun:
    """One pack on its way through both networks."""

    def __init__(
        self, pack: ComparedPack, shell: Any, stock: StockNetwork, ours: PackedCausalLM
    ) -> None:
        self.pack = pack
        num_tokens = len(pack.batch.tokens_T)
        all_positions_S = torch.arange(num_tokens, device=ours.device)
        self.batch = dataclasses.replace(pack.batch, positions_S=all_positions_S)
        self.stock_calls: list[list[_Call]] = [[] for _ in pack.documents]
        # shortest first: a stock rotary embedding that depends on the length keeps the longest
        for document in sorted(range(len(pack.documents)), key=lambda d: len(pack.documents[d])):
            with _skipped(stock.layers, self.stock_calls[document]):
                shell(input_ids=pack.documents[document][None], use_cache=False)
        self.our_calls: list[_Call] = []
        with _skipped(ours.decoder.layers, self.our_calls):
            ours.compute_hidden(self.batch)
        self.states = [calls[0].hidden for calls in self.stock_calls]

    def compare_embeddings(self) -> Difference:
        return _measure("the embedding", self.our_calls[0].hidden, self._pack_rows(self.states))

    def compare_layer(
        self, index: int, stock_layer: nn.Module, our_layer: nn.Module
    ) -> Iterator[Difference]:
        """Compare a layer and its blocks, and go on with the stock's output."""
        recorded: list[Outputs] = []
        inputs_TH = self._pack_rows(self.states)
        for document, calls in enumerate(self.stock_calls):
            outputs: Outputs = {}
            call = calls[index]
            with _hooked(stock_layer, lambda path, rows, out=outputs: out.update({path: rows})):
                out = stock_layer(self.states[document], *call.args, **call.kwargs)
            self.states[document] = _get_first(out)
            recorded.append(outputs)
        differences: list[Difference] = []

        def replace_output(path: str, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            parts = zip(*(outputs[path] for outputs in recorded), strict=True)
            expected = tuple(self._pack_rows(part) for part in parts)
            name = f"layers.{index}.{path}"
            is_router = len(expected) > 1
            choices = (rows[-1], expected[-1]) if is_router else None
            differences.append(_measure(name, rows[0], expected[0], choices))
            return expected

        call = self.our_calls[index]
        with _hooked(our_layer, replace_output):
            out = our_layer(inputs_TH[None], *call.args, **call.kwargs)
        if len(differences) != len(recorded[0]):
            raise KeyError(f"the blocks of layer {index} differ: {', '.join(recorded[0])}")
        yield from differences
        expected_TH = self._pack_rows(self.states)
        yield _measure(f"layers.{index} (the sum of its blocks)", _get_first(out), expected_TH)

    def compare_gradients(
        self, index: int, stock_layer: nn.Module, our_layer: nn.Module
    ) -> Iterator[Difference]:
        """Compare the gradients of a layer, and go on with the stock's output."""
        inputs_TH = self._pack_rows(self.states)
        loras = _find_adapters(our_layer)
        if find_routers(our_layer) and inputs_TH.dtype.itemsize < 4:
            loras = {}  # few tokens have equal choices in bf16, and sums over few are rounded
        weights = [stock_layer.get_parameter(f"{path}.weight") for path in loras]
        outer = [lora.lora_B for lora in loras.values()]
        for parameter in (*weights, *outer):
            parameter.requires_grad_(True)
        generator = torch.Generator().manual_seed(index)
        is_equal_T = self._find_equal_choices(index, stock_layer, our_layer)
        directions: list[Tensor] = []
        gradients: list[tuple[Tensor, ...]] = []
        for document, calls in enumerate(self.stock_calls):
            state = self.states[document]
            direction = torch.randn(state.shape, generator=generator).to(state)
            direction *= is_equal_T.split([len(d) for d in self.pack.documents])[document][:, None]
            directions.append(direction)
            out, document_gradients = _compute_gradients(
                stock_layer, state, calls[index], direction, weights
            )
            self.states[document] = out
            gradients.append(document_gradients)
        direction = self._pack_rows(directions)[None]
        call = self.our_calls[index]
        _, ours = _compute_gradients(our_layer, inputs_TH[None], call, direction, outer)
        name = f"the gradient of layers.{index}"
        yield _measure(name, ours[0], self._pack_rows([tensors[0] for tensors in gradients]))
        expected: list[Tensor] = []
        for number, lora in enumerate(loras.values(), start=1):
            dweight_OI = torch.stack([tensors[number] for tensors in gradients]).sum(0)
            a_RI = lora.lora_A.detach()
            expected.append(lora.scale * (dweight_OI.to(a_RI.dtype) @ a_RI.t()))
        smallest = SMALL_GRADIENT * max((float(x.norm()) for x in expected), default=0.0)
        for path, ours_OR, expected_OR in zip(loras, ours[1:], expected, strict=True):
            distance = float((ours_OR - expected_OR).norm())
            error = distance and distance / max(float(expected_OR.norm()), smallest, TINY)
            yield Difference(f"{name}.{path}", error, error, is_adapter=True)

    @torch.no_grad()
    def skip_layer(self, index: int, stock_layer: nn.Module, our_layer: nn.Module) -> None:
        """Go on with the stock's output. Later layers may use the keys and values of both."""
        call = self.our_calls[index]
        our_layer(self._pack_rows(self.states)[None], *call.args, **call.kwargs)
        for document, calls in enumerate(self.stock_calls):
            call = calls[index]
            out = stock_layer(self.states[document], *call.args, **call.kwargs)
            self.states[document] = _get_first(out)

    def _find_equal_choices(
        self, index: int, stock_layer: nn.Module, our_layer: nn.Module
    ) -> Tensor:
        """Return which tokens of the documents, one after another, both layers send to the same
        experts: all but those whose scores differ by rounding."""
        choices: list[list[Tensor]] = []
        for document, calls in enumerate(self.stock_calls):
            choices.append(_record_choices(stock_layer, self.states[document], calls[index]))
        inputs_TH = self._pack_rows(self.states)
        ours = _record_choices(our_layer, inputs_TH[None], self.our_calls[index])
        is_equal_T = torch.ones(len(self.pack.index_T), dtype=torch.bool, device=inputs_TH.device)
        for parts, choices_TK in zip(zip(*choices, strict=True), ours, strict=True):
            is_equal_T &= (choices_TK == self._pack_rows(parts)).all(-1)
        restored_T = torch.empty_like(is_equal_T)
        restored_T[self.pack.index_T] = is_equal_T
        return restored_T

    def compare_head(
        self, shell: Any, stock: StockNetwork, ours: PackedCausalLM
    ) -> Iterator[Difference]:
        """Compare the final norm and a part of the logits."""
        normed: list[Tensor] = []
        logits: list[Tensor] = []
        for tokens_L, state in zip(self.pack.documents, self.states, strict=True):
            with _skipped(stock.layers, [], state), _last_hidden(shell.base_model, normed):
                logits.append(shell(input_ids=tokens_L[None], use_cache=False).logits[0])
        with _skipped(ours.decoder.layers, [], self._pack_rows(self.states)[None]):
            hidden_TH = ours.compute_hidden(self.batch)
        expected_TH = self._pack_rows(normed)
        yield _measure("the final norm", hidden_TH, expected_TH)
        head = ours.head
        rows = choose_head_rows(len(head.weight))
        bias = None if head.bias is None else head.bias[rows]
        weight = head.weight[rows].to(expected_TH.dtype)
        head = dataclasses.replace(head, weight=weight, bias=bias, new_rows=None)
        yield _measure("the head", head.compute_logits(expected_TH), self._pack_rows(logits))

    def _pack_rows(self, documents: Sequence[Tensor]) -> Tensor:
        """Return the rows of the pack's tokens, of outputs [1, T, H] or [T, H] by document."""
        return torch.cat([_get_rows(rows) for rows in documents])[self.pack.index_T]


def _find_adapters(layer: nn.Module) -> dict[str, LoraLinear]:
    """Return path -> linear with an adapter that only adds to its weight."""
    linears = {path: m for path, m in layer.named_modules() if isinstance(m, LoraLinear)}
    return {path: m for path, m in linears.items() if m.lora_magnitude_vector is None}


def _record_choices(layer: nn.Module, hidden: Tensor, call: _Call) -> list[Tensor]:
    """Return the chosen experts [T, K] of each router of a layer, in ascending order."""
    choices: list[Tensor] = []
    hooks: list[Any] = []
    for router in find_routers(layer).values():
        hook = router.register_forward_hook(
            lambda _module, _inputs, output: choices.append(output[-1].sort(-1).values)
        )
        hooks.append(hook)
    if hooks:
        with torch.no_grad():
            layer(hidden, *call.args, **call.kwargs)
    for hook in hooks:
        hook.remove()
    return choices


def _describe_kind(layer: nn.Module) -> tuple[tuple[str, type], ...]:
    """Return what two layers have in common that compute the same: their modules' names and
    types."""
    return tuple((path, type(module)) for path, module in layer.named_modules())


def _compute_gradients(
    layer: nn.Module,
    hidden: Tensor,
    call: _Call,
    direction: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a layer's output, and the gradients of its input and of `parameters`, of the sum of
    output times direction; zeros where there is none."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        out = _get_first(layer(leaf, *call.args, **call.kwargs))
        tensors = [leaf, *parameters]
        gradients = torch.autograd.grad((out * direction).sum(), tensors, materialize_grads=True)
    return out.detach(), tuple(gradient.detach() for gradient in gradients)


# ---------------------------------------------------------------- differences


def _measure(
    path: str, ours: Tensor, stock: Tensor, choices: tuple[Tensor, Tensor] | None = None
) -> Difference:
    """Compare rows. A row of zeros in both is equal, NaN is not."""
    accum_dtype = torch.promote_types(stock.dtype, torch.float32)
    ours_TH = _get_rows(ours).to(accum_dtype)
    stock_TH = stock.to(accum_dtype)
    errors_T = (ours_TH - stock_TH).norm(dim=1)
    norms_T = stock_TH.norm(dim=1)
    mean_norm = norms_T.square().mean().sqrt()
    sizes_T = norms_T.clamp(min=SMALL_ROW * mean_norm)
    ratios_T = torch.where(errors_T == 0, errors_T, errors_T / sizes_T)
    mean = errors_T.square().mean().sqrt()
    mean = mean if mean == 0 else mean / mean_norm
    num_equal = 0
    if choices is not None:
        ours_TK, stock_TK = (rows.sort(-1).values for rows in choices)
        num_equal = int((ours_TK == stock_TK).all(-1).sum())
    num_choices = 0 if choices is None else len(stock_TH)
    return Difference(path, float(ratios_T.max()), float(mean), num_equal, num_choices)


# ---------------------------------------------------------------- blocks


def find_blocks(layer: nn.Module) -> dict[str, nn.Module]:
    """Return path in the layer -> block or norm."""
    return {
        name: child
        for name, child in layer.named_children()
        if name in BLOCK_NAMES or is_norm(name)
    }


def find_routers(layer: nn.Module) -> dict[str, nn.Module]:
    """Return path in the layer -> router, whose last output are the chosen experts [T, K]."""
    return {p: m for p, m in layer.named_modules() if type(m).__name__.endswith("Router")}


@contextmanager
def _hooked(
    layer: nn.Module, handle: Callable[[str, tuple[Tensor, ...]], tuple[Tensor, ...] | None]
) -> Iterator[None]:
    """Call `handle` with the path and the output rows of each block and router, inside the block.
    What it returns takes the place of the output."""
    hooks: list[Any] = []
    routers = find_routers(layer)
    for path, module in (find_blocks(layer) | routers).items():

        def run(_module: nn.Module, _inputs: Any, output: Any, path: str = path) -> Any:
            parts = output if path in routers else (_get_first(output),)
            replaced = handle(path, tuple(map(_get_rows, parts)))
            if replaced is None:
                return None
            shaped = tuple(r.view_as(p) for r, p in zip(replaced, parts, strict=True))
            if path in routers:
                return shaped
            return (*shaped, *output[1:]) if isinstance(output, tuple) else shaped[0]

        hooks.append(module.register_forward_hook(run))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _skipped(
    layers: nn.ModuleList, calls: list[_Call], output: Tensor | None = None
) -> Iterator[None]:
    """Inside the block the layers compute nothing: they store how they are called, and return
    `output`, or their input."""
    for layer in layers:

        def skip(
            hidden_states: Tensor,
            *args: Any,
            is_tuple: bool = type(layer).__name__ in TUPLE_LAYERS,
            **kwargs: Any,
        ) -> Any:
            calls.append(_Call(hidden_states, args, kwargs))
            out = hidden_states if output is None else output
            return (out,) if is_tuple else out

        layer.forward = skip
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _last_hidden(decoder: nn.Module, states: list[Tensor]) -> Iterator[None]:
    """Store the final hidden states that the decoder returns inside the block."""
    hook = decoder.register_forward_hook(
        lambda _module, _inputs, output: states.append(output.last_hidden_state)
    )
    try:
        yield
    finally:
        hook.remove()


def _get_first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _get_rows(rows: Tensor) -> Tensor:
    """Return [T, H] of [1, T, H] or [T, H]."""
    return rows.reshape(-1, rows.shape[-1])
