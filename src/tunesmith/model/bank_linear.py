"""Linears whose rows have different adapters, or none: what an AdapterBank puts in the place of a
base's linears.

`RowAdapters` is the one object that all of them share. It says which adapter each row of the
current forward has; adapter_bank.py sets it. A row with adapter (A, B, s) gets

    y = W x + b + s B A x,    with DoRA y = g * (W x + s B A x) + b

and a row without one gets W x + b. In bf16 on a CPU lora.c does it in one call for all linears of
an input; torch does it adapter by adapter elsewhere, and is the reference. Left out: gradients,
adapter files (save.py). Legend: N rows, I inputs, O outputs, R rank, n rows of one adapter."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.frozen_weight import (
    BlockedWeight,
    DenseWeight,
    FrozenWeight,
    has_onednn_bf16,
)
from tunesmith.model.kernels import lora
from tunesmith.model.kernels.lora import FactorsTable, PackedFactors, PackedGroup, PackedRows


@dataclass(frozen=True, eq=False)
class TorchFactors:
    """The adapter of one linear for torch. DoRA has a gain g, and for a linear with a bias the
    offset b - g * b, both in fp32 or wider."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    gain_O: Tensor | None = None
    offset_O: Tensor | None = None

    @property
    def nbytes(self) -> int:
        tensors = [self.a_RI, self.b_OR, self.gain_O, self.offset_O]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def add_output(self, y_NO: Tensor, x_NI: Tensor, rows_n: Tensor) -> None:
        """Change the outputs of some rows from W x + b to those with the adapter, in place."""
        z = F.linear(x_NI.index_select(0, rows_n), self.a_RI)
        y_nO = y_NO.index_select(0, rows_n).addmm_(z, self.b_OR.t(), alpha=self.scale)
        if self.gain_O is not None:
            wide_nO = y_nO * self.gain_O
            y_nO = wide_nO if self.offset_O is None else wide_nO + self.offset_O
        y_NO.index_copy_(0, rows_n, y_nO.to(y_NO.dtype))


Factors = TorchFactors | PackedFactors


class ScaledAdapter:
    """An adapter at one scale: the factors of each linear of the bank, None for those without."""

    def __init__(self, factors: Sequence[Factors | None]) -> None:
        packed = [f if isinstance(f, PackedFactors) else None for f in factors]
        self.table = FactorsTable(packed)
        self.torch_factors: Mapping[int, TorchFactors] = {
            index: f for index, f in enumerate(factors) if isinstance(f, TorchFactors)
        }


class ForwardRows:
    """The rows of a forward by adapter; those of the base are in no group."""

    def __init__(self, num_rows: int, groups: Sequence[tuple[ScaledAdapter, Tensor]]) -> None:
        self.num_rows = num_rows
        self.groups = groups

    @functools.cached_property
    def packed(self) -> PackedRows:
        """The rows for lora.c. Only its linears ask for them: on a GPU, packing them would wait for
        the device."""
        return PackedRows([(adapter.table, rows_n) for adapter, rows_n in self.groups])


class RowAdapters:
    """Which adapter each row of the current forward has."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._adapters: tuple[ScaledAdapter, ...] = ()
        self._adapter_T = torch.empty(0, dtype=torch.long)
        self._all_rows: ForwardRows | None = None
        self._pruned_rows: ForwardRows | None = None

    def assign(self, adapters: Sequence[ScaledAdapter], adapter_T: Tensor) -> None:
        """Give each token of the next forwards an adapter by its index; -1 is the base."""
        self._adapters = tuple(adapters)
        self._adapter_T = adapter_T
        self._all_rows = self._group(adapter_T)
        self._pruned_rows = None

    def clear(self) -> None:
        """Let every row run without an adapter again."""
        self._all_rows = None
        self._pruned_rows = None

    def keep_positions(self, positions: Tensor | None) -> None:
        """Announce which tokens the end of a pruned last layer computes; None: all."""
        if self._all_rows is not None:
            self._pruned_rows = self._all_rows
            if positions is not None:
                self._pruned_rows = self._group(self._adapter_T[positions.cpu()])

    def get(self, *, is_pruned: bool) -> ForwardRows | None:
        """Return the rows that a linear sees, None if all are the base's."""
        return self._pruned_rows if is_pruned else self._all_rows

    def _group(self, adapter_N: Tensor) -> ForwardRows:
        groups: list[tuple[ScaledAdapter, Tensor]] = []
        for index, adapter in enumerate(self._adapters):
            rows_n = (adapter_N == index).nonzero()[:, 0]
            if len(rows_n):
                groups.append((adapter, rows_n.to(self.device)))
        return ForwardRows(len(adapter_N), groups)


class BankLinear(nn.Module):
    """A frozen linear [O, I] whose rows have the adapters in `row_adapters`.

    `index` is its place in the bank; `is_pruned`: it runs on the positions that the last layer
    keeps."""

    def __init__(
        self,
        base: Any,
        index: int,
        row_adapters: RowAdapters,
        dtype: torch.dtype,
        *,
        is_pruned: bool,
    ) -> None:
        """Take the weight of `base`, an nn.Linear or a QuantizedLinear, and block it where the
        machine has faster products for that."""
        super().__init__()
        self.out_features: int = base.out_features
        self.in_features: int = base.in_features
        weight = base.weight.detach()
        is_bf16_cpu = dtype == torch.bfloat16 and weight.device.type == "cpu"
        self.frozen: FrozenWeight
        if not isinstance(base, nn.Linear):
            self.frozen = base.frozen
        elif is_bf16_cpu and has_onednn_bf16():
            self.frozen = BlockedWeight(weight)
        else:
            self.frozen = DenseWeight(weight)
        self.bias: nn.Parameter | None = base.bias
        self.index = index
        self.row_adapters = row_adapters
        self.is_pruned = is_pruned
        is_even = not (self.in_features % 2 or self.out_features % 2)
        self.has_kernel = is_bf16_cpu and is_even and lora.is_available()
        self._group: BankLinearGroup | None = None

    @property
    def weight(self) -> Tensor:
        return self.frozen.weight

    def get_group(self, linears: Sequence[Any]) -> BankLinearGroup:
        """Return the linears that share this one's input, which is always the same list."""
        if self._group is None or self._group.linears != linears:
            self._group = BankLinearGroup(linears)
        return self._group

    def forward(self, x: Tensor) -> Tensor:
        (y,), _ = self.get_group([self]).forward(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"({self.out_features}, {self.in_features}), bank"


class BankLinearGroup:
    """Linears of a bank that share one input, in the place of a LinearGroup; forward only."""

    parameters: tuple[Tensor, ...] = ()
    needs_input = False

    def __init__(self, linears: Sequence[BankLinear]) -> None:
        self.linears = list(linears)
        self._packed = [linear for linear in linears if linear.has_kernel]
        entries = [linear.index for linear in self._packed]
        self._kernel = PackedGroup(entries, [linear.out_features for linear in self._packed])

    def forward(self, x_NI: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the outputs, and nothing for a backward."""
        outputs: list[Tensor] = []
        for linear in self.linears:
            bias = None if linear.bias is None else linear.bias.detach().to(x_NI.dtype)
            outputs.append(linear.frozen.compute_outputs(x_NI, bias))
        first = self.linears[0]
        rows = first.row_adapters.get(is_pruned=first.is_pruned)
        if rows is None:
            return outputs, []
        assert rows.num_rows == len(x_NI), "a linear has other rows than the forward"
        self._run_kernel(outputs, x_NI, rows)
        for adapter, rows_n in rows.groups:
            if adapter.torch_factors:
                for linear, y_NO in zip(self.linears, outputs, strict=True):
                    if factors := adapter.torch_factors.get(linear.index):
                        factors.add_output(y_NO, x_NI, rows_n)
        return outputs, []

    def _run_kernel(self, outputs: Sequence[Tensor], x_NI: Tensor, rows: ForwardRows) -> None:
        if not self._packed or not rows.groups:
            return
        pairs = zip(self.linears, outputs, strict=True)
        packed_outputs = [y_NO for linear, y_NO in pairs if linear.has_kernel]
        self._kernel.add_outputs(packed_outputs, x_NI.contiguous(), rows.packed)
