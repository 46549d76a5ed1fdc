"""FP8 and MXFP4 weights: every code and scale against transformers, and what bf16 loses."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tunesmith.model.packed_formats import MAX_SCALE, Mxfp4ExpertWeight, widen_fp8, widen_mxfp4

NUM_SCALES = MAX_SCALE + 1


def make_all_codes() -> tuple[torch.Tensor, torch.Tensor]:
    """Return every byte with every finite scale: blocks [1, scales, 16, 16], scales [1, .., 16]."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.arange(NUM_SCALES, dtype=torch.uint8)
    blocks = codes.expand(1, NUM_SCALES, 16, 16).contiguous()
    return blocks, scales[None, :, None].expand(1, NUM_SCALES, 16).contiguous()


def test_bf16_holds_every_mxfp4_weight() -> None:
    blocks, scales = make_all_codes()
    wide = widen_mxfp4(blocks, scales, torch.float64)
    assert wide.shape == (1, NUM_SCALES, 512)
    assert (wide != 0).sum() == NUM_SCALES * 512 * 14 // 16
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(widen_mxfp4(blocks, scales, dtype).double(), wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mxfp4_weights_are_those_of_transformers(dtype: torch.dtype) -> None:
    blocks, scales = make_all_codes()
    ours = widen_mxfp4(blocks, scales, dtype)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # transposed
    assert torch.equal(ours, theirs.transpose(1, 2))


def test_an_expert_is_widened_alone_and_stays_packed() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 8, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 130, (3, 8, 2), generator=generator, dtype=torch.uint8)
    weight = Mxfp4ExpertWeight(blocks, scales, torch.bfloat16)
    assert weight.shape == (3, 8, 64)
    assert weight.nbytes * 8 / weight.num_parameters == 4.25
    wide = widen_mxfp4(blocks, scales, torch.bfloat16)
    for expert in range(3):
        assert torch.equal(weight.get_matrix(expert), wide[expert])
        assert torch.equal(weight[torch.tensor(expert)], wide[expert].t())


def test_a_larger_scale_makes_weights_infinite() -> None:
    """It is refused when it is read (test_packed_checkpoints.py)."""
    blocks = torch.full((2, 16), 0x77, dtype=torch.uint8)
    scales = torch.tensor([MAX_SCALE, MAX_SCALE + 1], dtype=torch.uint8)
    wide = widen_mxfp4(blocks, scales, torch.float32)
    assert wide.isfinite().tolist() == [True] * 32 + [False] * 32


# ---------------------------------------------------------------- FP8


def make_fp8(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (40 * torch.randn(rows, columns, generator=generator)).to(torch.float8_e4m3fn)


def test_fp8_blocks_are_those_of_transformers() -> None:
    weight = make_fp8(256, 384)
    scales = torch.rand(2, 3) + 0.1
    ours = widen_fp8(weight, scales, (128, 128))
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    assert torch.equal(ours, theirs)


def test_the_last_fp8_blocks_may_be_cut_off() -> None:
    """transformers divides the rows by the scales instead, and refuses this DeepSeek shape."""
    weight = make_fp8(100, 70)
    scales = torch.rand(4, 3) + 0.1
    ours = widen_fp8(weight, scales, (32, 32))
    assert torch.equal(ours[96:, 64:], weight.float()[96:, 64:] * scales[3, 2])
    assert torch.equal(ours[31:33, :32], weight.float()[31:33, :32] * scales[[0, 1], :1])


def test_one_fp8_scale_for_a_matrix() -> None:
    weight = make_fp8(16, 16)
    scale = torch.tensor([0.0123], dtype=torch.bfloat16)
    assert torch.equal(widen_fp8(weight, scale, None), weight.float() * scale.float())
