"""Frozen weights that several ranks hold together: each has a part of every layer's bytes.

    shards = WeightShards(ranks, size=4)
    shards.add_layer(layer)           keep this rank's part of a layer that is loaded
    shards.attach(decoder.layers)     gather a layer before it runs, forward or backward
    with shards.joint(): ...          all ranks compute, each what it has to
    shards.serve(layer)               give rank 0 a layer, which computes alone

One layer is complete at a time; the next one takes its place. Its weights are views of one buffer,
whose storage is empty in between, so that modules keep their tensors. An all-gather needs all
ranks, and they rarely compute the same: their packs differ in number, and rank 0 alone evaluates.
So nothing is assumed about what another rank does next. Inside `joint` the ranks take rounds: each
says which layer it needs, or that it is done, and all gather those layers. Outside, rank 0 asks by
command.

In: decoder layers whose weights are loaded. Out: the same layers, and the same bits in every
product. Left out: embeddings, head and last norm, which each rank holds; what is trained; gathering
the next layer while one computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import MachineError
from tunesmith.core.ranks import RankFailed, Ranks
from tunesmith.model.lora import QuantizedLinear

GATHER = "gather"  # the command of rank 0 outside of `joint`
GATHER_NAME = "gather_before_forward"  # attribute of a sharded layer
ALIGNMENT = 16  # bytes at which a weight begins
DONE = 0  # words of a round, beside 1 + the number of a layer
FAILED = -1


class LayerShard:
    """The frozen weights of one layer: `part_B` is this rank's part of their bytes."""

    def __init__(self, tensors: Sequence[Tensor], ranks: Ranks, size: int) -> None:
        """Keep this rank's part of the tensors, of `size` parts; they become views of a buffer."""
        offsets, part = _lay_out([tensor.nbytes for tensor in tensors], size)
        begin = part * (ranks.rank % size)
        self.ranks = ranks
        self.size = size
        self.full_B = torch.zeros(part * size, dtype=torch.uint8, device=tensors[0].device)
        for tensor, offset in zip(tensors, offsets, strict=True):
            flat_B = self.full_B[offset : offset + tensor.nbytes]
            view = flat_B.view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            tensor.data = view
        self.part_B = self.full_B[begin : begin + part].clone()
        self.release()

    def reserve(self) -> None:
        """Take the memory for the parts of all ranks."""
        self.full_B.untyped_storage().resize_(self.full_B.numel())

    def gather(self) -> None:
        """Fill the memory. All ranks of the group call it."""
        # through `.data`: autograd counts no change of the weights, whose values are the same
        self.ranks.gather_parts(self.full_B.data, self.part_B, size=self.size)

    def release(self) -> None:
        """Give the memory back. The weights must not be read until they are gathered again."""
        self.full_B.untyped_storage().resize_(0)


def _lay_out(sizes: Sequence[int], size: int) -> tuple[list[int], int]:
    """Return where tensors of so many bytes begin in a buffer, and the bytes of each part of it."""
    offsets: list[int] = []
    end = 0
    for num_bytes in sizes:
        offsets.append(end)
        end += math.ceil(num_bytes / ALIGNMENT) * ALIGNMENT
    return offsets, math.ceil(end / size / ALIGNMENT) * ALIGNMENT


class WeightShards:
    """The sharded layers of a network, of which at most one is complete. Groups of `size`
    neighboring ranks hold the weights once."""

    def __init__(self, ranks: Ranks, size: int) -> None:
        """Form the groups. All ranks call it."""
        ranks.form_groups(size)
        self.ranks = ranks
        self.size = size
        self.layers: list[LayerShard] = []
        self._complete: LayerShard | None = None
        self._is_joint = False
        self._is_exchanging = False
        self._hooks: list[Any] = []

    def add_layer(self, layer: nn.Module) -> None:
        """Keep this rank's part of the frozen weights of the next layer."""
        self.layers.append(LayerShard(list(list_frozen(layer)), self.ranks, self.size))

    def find_part_rows(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, range]:
        """Return the rows of each tensor of a layer that this rank's part needs. `sizes` are those
        of its tensors in the order of the layer: rows, and bytes of a row."""
        num_bytes = [rows * row_bytes for rows, row_bytes in sizes.values()]
        offsets, part = _lay_out(num_bytes, self.size)
        begin = part * (self.ranks.rank % self.size)
        rows_by_name: dict[str, range] = {}
        for offset, (name, (rows, row_bytes)) in zip(offsets, sizes.items(), strict=True):
            first = min(max(0, begin - offset) // row_bytes, rows)
            last = min(math.ceil(max(0, begin + part - offset) / row_bytes), rows)
            rows_by_name[name] = range(first, last)
        return rows_by_name

    def attach(self, layers: Iterable[nn.Module]) -> None:
        """Let each layer gather its weights before its forward and before its backward."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for index, layer in enumerate(layers):
            before, after = _make_hooks(self, index)
            self._hooks.append(layer.register_forward_pre_hook(before))
            self._hooks.append(layer.register_forward_hook(after))
            setattr(layer, GATHER_NAME, before)

    # ------------------------------------------------------------ who gathers when

    def gather(self, index: int) -> None:
        """Complete a layer, in the place of the one before."""
        layer = self.layers[index]
        if layer is self._complete:
            return
        self.release()
        layer.reserve()  # before the others wait for this rank
        self._complete = layer
        if self._is_joint:
            self._run_round(1 + index)
            return
        assert self.ranks.is_main, "the other ranks compute in `joint` only"
        self.ranks.send(GATHER, layer=index)
        layer.gather()

    def serve(self, index: int) -> None:
        """Join rank 0 in gathering a layer, if this rank is of its group."""
        if self.ranks.rank < self.size:
            self._pass_on(index)

    def _pass_on(self, index: int) -> None:
        """Gather a layer that this rank does not need."""
        layer = self.layers[index]
        layer.reserve()
        layer.gather()
        layer.release()

    def release(self) -> None:
        """Keep this rank's parts alone."""
        if self._complete is not None:
            self._complete.release()
        self._complete = None

    @contextmanager
    def joint(self) -> Iterator[None]:
        """Compute on all ranks; leave when those of the group have finished. All ranks call it.

        Raise RankFailed if another rank has left with an error."""
        self._is_joint = True
        self._is_exchanging = False
        try:
            yield
            self.release()
            while self._run_round(DONE):
                pass
        except BaseException:  # Ctrl-C, too: the others would wait for this rank's next round
            if not self._is_exchanging:  # else they wait for another message
                self._exchange_words(FAILED)
            raise
        finally:
            self._is_joint = False
            self.release()

    def _run_round(self, word: int) -> bool:
        """Gather the layers that the ranks need; return whether any needs one."""
        if self._is_exchanging:
            message = "a layer that another rank needs did not fit in memory"
            raise MachineError(message, where=self.ranks.name, fix="lower pack_length")
        self._is_exchanging = True
        words = self._exchange_words(word)
        if FAILED in words:
            raise RankFailed("another rank cannot go on", fix="see its message")
        for index in sorted({other - 1 for other in words if other != DONE}):
            if word == 1 + index:
                self.layers[index].gather()
            else:
                self._pass_on(index)
        self._is_exchanging = False
        return any(words)

    def _exchange_words(self, word: int) -> list[int]:
        words = torch.zeros(self.size, dtype=torch.int64)
        self.ranks.gather_parts(words, torch.tensor([word]), size=self.size)
        return words.tolist()


def _make_hooks(shards: WeightShards, index: int) -> tuple[Any, Any]:
    """Return the hooks of a layer. They are functions, which a copy of the layer shares."""

    def gather_before_forward(_layer: nn.Module, _inputs: Any) -> None:
        shards.gather(index)

    def gather_before_backward(_layer: nn.Module, _inputs: Any, outputs: Any) -> None:
        output: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        if output.requires_grad:
            output.register_hook(lambda _gradient: shards.gather(index))

    return gather_before_forward, gather_before_backward


def gather_weights(module: nn.Module) -> None:
    """Gather the weights of a module, if it is a sharded layer: for code that reads them itself."""
    gather = getattr(module, GATHER_NAME, None)
    if gather is not None:
        gather(module, ())


def list_frozen(layer: nn.Module) -> Iterator[Tensor]:
    """Yield the frozen tensors of a layer, plain or in 4 bits."""
    for module in layer.modules():
        if isinstance(module, QuantizedLinear):
            yield from module.frozen.list_tensors()
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                yield parameter


def count_sharing_ranks(size: int, world: int) -> int:
    """Return how many ranks hold the weights together: `size`, or the most of it that divides the
    number of ranks, since a run may go on with another number."""
    return math.gcd(size, world)


def join_ranks(shards: WeightShards | None) -> AbstractContextManager[None]:
    """Return `joint` of sharded weights; nothing where each rank holds all of them."""
    return nullcontext() if shards is None else shards.joint()
