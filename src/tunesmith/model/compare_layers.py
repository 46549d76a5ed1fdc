"""Compare our network with the stock one block by block, each on the stock's own inputs.

    for difference in compare_layers(model, stock, packs, dtype): ...

In: our model, the stock's modules, and packs of documents. Out: the difference of every block
(attention, other mixers, MLPs, experts, norms, routers), of each layer, of the embeddings, of the
final norm and of the head. Transformers computes each document alone, one layer after another; our
layer gets the same inputs, packed. After a block of ours has run, its output is replaced by the
stock's: a difference is a block's own, however deep the network is, and a router that meets a tie
does not change what follows. With `dtype` wider than the model's, copies of the layers compute in
it, one at a time: what remains is no rounding of bf16. Left out: tolerances and errors (train/)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.types import Batch
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.lora import LoraLinear
from tunesmith.model.stock_network import (
    StockNetwork,
    choose_head_rows,
    fill_layer,
    widen_layer,
    widen_model,
)
from tunesmith.model.target_modules import PART_BY_MODULE, ROUTER, is_norm

# children of a layer that are blocks, beside norms; the others are activations
BLOCK_NAMES = {name for name, part in PART_BY_MODULE.items() if part != ROUTER} | {"mixer"}
TUPLE_LAYERS = ("FalconH1DecoderLayer",)  # layers that return their output in a tuple
# of the largest gradient of a layer's adapters: smaller ones may be rounding alone, such as that of
# queries where every document has one token
SMALL_GRADIENT = 0.01
TINY = 1e-30  # a gradient where none is expected has an error without end
SMALL_ROW = 0.1  # of the mean norm of a block's rows: smaller rows are as precise as this


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
