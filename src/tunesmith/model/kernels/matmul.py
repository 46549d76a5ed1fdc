"""Products with a frozen weight through matmul.c: bf16 on CPUs with AVX512-BF16.

    multiply(x_NI, weight_OI, bias_O)                x W^T + b
    multiply_transposed(dy_NO, weight_OI, into_NI)   dy W, added to `into`
    BlockedMatrix(weight_OI)                         a copy in the layout that the loop reads

oneDNN compiles code for each number of rows. Products of BlockedMatrix take 0.5 to 0.7 of its time
for up to 8 rows, and as long for a thousand (docs/log.md). Sums are fp32 and rounded
once; a row's result depends neither on the other rows nor on the number of threads. Left out:
processors with AMX, which oneDNN uses well; other dtypes (torch, the reference). Legend: N rows, I
inputs, O outputs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tunesmith.model.kernels import ops
from tunesmith.model.kernels.build import call_kernel, load_library
from tunesmith.model.machine_errors import OutOfMemory

LANES = 16  # of matmul.c
COLUMNS_FIRST, COLUMNS_LAST, PACKED = range(3)  # how a weight lies in memory


@functools.cache
def is_available() -> bool:
    """Return whether matmul.c was compiled and this processor has its instructions, and no AMX."""
    library = load_library()
    return library is not None and bool(library.matmul_available())


def is_supported(weight_OI: Tensor) -> bool:
    """Return whether matmul.c takes this weight in both directions."""
    has_pairs = weight_OI.dim() == 2 and not (weight_OI.shape[0] % 2 or weight_OI.shape[1] % 2)
    is_plain = has_pairs and weight_OI.is_contiguous() and weight_OI.numel() > 0
    return is_plain and ops.is_supported(weight_OI) and is_available()


def multiply(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return x W^T + b [N, O]."""
    y_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
    _run(x_NI, weight_OI, bias_O, y_NO, COLUMNS_FIRST)
    return y_NO


def multiply_transposed(dy_NO: Tensor, weight_OI: Tensor, into_NI: Tensor | None) -> Tensor:
    """Return dy W [N, I], added to `into` in place if it is not None."""
    dx_NI = dy_NO.new_empty(len(dy_NO), weight_OI.shape[1]) if into_NI is None else into_NI
    _run(dy_NO, weight_OI, None, dx_NI, COLUMNS_LAST, is_sum=into_NI is not None)
    return dx_NI


class BlockedMatrix:
    """A weight in blocks of 16 outputs, for each of which pairs of inputs lie side by side."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.out_features, self.in_features = weight_OI.shape
        num_blocks = -(-self.out_features // LANES)
        shape = (num_blocks, self.in_features // 2, LANES, 2)
        self.blocks = torch.empty(shape, dtype=torch.bfloat16)
        call_kernel("pack_weight", weight_OI, self.blocks, self.in_features, self.out_features)

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.dtype

    def multiply(self, x_NI: Tensor, bias_O: Tensor | None, into_NO: Tensor | None) -> Tensor:
        """Return x W^T + b [N, O], added to `into` in place if it is not None."""
        y_NO = x_NI.new_empty(len(x_NI), self.out_features) if into_NO is None else into_NO
        _run(x_NI, self.blocks, bias_O, y_NO, PACKED, is_sum=into_NO is not None)
        return y_NO

    def to_dense(self) -> Tensor:
        """Return the weight [O, I], created at each call."""
        rows = self.blocks.permute(0, 2, 1, 3).reshape(-1, self.in_features)
        return rows[: self.out_features].clone()


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, layout: int, *, is_sum: bool = False
) -> None:
    inputs = x.shape[1]
    outputs = y.shape[1]
    columns = -(-outputs // LANES) * LANES if layout == PACKED else outputs
    assert weight.numel() == columns * inputs, "sizes do not fit"
    assert len(y) == len(x), "sizes do not fit"
    assert bias is None or bias.shape == (outputs,), "sizes do not fit"
    dtypes = {tensor.dtype for tensor in (x, weight, y, x if bias is None else bias)}
    assert dtypes == {torch.bfloat16}, f"matmul.c takes bf16, not {dtypes}"
    shape = (len(x), inputs, outputs, layout, int(is_sum), torch.get_num_threads())
    bias = x.new_empty(0) if bias is None else bias.contiguous()  # a null pointer in C
    if call_kernel("multiply_weight", x.contiguous(), weight, bias, y, *shape):
        fix = "lower pack_length, or free memory"
        raise OutOfMemory("no memory for the strips of a matrix product", fix=fix)
