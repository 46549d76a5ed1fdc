"""matmul.c against fp64, and what it promises: rows, layouts and threads change no bit."""

import pytest
import torch

from tunesmith.model.frozen_weight import (
    BlockedWeight,
    DenseWeight,
    has_onednn_bf16,
    multiply_dense,
    multiply_dense_transposed,
)
from tunesmith.model.kernels import matmul
from tunesmith.model.kernels.matmul import BlockedMatrix
from tunesmith.model.lm_head import LMHead

needs_kernel = pytest.mark.skipif(
    not matmul.is_available(), reason="needs AVX512-BF16, no AMX and a C compiler"
)
HALF_UNIT = 2**-8  # the largest relative error of rounding to bf16
# rows, inputs, outputs: less than a vector, no multiples of one, all numbers of rows of a tile,
# several strips, more inputs than a strip holds, more rows than stay in the cache with them
SHAPES = [
    (1, 2, 2),
    (2, 34, 18),
    (3, 66, 50),
    (4, 32, 16),
    (5, 32, 98),
    (6, 96, 64),
    (7, 576, 192),
    (13, 130, 200),
    (200, 2050, 30),
    (600, 64, 130),
]


def make_inputs(rows: int, inputs: int, outputs: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    return [torch.randn(*shape, generator=generator).bfloat16() for shape in shapes]


def assert_rounded_once(y: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> None:
    """Assert that y is `exact` rounded to bf16, up to fp32 sums of terms of size `scale`."""
    bound = exact.abs() * HALF_UNIT + scale * 2**-20
    assert ((y.double() - exact).abs() <= bound).all()


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_fp64(shape):
    x, weight, bias, before = make_inputs(*shape)
    exact = x.double() @ weight.double().t()
    scale = x.double().abs() @ weight.double().abs().t() + 1
    assert_rounded_once(matmul.multiply(x, weight, None), exact, scale)
    y = matmul.multiply(x, weight, bias)
    assert_rounded_once(y, exact + bias.double(), scale)
    assert torch.equal(BlockedMatrix(weight).multiply(x, bias, None), y)
    summed = BlockedMatrix(weight).multiply(x, None, before.clone())
    assert_rounded_once(summed, exact + before.double(), scale)
    # the transposed weight, in the layout of input gradients
    transposed = weight.t().contiguous()
    assert torch.equal(
        matmul.multiply_transposed(x, transposed, None), matmul.multiply(x, weight, None)
    )
    assert torch.equal(matmul.multiply_transposed(x, transposed, before.clone()), summed)


@needs_kernel
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 6, 7, 97])
def test_a_row_does_not_depend_on_the_others(rows):
    x, weight, bias, _ = make_inputs(200, 2050, 130)
    for multiply in (matmul.multiply, lambda x, _, b: BlockedMatrix(weight).multiply(x, b, None)):
        all_rows = multiply(x, weight, bias)
        assert torch.equal(multiply(x[:rows], weight, bias), all_rows[:rows])
        assert torch.equal(multiply(x[-rows:], weight, bias), all_rows[-rows:])


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_no_bit(threads):
    before = torch.get_num_threads()
    x, weight, bias, _ = make_inputs(200, 130, 50)
    try:
        torch.set_num_threads(1)
        expected = matmul.multiply(x, weight, bias), matmul.multiply(x[:1], weight, bias)
        torch.set_num_threads(threads)
        assert torch.equal(matmul.multiply(x, weight, bias), expected[0])
        assert torch.equal(matmul.multiply(x[:1], weight, bias), expected[1])
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_values_that_are_not_finite_stay_in_their_rows_and_outputs():
    x, weight, _, _ = make_inputs(7, 34, 18)
    x[2, 5] = torch.nan
    weight[3, 1] = torch.inf
    y = matmul.multiply(x, weight, None)
    is_finite = y.isfinite()
    assert not is_finite[2].any()
    assert not is_finite[:, 3].any()
    is_finite[2] = is_finite[:, 3] = True
    assert is_finite.all()


@needs_kernel
@pytest.mark.parametrize("change", ["inputs", "bias", "dtype", "into"])
def test_what_does_not_fit_is_noticed_before_it_is_read(change):
    x, weight, bias, into = make_inputs(4, 34, 18)
    if change == "inputs":
        x = x[:, :32]
    elif change == "bias":
        bias = bias[:16]
    elif change == "dtype":
        x = x.float()
    else:
        into = into[:, :16]
    with pytest.raises(AssertionError):
        BlockedMatrix(weight).multiply(x, bias, into)


@needs_kernel
def test_a_strided_input_is_copied():
    x, weight, _, _ = make_inputs(6, 34, 18)
    strided = torch.cat((x, x), dim=1)[:, :34]
    assert not strided.is_contiguous()
    assert torch.equal(matmul.multiply(strided, weight, None), matmul.multiply(x, weight, None))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((18, 33), torch.bfloat16), ((17, 34), torch.bfloat16), ((18, 34), torch.float32)],
    ids=["odd inputs", "odd outputs", "fp32"],
)
def test_other_weights_are_multiplied_by_torch(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).to(dtype)
    x, dy = (torch.randn(3, n, generator=generator).to(dtype) for n in reversed(shape))
    assert not matmul.is_supported(weight)
    assert torch.equal(multiply_dense(x, weight, None), torch.nn.functional.linear(x, weight))
    assert torch.equal(multiply_dense_transposed(dy, weight, None), dy @ weight)
    if dtype == torch.bfloat16 and has_onednn_bf16():
        assert torch.equal(BlockedWeight(weight).weight, weight)


@needs_kernel
def test_blocked_products_have_the_bits_of_the_plain_weight():
    x, weight, bias, dy = make_inputs(9, 66, 50)
    plain, blocked = DenseWeight(weight), BlockedWeight(weight)
    assert torch.equal(plain.compute_outputs(x, bias), blocked.compute_outputs(x, bias))
    for into in (None, x):
        gradients = [
            w.compute_input_grad(dy, None if into is None else into.clone())
            for w in (plain, blocked)
        ]
        assert torch.equal(*gradients)


@needs_kernel
def test_a_blocked_head_has_the_logits_of_its_weight(monkeypatch):
    x, weight, bias, _ = make_inputs(3, 64, 97)
    weight = torch.cat((weight, weight[:1]))  # 98 rows
    bias = torch.cat((bias, bias[:1]))
    head = LMHead(weight, bias, scale=0.5, softcap=3.0)
    blocked = head.block(torch.bfloat16)
    assert blocked.blocks is not None
    logits = blocked.compute_logits(x[None])
    assert logits.shape == (1, 3, 98)
    torch.testing.assert_close(logits[0], head.compute_logits(x), rtol=2e-2, atol=2e-2)
    assert head.block(torch.float32) is head
    # a family whose last norm is in fp32, trained in full
    torch.testing.assert_close(
        blocked.compute_logits(x.float()), head.compute_logits(x.float()), rtol=0, atol=0
    )
    monkeypatch.setattr("tunesmith.model.lm_head.MAX_BLOCKED_BYTES", 100)
    assert head.block(torch.bfloat16) is head
