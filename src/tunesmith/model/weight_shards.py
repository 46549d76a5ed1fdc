"""Weights that several ranks hold together: each has a part of every layer's bytes.

    shards = WeightShards(ranks, size=4)
    shards.add_layer(layer)           keep this rank's part of a layer that is loaded
    shards.train(network)             make all weights trainable, each rank updating its part
    shards.attach(network)            gather a layer before it runs, forward or backward
    with shards.joint(): ...          all ranks compute, each what it has to
    shards.serve(layer)               give rank 0 a layer, which computes alone

One layer is complete at a time; the next one takes its place. An all-gather needs all ranks, and
they rarely compute the same: their packs differ in number, and rank 0 alone evaluates. So nothing
is assumed about what another rank does next. Inside `joint` the ranks take rounds: each says which
layer it needs, or whose gradients are to be summed, or that it is done, and all do that for these
layers. Outside, rank 0 asks by command.

With the layer that it needs, a rank says which one it will need next, if there is memory for that.
Where all say the same, the next layer is gathered while this one computes; elsewhere, and if it was
not the next one, it is gathered when it is needed.

Embeddings, head and last norm are on each rank where weights are frozen. Where all are trained,
they are one more layer, which stays complete beside the others until all have computed.

In: decoder layers whose weights are loaded. Out: the same layers, and the same bits in every
product. Left out: what a rank keeps of a layer (layer_shards.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.core.errors import MachineError
from tunesmith.core.ranks import RankFailed, Ranks
from tunesmith.model.experts import Experts
from tunesmith.model.layer_shards import LayerShard, TrainedShard, lay_out
from tunesmith.model.lora import QuantizedLinear
from tunesmith.model.machine_errors import OutOfMemory, machine_errors

GATHER = "gather"  # the command of rank 0 outside of `joint`
GATHER_NAME = "gather_before_forward"  # attribute of a sharded layer
# Words of a round. 1 + the number of a layer asks for its weights; that plus the number of layers,
# for the sum of its gradients. NEXT * (1 + the number of a layer) says that it will be needed next.
DONE = 0
FAILED = -1
NEXT = 2**32


class WeightShards:
    """The sharded layers of a network, of which at most one is complete. Groups of `size`
    neighboring ranks hold the weights once."""

    def __init__(self, ranks: Ranks, size: int) -> None:
        """Form the groups. All ranks call it."""
        ranks.form_groups(size)
        self.ranks = ranks
        self.size = size
        self.layers: list[LayerShard] = []
        self.trained: list[TrainedShard] = []  # the same layers if they are trained
        self._is_joint = False
        self._is_exchanging = False
        self._ahead: int | None = None  # the layer that all ranks of the group have begun to gather
        self._hooks: list[Any] = []

    def add_layer(self, layer: nn.Module) -> None:
        """Keep this rank's part of the frozen weights of the next layer."""
        self.layers.append(LayerShard(list(list_frozen(layer)), self.ranks, self.size))

    def add_network(self, network: PreTrainedModel) -> None:
        """Keep this rank's part of all layers of a network that is loaded."""
        for layer in _get_layers(network):
            self.add_layer(layer)
        self.attach(network)

    def find_part_rows(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, range]:
        """Return the rows of each tensor of a layer that this rank's part needs. `sizes` are those
        of its tensors in the order of the layer: rows, and bytes of a row."""
        num_bytes = [rows * row_bytes for rows, row_bytes in sizes.values()]
        offsets, part = lay_out(num_bytes, self.size)
        begin = part * (self.ranks.rank % self.size)
        rows_by_name: dict[str, range] = {}
        for offset, (name, (rows, row_bytes)) in zip(offsets, sizes.items(), strict=True):
            first = min(max(0, begin - offset) // row_bytes, rows)
            last = min(math.ceil(max(0, begin + part - offset) / row_bytes), rows)
            rows_by_name[name] = range(first, last)
        return rows_by_name

    def train(self, network: PreTrainedModel) -> None:
        """Replace the frozen weights, in `joint`, by trainable ones of at least fp32: each rank
        holds its part of the layers, and of all else as one more layer, which is the last."""
        self.ranks.form_replicas(self.size)
        in_layers: set[int] = set()
        for index, layer in enumerate(_get_layers(network)):
            self.gather(index)
            parameters = list(layer.parameters())
            in_layers.update(map(id, parameters))
            self.trained.append(self._train_layer(parameters))
        self.release()
        rest = [parameter for parameter in network.parameters() if id(parameter) not in in_layers]
        self.trained.append(self._train_layer(rest))
        self.layers = list(self.trained)

    def _train_layer(self, parameters: list[nn.Parameter]) -> TrainedShard:
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return TrainedShard(parameters, self.ranks, self.size)

    def attach(self, network: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        """Let each layer gather its weights before its forward and before its backward. `dtype` is
        that of the products of trained weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        layers = _get_layers(network)
        for index, layer in enumerate(layers):
            before, after = _make_hooks(self, index)
            self._hooks.append(layer.register_forward_pre_hook(before))
            self._hooks.append(layer.register_forward_hook(after))
            setattr(layer, GATHER_NAME, before)
        if not self.trained:
            return
        if dtype is not None:
            for shard, layer in zip(self.trained, layers, strict=False):
                shard.cast_with(layer, dtype)
        before, _ = _make_hooks(self, len(layers))
        ends: list[Any] = [network.get_input_embeddings(), network.get_output_embeddings()]
        for module in (network, network.base_model, *ends):
            self._hooks.append(module.register_forward_pre_hook(before))
            setattr(module, GATHER_NAME, before)

    # ------------------------------------------------------------ who gathers when

    def gather(self, index: int, next_index: int | None = None) -> None:
        """Complete a layer, in the place of the one before, whose gradients are summed; begin with
        the next one if all ranks need the same."""
        layer = self.layers[index]
        if layer.is_complete:
            return
        for other in self.layers[: self._num_taking_turns]:
            if other is not layer:  # which may be arriving
                other.release()
        if self._is_joint:
            self._sum_gradients(self._num_taking_turns)
        layer.reserve()  # before the others wait for this rank
        if self._is_joint:
            self._run_round(1 + index, self._reserve_next(next_index))
            return
        assert self.ranks.is_main, "the other ranks compute in `joint` only"
        self.ranks.send(GATHER, layer=index)
        layer.gather()

    def _reserve_next(self, index: int | None) -> int | None:
        """Take the memory for the next layer; return its number, or None if it cannot be gathered
        ahead."""
        if index is None or not 0 <= index < self._num_taking_turns:
            return None
        try:
            with machine_errors():
                self.layers[index].reserve()
        except OutOfMemory:
            self.layers[index].release()
            return None
        return index

    def serve(self, index: int) -> None:
        """Join rank 0 in gathering a layer, if this rank is of its group."""
        if self.ranks.rank < self.size:
            self._pass_on(index)

    def _pass_on(self, index: int) -> None:
        """Gather a layer that this rank does not need."""
        layer = self.layers[index]
        was_complete = layer.is_complete
        layer.reserve()
        layer.gather()
        if not was_complete:
            layer.release()

    def release(self) -> None:
        """Keep this rank's parts alone."""
        for layer in self.layers:
            layer.release()

    @property
    def _num_taking_turns(self) -> int:
        """The layers of which one is complete at a time: all but the last one of trained ones."""
        return len(self.layers) - bool(self.trained)

    def _sum_gradients(self, num_layers: int) -> None:
        """Sum the gradients that this rank has of the first layers."""
        for index, layer in enumerate(self.trained[:num_layers]):
            if not layer.is_summed:
                self._run_round(1 + len(self.layers) + index)

    def find_pieces(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return this rank's pieces of all trained parameters, in their order."""
        pieces: dict[int, nn.Parameter] = {}
        for layer in self.trained:
            pieces |= zip(map(id, layer.parameters), layer.pieces, strict=True)
        return {name: pieces[id(parameter)] for name, parameter in parameters.items()}

    def take_flags(self, parameters: Mapping[str, nn.Parameter]) -> list[bool]:
        """Return which parameters had a gradient on this rank, and forget it."""
        flags: dict[int, bool] = {}
        for layer in self.trained:
            flags |= zip(map(id, layer.pieces), layer.has_gradient, strict=True)
            layer.has_gradient = [False] * len(layer.pieces)
        return [flags[id(piece)] for piece in parameters.values()]

    def combine_norms(self, norm: Tensor) -> Tensor:
        """Return the norm of all pieces of the group, from that of this rank's: the same bits on
        each."""
        norms = norm.new_empty(self.size, dtype=torch.float64)
        self.ranks.gather_parts(norms, norm.double()[None], size=self.size)
        return torch.linalg.vector_norm(norms)

    @contextmanager
    def joint(self, *, can_tell: bool = True) -> Iterator[None]:
        """Compute on all ranks; leave when those of the group have finished. All ranks call it.

        Raise RankFailed if another rank has left with an error. Without `can_tell` a rank leaves so
        without a word: the others wait for it inside of a layer, and not for a round."""
        self._is_joint = True
        self._is_exchanging = False
        self._ahead = None
        try:
            yield
            self.release()
            self._sum_gradients(len(self.trained))
            while self._run_round(DONE):
                pass
        except BaseException:  # Ctrl-C, too: the others would wait for this rank's next round
            if can_tell and not self._is_exchanging:  # else they wait for another message
                self.ranks.gather_words(FAILED, size=self.size)
            raise
        finally:
            self._is_joint = False
            self.release()

    def _run_round(self, wish: int, next_index: int | None = None) -> bool:
        """Do what the ranks wish; return whether any has a wish. Begin to gather the next layer if
        all say the same."""
        if self._is_exchanging:
            message = "a layer that another rank needs did not fit in memory"
            raise MachineError(message, where=self.ranks.name, fix="lower pack_length")
        self._is_exchanging = True
        word = wish if next_index is None else wish + NEXT * (1 + next_index)
        words = self.ranks.gather_words(word, size=self.size)
        if FAILED in words:
            raise RankFailed("another rank cannot go on", fix="see its message")
        is_agreed = words == [word] * self.size
        if next_index is not None and not is_agreed:
            self.layers[next_index].release()
        self._serve_wishes({other % NEXT for other in words} - {DONE}, wish, next_index)
        if next_index is not None and is_agreed:
            self.layers[next_index].start_gather()
            self._ahead = next_index
        self._is_exchanging = False
        return any(words)

    def _serve_wishes(self, wishes: set[int], wish: int, next_index: int | None) -> None:
        """Gather the layers that ranks of the group need, and sum gradients. `wish` is that of this
        rank, which has taken the memory of the next layer."""
        layers = {other - 1 for other in wishes if other <= len(self.layers)}
        sums = {other - 1 - len(self.layers) for other in wishes if other > len(self.layers)}
        ahead = self._ahead
        if layers:
            self._ahead = None
            if ahead not in (None, next_index) and wish != 1 + ahead:
                self.layers[ahead].release()
        for index in sorted(layers):
            if wish == 1 + index:
                self.layers[index].gather()
            elif index != ahead:
                self._pass_on(index)
        for index in sorted(sums):
            self.trained[index].sum_gradients()


def _make_hooks(shards: WeightShards, index: int) -> tuple[Any, Any]:
    """Return the hooks of a layer. They are functions, which a copy of the layer shares."""

    def gather_before_forward(_layer: nn.Module, _inputs: Any) -> None:
        shards.gather(index, index + 1)

    def gather_before_backward(_layer: nn.Module, _inputs: Any, outputs: Any) -> None:
        output: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        if output.requires_grad:
            output.register_hook(lambda _gradient: shards.gather(index, index - 1))

    return gather_before_forward, gather_before_backward


def gather_weights(module: nn.Module) -> None:
    """Gather the weights of a module, if it is a sharded layer: for code that reads them itself."""
    gather = getattr(module, GATHER_NAME, None)
    if gather is not None:
        gather(module, ())


def gather_parents(network: nn.Module, name: str) -> None:
    """Gather the sharded layer that has a parameter, if one does."""
    module = network
    gather_weights(module)
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        gather_weights(module)


def _get_layers(network: PreTrainedModel) -> nn.ModuleList:
    decoder: Any = network.base_model
    return decoder.layers


def list_frozen(layer: nn.Module) -> Iterator[Tensor]:
    """Yield the frozen tensors of a layer, plain or in 4 bits."""
    for module in layer.modules():
        if isinstance(module, QuantizedLinear):
            yield from module.frozen.list_tensors()
        if isinstance(module, Experts):
            for weight in module.list_quantized().values():
                yield from weight.list_tensors()
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                yield parameter


def count_sharing_ranks(size: int, world: int) -> int:
    """Return how many ranks hold the weights together: `size`, or the most of it that divides the
    number of ranks, since a run may go on with another number."""
    return math.gcd(size, world)


def join_ranks(
    shards: WeightShards | None, *, can_tell: bool = True
) -> AbstractContextManager[None]:
    """Return `joint` of sharded weights; nothing where each rank holds all of them."""
    return nullcontext() if shards is None else shards.joint(can_tell=can_tell)
