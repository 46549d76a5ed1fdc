"""One layer whose weights several ranks hold together: each has an equal part of their bytes.

    LayerShard(tensors, ranks, size)        frozen weights
    TrainedShard(parameters, ranks, size)   master weights: this rank updates its part of them

The weights are views of one buffer, whose storage is empty until an all-gather fills it. Of master
weights, a rank also has the pieces of each parameter that lie in its part, as parameters of the
optimizer; a reduce-scatter gives them the sum of all gradients. In: weights that are loaded. Out:
the same tensors, and the same bits in every product. Left out: when a layer is gathered
(weight_shards.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from tunesmith.core.errors import MachineError
from tunesmith.core.ranks import Ranks
from tunesmith.model.lora import Fp32MasterLinear

ALIGNMENT = 16  # bytes at which a weight begins
SPAN = "span_of_values"  # attributes of a piece: its values in the parameter, and that one's shape
SHAPE = "complete_shape"


class LayerShard:
    """The weights of one layer: `part_B` is this rank's part of their bytes."""

    def __init__(self, tensors: Sequence[Tensor], ranks: Ranks, size: int) -> None:
        """Keep this rank's part of the tensors, of `size` parts; they become views of a buffer."""
        self.offsets, part = lay_out([tensor.nbytes for tensor in tensors], size)
        self.begin = part * (ranks.rank % size)
        self.ranks = ranks
        self.size = size
        self.full_B = torch.zeros(part * size, dtype=torch.uint8, device=tensors[0].device)
        for tensor, offset in zip(tensors, self.offsets, strict=True):
            flat_B = self.full_B[offset : offset + tensor.nbytes]
            view = flat_B.view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            tensor.data = view
        self.part_B = self.full_B[self.begin : self.begin + part].clone()
        self._wait: Callable[[], None] | None = None  # for a gather that has started
        self.release()

    def reserve(self) -> None:
        """Take the memory for the parts of all ranks, unless it is there."""
        _fill_storage(self.full_B)

    def start_gather(self) -> None:
        """Let the memory be filled while others compute. All ranks of the group call it."""
        # through `.data`: autograd counts no change of the weights, whose values are the same
        self._wait = self.ranks.start_gather(self.full_B.data, self.part_B, size=self.size)

    def gather(self) -> None:
        """Fill the memory. All ranks of the group call it, unless a gather has started."""
        if self._wait is None:
            self.ranks.gather_parts(self.full_B.data, self.part_B, size=self.size)
        else:
            self._wait()
            self._wait = None
        self.is_complete = True

    def release(self) -> None:
        """Give the memory back. The weights must not be read until they are gathered again."""
        if self._wait is not None:  # for parts that come would be written into it
            with suppress(MachineError):  # of a rank that is gone, which the next message tells
                self._wait()
            self._wait = None
        self.full_B.untyped_storage().resize_(0)
        self.is_complete = False


class TrainedShard(LayerShard):
    """The master weights of one layer. `pieces` are this rank's values of each parameter, which may
    be none; those of a matrix have two dimensions, as the optimizer tells what decays.

    `has_gradient` says which parameters have had a gradient on this rank since it was cleared."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks, size: int) -> None:
        self._casts: list[tuple[Tensor, Tensor]] = []  # weight, copy in the dtype of products
        super().__init__(parameters, ranks, size)
        self.parameters = list(parameters)
        self.dtype = self.parameters[0].dtype
        self.has_gradient = [False] * len(self.parameters)
        self._part = self.part_B.view(self.dtype)
        self._spans: list[slice] = []  # of the pieces in this rank's part
        self.pieces: list[nn.Parameter] = []
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            start = (offset - self.begin) // self.dtype.itemsize  # of the parameter in this part
            first = min(max(-start, 0), parameter.numel())
            last = max(first, min(parameter.numel(), len(self._part) - start))
            span = slice(start + first, start + last) if last > first else slice(0, 0)
            shape = (last - first, 1) if parameter.ndim > 1 else (last - first,)
            piece = nn.Parameter(self._part[span].view(shape))
            setattr(piece, SPAN, slice(first, last))
            setattr(piece, SHAPE, parameter.shape)
            self._spans.append(span)
            self.pieces.append(piece)

    def cast_with(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Let the copies of the weights in the dtype of products come and go with the weights."""
        self._casts = []
        if dtype == self.dtype:
            return
        for module in layer.modules():
            if isinstance(module, Fp32MasterLinear):
                copy = torch.empty_like(module.weight, dtype=dtype, requires_grad=False)
                copy.untyped_storage().resize_(0)
                module.cast_into(copy)
                self._casts.append((module.weight, copy))

    def reserve(self) -> None:
        super().reserve()
        for _, copy in self._casts:
            _fill_storage(copy)

    def gather(self) -> None:
        super().gather()
        for weight, copy in self._casts:
            copy.data.copy_(weight.detach())

    def release(self) -> None:
        super().release()
        for _, copy in self._casts:
            copy.untyped_storage().resize_(0)

    @property
    def is_summed(self) -> bool:
        """Whether no gradient waits on this rank to be summed."""
        return all(parameter.grad is None for parameter in self.parameters)

    def sum_gradients(self) -> None:
        """Add the gradients of all ranks of the group to those of the pieces. All of them call it,
        with gradients or without."""
        flat = self._part.new_zeros(len(self._part) * self.size)
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                start = self.offsets[index] // self.dtype.itemsize
                flat[start : start + parameter.numel()] = parameter.grad.flatten()
                parameter.grad = None
                self.has_gradient[index] = True
        part = torch.empty_like(self._part)
        self.ranks.reduce_parts(part, flat, size=self.size)
        for piece, span in zip(self.pieces, self._spans, strict=True):
            gradient = part[span].view_as(piece)
            piece.grad = gradient if piece.grad is None else piece.grad.add_(gradient)

    def gather_values(
        self, get_value: Callable[[nn.Parameter], Tensor | None]
    ) -> Mapping[int, Tensor]:
        """Return a value of each parameter in its complete shape, by its number, from those of the
        pieces: None has none. All ranks of the group call it."""
        values = [get_value(piece) for piece in self.pieces]
        part = torch.zeros_like(self._part)
        for value, span in zip(values, self._spans, strict=True):
            if value is not None:
                part[span] = value.detach().flatten()
        full = part.new_empty(len(part) * self.size)
        self.ranks.gather_parts(full, part, size=self.size)
        complete: dict[int, Tensor] = {}
        for index, parameter in enumerate(self.parameters):
            if values[index] is not None:
                start = self.offsets[index] // self.dtype.itemsize
                flat = full[start : start + parameter.numel()]
                complete[index] = flat.view(parameter.shape)
        return complete


def _fill_storage(tensor: Tensor) -> None:
    """Give an empty storage its bytes. To resize one that has them would move it, away from a
    gather that writes into it."""
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes:
        storage.resize_(tensor.nbytes)


def lay_out(sizes: Iterable[int], size: int) -> tuple[list[int], int]:
    """Return where tensors of so many bytes begin in a buffer, and the bytes of each part of it."""
    offsets: list[int] = []
    end = 0
    for num_bytes in sizes:
        offsets.append(end)
        end += math.ceil(num_bytes / ALIGNMENT) * ALIGNMENT
    return offsets, math.ceil(end / size / ALIGNMENT) * ALIGNMENT


def cut_piece(parameter: nn.Parameter, complete: Tensor) -> Tensor:
    """Return this rank's values of a complete tensor: all, unless `parameter` is a piece."""
    span = getattr(parameter, SPAN, None)
    return complete if span is None else complete.flatten()[span].view(parameter.shape)


def get_complete_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, of a piece that of the whole."""
    return getattr(parameter, SHAPE, parameter.shape)
