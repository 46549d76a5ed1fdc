"""The frozen matrices of a layer's experts, and products of rows that are sorted by expert.

    ExpertGroups.from_choices(choices_TK, num_experts)     the rows of each expert
    DenseExpertWeight, NF4ExpertWeight, StackedMatrices    one matrix [O, I] per expert
    multiply_groups(x_RI, matrices, groups)                each row times the matrix of its expert

A 4-bit expert is dequantized where it is used, once in the forward and once in the backward, and no
wide copy is kept. Experts that no token chose cost nothing. Left out: which expert computes which
token, which the stock router decides; adapters and activations (experts.py). Legend: T tokens, K
experts per token, R = T K rows, E experts, I inputs, O outputs, H hidden."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.frozen_weight import NF4Weight
from tunesmith.model.packed_formats import Mxfp4ExpertWeight

GROUPED_ALIGNMENT = 8  # bf16 values: the grouped product reads rows of 16 bytes
SMALLEST_STEP = 16  # between numbers of rows of products that are compiled


@dataclass(frozen=True, eq=False)
class ExpertGroups:
    """The R = T K pairs of a token and an expert, sorted by expert.

    `order_R` are places in the pairs [T, K] as one list, `tokens_R` their tokens, `experts_R` their
    experts, `ends_E` the ends of the experts' rows. `ranges` are (expert, begin, end) of those that
    have rows."""

    shape: tuple[int, int]  # T, K
    order_R: Tensor
    tokens_R: Tensor
    experts_R: Tensor
    ends_E: Tensor
    ranges: tuple[tuple[int, int, int], ...]

    @classmethod
    def from_choices(cls, choices_TK: Tensor, num_experts: int) -> ExpertGroups:
        """Sort the choices of a router."""
        num_tokens, num_choices = choices_TK.shape
        chosen_R = choices_TK.flatten()
        order_R = chosen_R.argsort(stable=True)
        # not bincount, whose result has as many entries as the largest choice asks for
        counts_E = chosen_R.new_zeros(num_experts)
        counts_E.index_add_(0, chosen_R, torch.ones_like(chosen_R))
        ranges: list[tuple[int, int, int]] = []
        begin = 0
        for expert, count in enumerate(counts_E.tolist()):
            if count:
                ranges.append((expert, begin, begin + count))
            begin += count
        return cls(
            shape=(num_tokens, num_choices),
            order_R=order_R,
            tokens_R=order_R // num_choices,
            experts_R=chosen_R[order_R],
            ends_E=counts_E.cumsum(0).to(torch.int32),
            ranges=tuple(ranges),
        )

    def sum_by_token(self, rows_RH: Tensor) -> Tensor:
        """Return [T, H]: the sum of the rows of each token, always in the same order."""
        pairs_RH = torch.empty_like(rows_RH)
        pairs_RH[self.order_R] = rows_RH
        return pairs_RH.view(*self.shape, rows_RH.shape[1]).sum(1)

    def restore_order(self, values_R: Tensor) -> Tensor:
        """Return one value per pair as [T, K]."""
        pairs_R = torch.empty_like(values_R)
        pairs_R[self.order_R] = values_R
        return pairs_R.view(self.shape)


class ExpertMatrices(Protocol):
    """One matrix [O, I] per expert."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes E, O and I."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the products are computed."""
        ...

    @property
    def stacked(self) -> Tensor | None:
        """All matrices [E, O, I], None if only one at a time is in the dtype of the products."""
        ...

    def get_matrix(self, expert: int) -> Tensor:
        """Return the matrix [O, I] of an expert in the dtype of the products."""
        ...


@dataclass(frozen=True, eq=False)
class StackedMatrices:
    """Matrices in one tensor [E, O, I]."""

    stacked: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.stacked.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        num_experts, num_outputs, num_inputs = self.stacked.shape
        return num_experts, num_outputs, num_inputs

    def get_matrix(self, expert: int) -> Tensor:
        return self.stacked[expert]


class DenseExpertWeight:
    """Matrices as transformers stores them: [E, O, I], or [E, I, O] if `is_transposed`."""

    def __init__(self, parameter: nn.Parameter, *, is_transposed: bool = False) -> None:
        self.parameter = parameter
        self.is_transposed = is_transposed

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        num_experts, num_outputs, num_inputs = self.stacked.shape
        return num_experts, num_outputs, num_inputs

    @property
    def stacked(self) -> Tensor:
        weight = self.parameter.detach()
        return weight.transpose(1, 2) if self.is_transposed else weight

    def get_matrix(self, expert: int) -> Tensor:
        return self.stacked[expert]


class NF4ExpertWeight:
    """Each expert in 4 bits, as in NF4Weight.

    A matrix is quantized in `num_parts` equal parts of its rows: gate and up apart, as most files
    hold them, so that quantizing the tensors of a file gives the same values. Matrices of
    transposed stacks [E, I, O] are quantized as they are stored."""

    stacked = None

    def __init__(
        self,
        matrices: Iterable[Tensor],
        dtype: torch.dtype,
        *,
        num_parts: int,
        is_transposed: bool = False,
    ) -> None:
        """Quantize one expert after another; they need not be in memory together."""
        self.dtype = dtype
        self.is_transposed = is_transposed
        self.parts: list[list[NF4Weight]] = []
        sizes = (0, 0)
        for matrix in matrices:
            sizes = (matrix.shape[0], matrix.shape[1])
            parts = matrix.chunk(num_parts)
            self.parts.append([NF4Weight(part.contiguous(), dtype) for part in parts])
        num_outputs, num_inputs = reversed(sizes) if is_transposed else sizes
        self.shape = (len(self.parts), num_outputs, num_inputs)

    def get_matrix(self, expert: int) -> Tensor:
        parts = [part.weight for part in self.parts[expert]]
        matrix = parts[0] if len(parts) == 1 else torch.cat(parts)
        return matrix.t() if self.is_transposed else matrix


FrozenExperts = DenseExpertWeight | NF4ExpertWeight | Mxfp4ExpertWeight


# ---------------------------------------------------------------- products


def multiply_groups(x_RI: Tensor, matrices: ExpertMatrices, groups: ExpertGroups) -> Tensor:
    """Return [R, O]: each row times the transposed matrix of its expert, in the matrices' dtype."""
    if matrices.stacked is not None and can_group(x_RI, matrices.stacked):
        return F.grouped_mm(x_RI, matrices.stacked.transpose(1, 2), offs=groups.ends_E)
    y_RO = x_RI.new_empty(len(x_RI), matrices.shape[1], dtype=matrices.dtype)
    for expert, begin, end in groups.ranges:
        matrix_IO = matrices.get_matrix(expert).t()
        y_RO[begin:end] = _multiply_rows(x_RI, matrix_IO, begin, end)
    return y_RO


def multiply_groups_backward(
    dy_RO: Tensor, matrices: ExpertMatrices, groups: ExpertGroups
) -> Tensor:
    """Return [R, I]: each row of an output gradient times the matrix of its expert, in the
    matrices' dtype."""
    if matrices.stacked is not None and can_group(dy_RO, matrices.stacked):
        return F.grouped_mm(dy_RO, matrices.stacked, offs=groups.ends_E)
    dx_RI = dy_RO.new_empty(len(dy_RO), matrices.shape[2], dtype=matrices.dtype)
    for expert, begin, end in groups.ranges:
        dx_RI[begin:end] = _multiply_rows(dy_RO, matrices.get_matrix(expert), begin, end)
    return dx_RI


def sum_outer_products(outer_RO: Tensor, inner_RI: Tensor, groups: ExpertGroups) -> Tensor:
    """Return [E, O, I]: the sum of outer^T inner over the rows of each expert, 0 without rows; in
    the wider of both dtypes."""
    dtype = torch.promote_types(outer_RO.dtype, inner_RI.dtype)
    shape = (len(groups.ends_E), outer_RO.shape[1], inner_RI.shape[1])
    sums_EOI = outer_RO.new_zeros(shape, dtype=dtype)
    for expert, begin, end in groups.ranges:
        outer_OR = outer_RO[begin:end].to(dtype).t()
        torch.mm(outer_OR, inner_RI[begin:end].to(dtype), out=sums_EOI[expert])
    return sums_EOI


def _multiply_rows(x_RI: Tensor, matrix_IO: Tensor, begin: int, end: int) -> Tensor:
    window, rows = choose_window(x_RI, begin, end)
    return (x_RI[window].to(matrix_IO.dtype) @ matrix_IO)[rows]


def can_group(x: Tensor, stacked: Tensor) -> bool:
    """Return whether torch's grouped product, new in 2.10, takes these: bf16 on CUDA, in rows
    of 16 bytes. On a CPU it is a loop over the experts too."""
    if not hasattr(F, "grouped_mm"):
        return False
    is_aligned = all(size % GROUPED_ALIGNMENT == 0 for size in stacked.shape[1:])
    return x.is_cuda and x.dtype == stacked.dtype == torch.bfloat16 and is_aligned


def choose_window(x_RI: Tensor, begin: int, end: int) -> tuple[slice, slice]:
    """Return the rows to multiply for those from `begin` to `end`, and where these are in them.

    oneDNN compiles a bf16 product for each number of rows, which takes 2 ms and memory that is not
    returned. So on a CPU the rows of neighbors fill it up to one of a few numbers."""
    count = end - begin
    if x_RI.dtype != torch.bfloat16 or x_RI.device.type != "cpu":
        return slice(begin, end), slice(0, count)
    step = max(SMALLEST_STEP, 2 ** (count - 1).bit_length() // 8)
    size = min(len(x_RI), -(-count // step) * step)
    start = min(begin, len(x_RI) - size)
    return slice(start, start + size), slice(begin - start, end - start)
