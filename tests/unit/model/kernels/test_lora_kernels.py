"""The products of lora.c equal fp64 up to one rounding, stay in bounds, and are deterministic."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from tiny_models import (
    compute_max_difference,
    compute_step_gradients,
    make_tiny_document,
    make_tiny_model,
)
from tunesmith.model.kernels import build, lora
from tunesmith.model.kernels.lora import LANES, Adapter, AdapterFactor, PackedAdapters

pytestmark = pytest.mark.skipif(
    not lora.is_available(), reason="needs a C compiler and AVX512-BF16"
)
ROUNDING = 2.0**-8  # of a bf16 result
SUM = 2.0**-17  # of an fp32 sum, relative to the sizes of what it adds up
SHAPES = [
    (1, 32, 16),
    (7, 34, 4),
    (33, 70, 24),
    (65, 62, 1),
    (129, 2, 8),
    (200, 576, 16),
    (130, 1536, 64),
    (129, 96, 256),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return random bf16 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def adapters_of(inputs: int, outputs: list[int], ranks: list[int]) -> list[Adapter | None]:
    """Return random adapters; rank 0 means a linear without adapter."""
    sizes = enumerate(zip(outputs, ranks, strict=True))
    return [
        (random(r, inputs, seed=9 * i), random(o, r, seed=9 * i + 1), 0.7 + i) if r else None
        for i, (o, r) in sizes
    ]


def ranks_of(z: Tensor, blocks: slice, rank: int) -> Tensor:
    """Return one adapter's [N, R] in fp64 from [V, N, 16]; the padding of its last block is 0."""
    flat = z[blocks].permute(1, 0, 2).flatten(1).double()
    assert not flat[:, rank:].any()
    return flat[:, :rank]


def assert_product(
    ours: Tensor,
    a_factor: Tensor,
    b_factor: Tensor,
    *,
    plus: Tensor | float = 0.0,
    scale: float = 1.0,
) -> None:
    """Check ours = plus + scale * a_factor @ b_factor up to one rounding (none in fp32) and fp32
    sums."""
    exact = plus + scale * (a_factor @ b_factor)
    sizes = scale * (a_factor.abs() @ b_factor.abs())
    rounding = ROUNDING * exact.abs() if ours.dtype == torch.bfloat16 else 0.0
    assert ((ours.double() - exact).abs() <= rounding + SUM * sizes + 1e-30).all()


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_products_of_a_single_adapter(shape: tuple[int, int, int]) -> None:
    rows, width, rank = shape
    (a, b, scale), all_rows = (random(rank, width), random(width, rank, seed=1), 0.7), slice(None)
    packed, x, y = (
        PackedAdapters([(a, b, scale)]),
        random(rows, width, seed=2),
        random(rows, width, seed=3),
    )
    a, b, wide_x, wide_y = a.double(), b.double(), x.double(), y.double()
    inner = packed.compute_inner(x)
    z = ranks_of(inner, all_rows, rank)
    assert_product(ranks_of(inner, all_rows, rank).bfloat16(), wide_x, a.t())
    added = y.clone()
    packed.add_outputs([added], inner)
    assert_product(added, z, b.t(), plus=wide_y, scale=scale)
    dinner, (db,) = packed.outputs_backward([y], inner)
    dz = ranks_of(dinner, all_rows, rank)
    assert_product(dz.bfloat16(), wide_y, b, scale=scale)
    assert db is not None
    assert db.dtype == torch.float32
    assert_product(db, wide_y.t(), z, scale=scale)
    dx = y.clone()
    packed.add_inputs(dx, dinner)
    assert_product(dx, dz, a, plus=wide_y)
    (da,) = packed.inputs_backward(x, dinner)
    assert da is not None
    assert da.dtype == torch.float32
    assert_product(da, dz.t(), wide_x)


def test_several_adapters_on_the_same_input() -> None:
    """Different widths and ranks, one linear without adapter: each equals its result alone, dx is
    the sum."""
    rows, inputs, outputs, ranks = 150, 70, [64, 34, 48, 96], [24, 4, 0, 40]
    adapters = adapters_of(inputs, outputs, ranks)
    together, x = PackedAdapters(adapters), random(rows, inputs, seed=2)
    dys, ys = [[random(rows, o, seed=s + i) for i, o in enumerate(outputs)] for s in (20, 30)]
    before = [y.clone() for y in ys]
    z = together.compute_inner(x)
    together.add_outputs(ys, z)
    dz, dbs = together.outputs_backward(dys, z)
    das = together.inputs_backward(x, dz)
    dx = torch.zeros(rows, inputs).bfloat16()
    together.add_inputs(dx, dz)
    blocks = [-(-rank // LANES) for rank in ranks]
    places = [
        slice(end - count, end) for end, count in zip(accumulate(blocks), blocks, strict=True)
    ]
    for i, (adapter, rows) in enumerate(zip(adapters, places, strict=True)):
        if adapter is None:
            assert torch.equal(ys[i], before[i])
            assert dbs[i] is None
            assert das[i] is None
            continue
        alone = PackedAdapters([adapter])
        alone.add_outputs([before[i]], z[rows])
        dz_alone, db_alone = alone.outputs_backward([dys[i]], z[rows])
        assert torch.equal(alone.compute_inner(x), z[rows])
        assert torch.equal(before[i], ys[i])
        assert torch.equal(dz_alone, dz[rows])
        torch.testing.assert_close(db_alone[0], dbs[i], rtol=0, atol=0)
        torch.testing.assert_close(alone.inputs_backward(x, dz[rows])[0], das[i], rtol=0, atol=0)
    parts = [(blocks, rank) for blocks, rank in zip(places, ranks, strict=True) if rank]
    wide_dz = torch.cat([ranks_of(dz, blocks, rank) for blocks, rank in parts], 1)
    assert_product(dx, wide_dz, torch.cat([adapter[0] for adapter in adapters if adapter]).double())


def test_nan_is_not_hidden() -> None:
    """Padded ranks and columns do not write out of bounds either."""
    packed, x = PackedAdapters([(random(3, 34), random(34, 3, seed=1), 1.0)]), random(9, 34, seed=2)
    x[4, 33] = float("nan")
    z = packed.compute_inner(x)
    assert z[0, 4, :3].isnan().all()
    assert not z[0, [3, 5]].isnan().any()
    dx = torch.zeros(9, 34).bfloat16()
    packed.add_inputs(dx, z)
    assert dx[4].isnan().all()
    assert not dx[[3, 5]].isnan().any()
    (da,) = packed.inputs_backward(x, torch.ones(1, 9, LANES).bfloat16())
    assert da is not None
    assert da[:, 33].isnan().all()
    assert not da[:, :33].isnan().any()


# ---------------------------------------------------------------- memory, threads


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_written_outside(shape: tuple[int, int, int]) -> None:
    rows, width, rank = shape

    def guarded(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        """Return a tensor in the middle of a larger one that is filled with sevens."""
        size = torch.Size(sizes).numel()
        guarded = torch.full((size + 256,), 7, dtype=dtype)
        return guarded[128:-128].view(sizes), guarded

    factor = AdapterFactor(-(-rank // LANES), width)
    factor.down, down = guarded(*factor.down.shape, dtype=torch.int32)
    factor.up, up = guarded(*factor.up.shape, dtype=torch.int32)
    factor.pack(random(width, rank), slice(None))
    y, around_y = guarded(rows, width)
    z, around_z = guarded(factor.blocks, rows, LANES)
    factor.add_product(y, z, 1.0)
    sums, around_sums = guarded(2, factor.blocks * LANES, factor.padded_width, dtype=torch.float32)
    build.call_kernel("lora_inner", y, factor.down, z, rows, width, factor.blocks, 2)
    build.call_kernel(
        "lora_gradient", y, z.clone(), factor.down, z, sums, rows, width, factor.blocks, 2, 1.0
    )
    for guarded in (down, up, around_y, around_z, around_sums):
        assert (guarded[:128] == 7).all()
        assert (guarded[-128:] == 7).all()


def test_the_same_bits_at_each_run() -> None:
    (adapter,), x = adapters_of(70, [96], [24]), random(531, 70, seed=2)
    dy, runs, threads = random(531, 96, seed=3), [], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in range(4):
            packed = PackedAdapters([adapter])
            z = packed.compute_inner(x)
            dz, (db,) = packed.outputs_backward([dy], z)
            runs.append((z, dz, db, *packed.inputs_backward(x, dz)))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(actual, other)
        for run in runs[1:]
        for actual, other in zip(run, runs[0], strict=True)
    )


# ---------------------------------------------------------------- in a model


DOCUMENTS = [make_tiny_document(90), make_tiny_document(70, seed=1)]


def bf16_gradients(family: str, dropout: float, targets: str | list[str]) -> dict[str, Tensor]:
    model = make_tiny_model(
        family, torch.bfloat16, lora_dropout=dropout, lora_target_modules=targets
    )
    model.network.train()
    return compute_step_gradients(model, DOCUMENTS, 200)[1]


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ["q_proj", "up_proj"]),
        ("gemma2", "all-linear"),
        ("phi3", "all-linear"),
    ],
)
def test_a_step_is_as_near_to_fp32_as_the_torch_path(family: str, targets: str | list[str]) -> None:
    """A dropout that drops nothing uses the torch path."""
    _, exact = compute_step_gradients(
        make_tiny_model(family, lora_target_modules=targets), DOCUMENTS, 200
    )
    ours, reference = bf16_gradients(family, 0.0, targets), bf16_gradients(family, 1e-9, targets)
    assert any(not torch.equal(ours[name], other) for name, other in reference.items())  # two paths
    assert compute_max_difference(ours, exact) < 1.2 * compute_max_difference(reference, exact)
    assert compute_max_difference(ours, reference) < compute_max_difference(reference, exact)
