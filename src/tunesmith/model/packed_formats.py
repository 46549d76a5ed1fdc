"""The two packed formats of checkpoints, widened: FP8 matrices, and experts in MXFP4.

    widen_fp8(weight, scales, block)        an FP8 matrix times its scales, in fp32
    widen_mxfp4(blocks, scales, dtype)      the weights of packed bytes, exactly
    Mxfp4ExpertWeight                       one packed matrix [O, I] per expert

An FP8 value (4 significant bits) times an fp32 scale has more bits than bf16 holds. MXFP4 (OCP
Microscaling Formats 1.0, section 5), 4.25 bits per weight, loses nothing in bf16: a byte holds two
weights, the lower half first, each a sign and one of eight magnitudes, and 32 weights share a
scale, a power of two. Left out: reading files (safetensors_io.py, hub/packed_tensors.py). Legend: E
experts, O outputs, I inputs, G = I / 32."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # weights that share a scale in MXFP4
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_BIAS = 127
# bytes of a value -> type as wide as two of them
PAIR_DTYPES = {2: torch.int32, 4: torch.int64, 8: torch.complex128}
# with larger scales a weight may be infinite in fp32 and in bf16; 255 means NaN
MAX_SCALE = 252


def widen_fp8(weight_OI: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Return the fp32 weight [O, I] of an FP8 matrix, whose scales are one number, or one for each
    block of rows and columns; the last blocks may be cut off."""
    wide_OI = weight_OI.float()
    scales = scales.float()
    if block is None:
        return wide_OI.mul_(scales.reshape(()))
    for dim, step in enumerate(block):
        scales = scales.repeat_interleave(step, dim)
    num_rows, num_columns = weight_OI.shape
    return wide_OI.mul_(scales[:num_rows, :num_columns])


def widen_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights [.., 32 G] of bytes [.., G, 16] and of scales [.., G], uint8 both.

    The two values of a byte are looked up as one word, which is several times as fast."""
    values = torch.tensor((*MAGNITUDES, *(-value for value in MAGNITUDES)), dtype=dtype)
    codes = torch.arange(256)
    pairs_by_byte = torch.stack((values[codes & 15], values[codes >> 4]), dim=-1)
    word_by_byte = pairs_by_byte.view(PAIR_DTYPES[dtype.itemsize]).flatten().to(blocks.device)
    scale_by_byte = (codes.double() - SCALE_BIAS).exp2().to(scales.device, dtype)
    words = word_by_byte.index_select(0, blocks.flatten().int())
    groups = words.view(dtype).view(*scales.shape, GROUP)
    return groups.mul_(scale_by_byte[scales.int(), None]).flatten(-2)


class Mxfp4ExpertWeight:
    """Packed matrices of experts: blocks [E, O, G, 16] and scales [E, O, G] up to MAX_SCALE.

    An expert is widened to `dtype` where it is used; no wide copy is kept. It may stand in for the
    parameter of transformers' module, which multiplies by `parameter[expert]` [I, O]."""

    stacked = None

    def __init__(self, blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.blocks = blocks
        self.scales = scales
        self.dtype = dtype
        num_experts, num_outputs, num_groups = scales.shape
        self.shape = (num_experts, num_outputs, num_groups * GROUP)

    def get_matrix(self, expert: int) -> Tensor:
        """Return the matrix [O, I] of an expert in `dtype`."""
        return widen_mxfp4(self.blocks[expert], self.scales[expert], self.dtype)

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """Return the transposed matrix [I, O] of an expert, as gpt-oss in transformers reads it."""
        return self.get_matrix(int(expert)).t()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights and their scales."""
        return self.blocks.nbytes + self.scales.nbytes

    @property
    def num_parameters(self) -> int:
        num_experts, num_outputs, num_inputs = self.shape
        return num_experts * num_outputs * num_inputs
