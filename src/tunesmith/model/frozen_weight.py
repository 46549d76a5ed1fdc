"""A frozen weight [O, I] and its two products: outputs from inputs, and input gradients from output
gradients.

`Plain` keeps the weight as it is stored. `Blocked` keeps it twice, in the layouts that oneDNN's
bf16 products read, which they would otherwise make anew in every product: 10-15% faster for a
thousand rows, about twice for eight, and to the bit the same (benchmarks/vs_trl/gemm.py). The
second copy is made by the first backward. `Nf4` keeps it in 4 bits and widens it for each product.
Legend: N rows, I inputs, O outputs."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import InputError

NF4_BLOCK = 64  # weights that share a scale


@functools.cache
def has_onednn_bf16() -> bool:
    """Do this torch and this processor have oneDNN's bf16 products?"""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class DenseWeight:
    def __init__(self, weight_OI: Tensor) -> None:
        self.weight = weight_OI

    def compute_outputs(self, x_NI: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x_NI, self.weight, bias)

    def compute_input_grad(self, dy_NO: Tensor, into: Tensor | None) -> Tensor:
        """dy W, added to `into` in place where that is given."""
        return dy_NO @ self.weight if into is None else into.addmm_(dy_NO, self.weight)


class BlockedWeight:
    """bf16 on the CPU only; see `blocks_here`."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._forward_weight = _reorder_weight(weight_OI)
        self._backward_weight: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as it was, made anew at each call."""
        return self._forward_weight.to_dense()

    def compute_outputs(self, x_NI: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_NI, self._forward_weight, bias, "none", [], "")

    def compute_input_grad(self, dy_NO: Tensor, into: Tensor | None) -> Tensor:
        if self._backward_weight is None:
            self._backward_weight = _reorder_weight(self.weight.t().contiguous())
        if into is None:
            return torch.ops.mkldnn._linear_pointwise(
                dy_NO, self._backward_weight, None, "none", [], ""
            )
        return torch.ops.mkldnn._linear_pointwise.binary(
            dy_NO, into, self._backward_weight, None, "add"
        )


class NF4Weight:
    """4-bit NormalFloat with double quantisation, in bitsandbytes' own format: 4 bits a weight, a
    byte for the scale of 64 weights, 4 bytes for 256 of those scales (Dettmers 2023). Widened once
    in a forward and once in a backward; no wide copy is kept. `dtype`: of the widened weight."""

    def __init__(self, weight_OI: Tensor, dtype: torch.dtype) -> None:
        self._functional = import_bitsandbytes().functional
        quantize = self._functional.quantize_4bit
        self._values, self._state = quantize(
            weight_OI, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self._state.dtype = torch.float32 if dtype == torch.float64 else dtype
        # Rows of one block: bitsandbytes 0.50 mixes up the scales on CPUs where a row is no whole
        # number of blocks.
        blocks, remainder = divmod(weight_OI.numel(), NF4_BLOCK)
        self._state.shape = torch.Size((weight_OI.numel(),) if remainder else (blocks, NF4_BLOCK))
        self._shape, self._dtype = weight_OI.shape, dtype

    @property
    def weight(self) -> Tensor:
        """Widened anew at each call."""
        return (
            self._functional.dequantize_4bit(self._values, self._state)
            .to(self._dtype)
            .view(self._shape)
        )

    @property
    def device(self) -> torch.device:
        return self._values.device

    @property
    def nbytes(self) -> int:
        """Of all that is kept, tables included."""
        scales = self._state.state2
        tensors = (
            self._values,
            self._state.absmax,
            self._state.code,
            self._state.offset,
            scales.absmax,
            scales.code,
        )
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def num_parameters(self) -> int:
        return self._shape.numel()

    def compute_outputs(self, x_NI: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x_NI, self.weight, bias)

    def compute_input_grad(self, dy_NO: Tensor, into: Tensor | None) -> Tensor:
        return dy_NO @ self.weight if into is None else into.addmm_(dy_NO, self.weight)


def import_bitsandbytes() -> ModuleType:
    """The library. Raises InputError that names the extra where it is not installed; its import
    takes two seconds, so it is done when something is quantised."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it warns of a kernel for inference that it lacks
    try:
        import bitsandbytes as library
        import bitsandbytes.functional
    except ImportError as error:
        fix = "pip install 'tunesmith[qlora]'"
        raise InputError(
            f"4-bit weights and 8-bit optimizers need bitsandbytes ({error})", fix=fix
        ) from error
    return library


FrozenWeight = DenseWeight | BlockedWeight | NF4Weight


def _reorder_weight(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)
