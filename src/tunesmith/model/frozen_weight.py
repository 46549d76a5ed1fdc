"""A frozen weight [O, I] and its two products: outputs from inputs, and input gradients from output
gradients.

DenseWeight keeps the stored weight. BlockedWeight keeps it twice, in the layouts that bf16 products
read and would otherwise create in every product; the bits are the same. The first backward creates
the second copy. NF4Weight keeps 4 bits and dequantizes for each product. Products run through
matmul.c where it applies, else through oneDNN or whatever torch has. Legend: N rows, I inputs, O
outputs."""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import InputError
from tunesmith.model.kernels import matmul
from tunesmith.model.kernels.matmul import BlockedMatrix

NF4_BLOCK = 64  # weights that share a scale
# of oneDNN's products; a pack of one size needs about 16, forward and backward
MAX_PRIMITIVES = "64"
CAPACITY_ENV = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@functools.cache
def has_onednn_bf16() -> bool:
    """Return whether this torch and this processor have oneDNN's bf16 products."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def limit_onednn_cache() -> None:
    """Keep fewer compiled products, for the whole process. A value set by the user is unchanged.

    oneDNN compiles code for every size and keeps the last 1,024 of them, spread over the heap, so
    that the free memory between them cannot be merged. Packs differ in size, and a size rarely
    returns. oneDNN reads the variable when it creates its first product."""
    # mapping large blocks one by one took 6% off the peak, but steps were a quarter slower
    os.environ.setdefault(CAPACITY_ENV, MAX_PRIMITIVES)


class DenseWeight:
    """A weight as it is stored."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight = weight_OI

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def list_tensors(self) -> list[Tensor]:
        return [self.weight]

    def compute_outputs(self, x_NI: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias [N, O]."""
        return multiply_dense(x_NI, self.weight, bias)

    def compute_input_grad(self, dy_NO: Tensor, into: Tensor | None) -> Tensor:
        """Return dy W [N, I], added to `into` in place if it is not None."""
        return multiply_dense_transposed(dy_NO, self.weight, into)


def multiply_dense(x_NI: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias [N, O]. Not differentiable."""
    if x_NI.dtype == weight_OI.dtype and matmul.is_supported(weight_OI):
        return matmul.multiply(x_NI, weight_OI, bias)
    return F.linear(x_NI, weight_OI, bias)


def multiply_dense_transposed(dy_NO: Tensor, weight_OI: Tensor, into: Tensor | None) -> Tensor:
    """Return dy W [N, I], added to `into` in place if it is not None. Not differentiable."""
    if dy_NO.dtype == weight_OI.dtype and matmul.is_supported(weight_OI):
        return matmul.multiply_transposed(dy_NO, weight_OI, into)
    return dy_NO @ weight_OI if into is None else into.addmm_(dy_NO, weight_OI)


class OneDnnMatrix:
    """A weight in oneDNN's layout, in the place of a BlockedMatrix."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)

    def multiply(self, x_NI: Tensor, bias_O: Tensor | None, into_NO: Tensor | None) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        if into_NO is None:
            return linear(x_NI, self._reordered, bias_O, "none", [], "")
        return linear.binary(x_NI, into_NO, self._reordered, bias_O, "add")

    def to_dense(self) -> Tensor:
        return self._reordered.to_dense()


class BlockedWeight:
    """A weight in the layouts of its products. bf16 on the CPU only; see `has_onednn_bf16`."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.forward_matrix = _block_matrix(weight_OI)
        self._backward: BlockedMatrix | OneDnnMatrix | None = None

    @property
    def weight(self) -> Tensor:
        """The original weight, recreated at each call."""
        return self.forward_matrix.to_dense()

    def compute_outputs(self, x_NI: Tensor, bias: Tensor | None) -> Tensor:
        return self.forward_matrix.multiply(x_NI, bias, None)

    def compute_input_grad(self, dy_NO: Tensor, into: Tensor | None) -> Tensor:
        if self._backward is None:
            self._backward = _block_matrix(self.weight.t().contiguous())
        return self._backward.multiply(dy_NO, None, into)


def _block_matrix(weight_OI: Tensor) -> BlockedMatrix | OneDnnMatrix:
    return (BlockedMatrix if matmul.is_supported(weight_OI) else OneDnnMatrix)(weight_OI)


class NF4Weight:
    """A weight in 4-bit NormalFloat with double quantization, in bitsandbytes' format: 4 bits per
    weight, a byte for the scale of 64 weights, 4 bytes for 256 of those scales (Dettmers 2023).

    It is dequantized to `dtype` once per forward and once per backward; no wide copy is kept."""

    def __init__(self, weight_OI: Tensor, dtype: torch.dtype) -> None:
        self._functional = import_bitsandbytes().functional
        self._values, self._state = self._functional.quantize_4bit(
            weight_OI, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self._state.dtype = torch.float32 if dtype == torch.float64 else dtype
        # Rows of one block: on CPUs bitsandbytes 0.50 mixes up the scales of rows that are not a
        # multiple of the block size.
        blocks, remainder = divmod(weight_OI.numel(), NF4_BLOCK)
        self._state.shape = torch.Size((weight_OI.numel(),) if remainder else (blocks, NF4_BLOCK))
        self._shape = weight_OI.shape
        self.dtype = dtype  # of products

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, recreated at each call."""
        values = self._functional.dequantize_4bit(self._values, self._state)
        return values.to(self.dtype).view(self._shape)

    @property
    def device(self) -> torch.device:
        return self._values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the values and their tables."""
        state = self._state
        scales = state.state2
        tables = (state.absmax, state.code, state.offset, scales.absmax, scales.code)
        return self._values.nbytes + sum(table.nbytes for table in tables)

    def list_tensors(self) -> list[Tensor]:
        """Return the values and their scales, without tables that all weights have."""
        return [self._values, self._state.absmax, self._state.state2.absmax]

    @property
    def num_parameters(self) -> int:
        return self._shape.numel()

    def compute_outputs(self, x_NI: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_dense(x_NI, self.weight, bias)

    def compute_input_grad(self, dy_NO: Tensor, into: Tensor | None) -> Tensor:
        return multiply_dense_transposed(dy_NO, self.weight, into)


def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes, which takes two seconds. Raise InputError if it is not installed."""
    # it warns about a missing kernel for inference
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes as library
        import bitsandbytes.functional
    except ImportError as error:
        message = f"4-bit weights and 8-bit optimizers need bitsandbytes ({error})"
        raise InputError(message, fix="pip install '.[qlora]' in tunesmith's folder") from error
    return library


FrozenWeight = DenseWeight | BlockedWeight | NF4Weight
