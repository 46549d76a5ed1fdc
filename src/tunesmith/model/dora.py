"""DoRA: the row lengths of an adapted weight are trained separately from the directions.

    y = g * (W x + s B A x) + b,    g = m / ||W + s B A||    (norms of rows; m starts as ||W||)

In: a frozen weight with its adapter and magnitudes m. Out: a `DoraScale`, which is g with its
forward and backward. The norms are constants in the backward, as in the paper (Liu 2024, section
4.3) and in PEFT. They are computed from

    ||W + s B A||^2 = ||W||^2 + 2 s (W A^T . B) + s^2 (B A A^T . B)

so that no [O, I] matrix is created: one product of W with the R rows of A per update of the
weights. Legend: N rows, I inputs, O outputs, R rank."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.model.frozen_weight import FrozenWeight
from tunesmith.model.kernels import ops


def compute_squared_norms(weight_OI: Tensor) -> Tensor:
    """Return ||W||^2 of each row [O], in fp32 or wider."""
    accum_dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    return torch.linalg.vector_norm(weight_OI, dim=1, dtype=accum_dtype) ** 2


def compute_row_norms(
    frozen: FrozenWeight,
    squares_O: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return ||W + s B A|| of each row [O] in the dtype of A. Products with W run in `dtype`."""
    cross_OR = frozen.compute_outputs(a_RI.to(dtype), None).t().to(a_RI.dtype)
    gram_OR = b_OR @ (a_RI @ a_RI.t())
    adapter_O = ((2 * scale * cross_OR + scale**2 * gram_OR) * b_OR).sum(1)
    return (squares_O + adapter_O).clamp(min=0).sqrt()


class DoraScale:
    """The factor g [O] of one linear. A row of zeros has no direction: its g is 0."""

    def __init__(self, magnitude_O: Tensor, norms_O: Tensor) -> None:
        zero = magnitude_O.new_zeros(())
        self.scale_O = torch.where(norms_O > 0, magnitude_O / norms_O, zero)
        self.inverse_O = torch.where(magnitude_O != 0, 1 / magnitude_O, zero)

    def forward(self, v_NO: Tensor) -> Tensor:
        """Return g * v, which may be v changed in place."""
        return ops.scale_columns(v_NO, self.scale_O)

    def backward(self, du_NO: Tensor, u_NO: Tensor) -> tuple[Tensor, Tensor]:
        """Return dv and dm, from u = g * v: dm = sum of du * v / norm = sum of du * u / m."""
        dv_NO, sums_O = ops.scale_columns_backward(du_NO, u_NO, self.scale_O)
        return dv_NO, sums_O * self.inverse_O
