"""The low-rank products of adapters on a GPU: few kernels, and one cast per update.

`AdapterBuffer` keeps all A and B of a network in one fp32 buffer and their copies for products in
another, which is cast at once after an update. The A of linears that share an input are neighbors
in it, so they are one matrix: `StackedAdapters` computes z and the gradients of A of all of them in
one product each. Sums of gradients are fp32 and not rounded. Left out: dropout (the path of single
linears in lora.py, which is the reference). Legend: N rows, I inputs, O outputs, R rank; z is
scale * A x [N, R], for all linears side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.kernels.lora import Adapter


class AdapterBuffer:
    """All A and B of some LoraLinears, in their order. Parameters become views of `masters`."""

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        parameters: list[nn.Parameter] = []
        for name in ("lora_A", "lora_B"):
            parameters += [getattr(layer, name) for layer in layers]
        self.masters = torch.cat([parameter.detach().flatten() for parameter in parameters])
        # products in the dtype of the masters read them
        is_same = dtype == self.masters.dtype
        self._casts = self.masters if is_same else torch.empty_like(self.masters, dtype=dtype)
        self._cast_by_id: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        self._parameters = parameters
        ends = accumulate(parameter.numel() for parameter in parameters)
        for parameter, end in zip(parameters, ends, strict=True):
            span = slice(end - parameter.numel(), end)
            parameter.data = self.masters[span].view(parameter.shape)
            self._cast_by_id[id(parameter)] = self._casts[span].view(parameter.shape)
        self.update()

    @property
    def dtype(self) -> torch.dtype:
        return self._casts.dtype

    @torch.no_grad()
    def update(self) -> None:
        """Cast everything."""
        if self._casts is not self.masters:
            self._casts.copy_(self.masters)
        self._versions = {id(parameter): parameter._version for parameter in self._parameters}

    def cast(self, parameter: nn.Parameter) -> Tensor:
        """Return the copy of a parameter for products. It is cast anew, with all others, if the
        parameter has another version: code that changes one behind autograd's back, as through
        `.data`, has to increment it."""
        if parameter._version != self._versions[id(parameter)]:
            self.update()
        return self._cast_by_id[id(parameter)]


class StackedAdapters:
    """The adapters of linears on one input, None for a linear without one. The functions are those
    of PackedAdapters; lists are aligned with the linears."""

    def __init__(self, adapters: Sequence[Adapter | None], grad_dtype: torch.dtype) -> None:
        self.grad_dtype = grad_dtype
        self.adapters = adapters
        ranks = [len(adapter[0]) if adapter else 0 for adapter in adapters]
        ends = accumulate(ranks)
        self.columns = [slice(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]
        self.scales = {adapter[2] for adapter in adapters if adapter}
        self.a = stack_rows([adapter[0] for adapter in adapters if adapter])

    def compute_inner(self, x_NI: Tensor) -> Tensor:
        """Return z of all linears."""
        z = x_NI.new_empty(len(x_NI), len(self.a))
        if len(self.scales) == 1:
            return z.addmm_(x_NI, self.a.t(), beta=0, alpha=next(iter(self.scales)))
        for adapter, columns in self._iter_adapters():
            z[:, columns].addmm_(x_NI, adapter[0].t(), beta=0, alpha=adapter[2])
        return z

    def add_outputs(self, outputs: Sequence[Tensor], z: Tensor) -> None:
        """Add B z to the output of each linear in place."""
        for y, adapter, columns in zip(outputs, self.adapters, self.columns, strict=True):
            if adapter:
                y.addmm_(z[:, columns], adapter[1].t())

    def outputs_backward(
        self, gradients: Sequence[Tensor], z: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return dz, which includes the scale, and the gradient of each B, from each dy."""
        dz = torch.empty_like(z)
        dbs: list[Tensor | None] = []
        for dy, adapter, columns in zip(gradients, self.adapters, self.columns, strict=True):
            if adapter is None:
                dbs.append(None)
                continue
            _, b, scale = adapter
            dz[:, columns].addmm_(dy, b, beta=0, alpha=scale)
            dbs.append(multiply_wide(dy.t(), z[:, columns], self.grad_dtype))
        return dz, dbs

    def add_inputs(self, dx_NI: Tensor, dz: Tensor) -> None:
        """Add dz A of all linears to dx in place."""
        dx_NI.addmm_(dz, self.a)

    def inputs_backward(self, x_NI: Tensor, dz: Tensor) -> list[Tensor | None]:
        """Return the gradient of each A."""
        da = multiply_wide(dz.t(), x_NI, self.grad_dtype)
        das: list[Tensor | None] = []
        for adapter, rows in zip(self.adapters, self.columns, strict=True):
            das.append(da[rows] if adapter else None)
        return das

    def _iter_adapters(self) -> list[tuple[Adapter, slice]]:
        pairs = zip(self.adapters, self.columns, strict=True)
        return [(adapter, columns) for adapter, columns in pairs if adapter]


def stack_rows(matrices: Sequence[Tensor]) -> Tensor:
    """Return matrices [R, I] as one: a view if they are neighbors in one buffer, else a copy."""
    if len(matrices) == 1:
        return matrices[0]
    base = matrices[0]._base
    start = end = matrices[0].storage_offset()
    for matrix in matrices:
        if matrix._base is not base or matrix.storage_offset() != end:
            base = None
        end += matrix.numel()
    if base is None:
        return torch.cat(list(matrices))
    return base[start:end].view(-1, matrices[0].shape[1])


def multiply_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in a wider dtype, in which it is also summed."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda" and torch.version.hip is None:  # torch for ROCm refuses it
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def bundle_adapters(layers: Sequence[Any], dtype: torch.dtype) -> None:
    """Give LoraLinears a common buffer, in place."""
    if layers:
        buffer = AdapterBuffer(layers, dtype)
        for layer in layers:
            layer.buffer = buffer
