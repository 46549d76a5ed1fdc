"""A frozen weight [O, I] and its two products: outputs from inputs, and input gradients from output gradients.

`Plain` keeps the weight as it is stored. `Blocked` keeps it twice, in the layouts that oneDNN's bf16 products read,
which they would otherwise make anew in every product: 10-15% faster for a thousand rows, about twice for eight, and to
the bit the same (benchmarks/gemm.py). The second copy is made by the first backward.
Legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def blocks_here() -> bool:
    """Do this torch and this processor have oneDNN's bf16 products?"""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Plain:
    def __init__(self, weight_OI: Tensor) -> None:
        self.weight = weight_OI

    def outputs(self, x_NI: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x_NI, self.weight, bias)

    def input_gradient(self, dy_NO: Tensor, into: Tensor | None) -> Tensor:
        """dy W, added to `into` in place where that is given."""
        return dy_NO @ self.weight if into is None else into.addmm_(dy_NO, self.weight)


class Blocked:
    """bf16 on the CPU only; see `blocks_here`."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._forward = _blocked(weight_OI)
        self._backward: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as it was, made anew at each call."""
        return self._forward.to_dense()

    def outputs(self, x_NI: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_NI, self._forward, bias, "none", [], "")

    def input_gradient(self, dy_NO: Tensor, into: Tensor | None) -> Tensor:
        if self._backward is None:
            self._backward = _blocked(self.weight.t().contiguous())
        if into is None:
            return torch.ops.mkldnn._linear_pointwise(dy_NO, self._backward, None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(dy_NO, into, self._backward, None, "add")


def _blocked(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)
