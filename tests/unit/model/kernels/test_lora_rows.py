"""One call for rows of different adapters: equal to the reference, and each row to itself alone."""

import ctypes
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tunesmith.model.bank_linear import TorchFactors
from tunesmith.model.kernels import lora
from tunesmith.model.kernels.lora import (
    FactorsTable,
    PackedAdapters,
    PackedGroup,
    PackedRows,
    pack_factors,
)

pytestmark = pytest.mark.skipif(
    not lora.is_available(), reason="needs a C compiler and AVX512-BF16"
)
INPUTS = 70
WIDTHS = (62, 34, 96)
RANKS = (1, 4, 16, 24, 64, 100)
# rows of each adapter: tiles of 1, 2, 3, 4, 5, and more than one tile
COUNTS = (1, 2, 3, 4, 5, 19)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def draw_adapter(rank: int, seed: int) -> list[TorchFactors | None]:
    """Return the adapter of each linear: none for one of them, DoRA for another."""
    adapter: list[TorchFactors | None] = []
    for index, width in enumerate(WIDTHS):
        if index == seed % 3:
            adapter.append(None)
            continue
        gain_O, offset_O = None, None
        if index == (seed + 1) % 3:
            gain_O = 1 + 0.2 * draw(width, seed=seed + 5).float()
            offset_O = draw(width, seed=seed + 6).float() if rank > 4 else None
        a_RI = draw(rank, INPUTS, seed=seed + 10 * index)
        b_OR = draw(width, rank, seed=seed + 10 * index + 1)
        adapter.append(TorchFactors(a_RI, b_OR, 0.3 + 0.1 * seed, gain_O, offset_O))
    return adapter


def pack(adapter: Sequence[TorchFactors | None]) -> FactorsTable:
    packed = [f and pack_factors(f.a_RI, f.b_OR, f.scale, f.gain_O, f.offset_O) for f in adapter]
    return FactorsTable(packed)


def make_rows() -> list[Tensor]:
    """Return the rows of each adapter, scattered; five rows are the base's."""
    order = torch.randperm(sum(COUNTS) + 5, generator=torch.Generator().manual_seed(3))
    return list(order[: sum(COUNTS)].split(COUNTS))


ADAPTERS = [draw_adapter(rank, seed) for seed, rank in enumerate(RANKS)]
ROWS = make_rows()
X = draw(sum(COUNTS) + 5, INPUTS, seed=50)
BASE = [draw(len(X), width, seed=60 + i) for i, width in enumerate(WIDTHS)]


def run(x_NI: Tensor, base: Sequence[Tensor], groups: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """Add adapters by number to their rows, in one call."""
    outputs = [y.clone() for y in base]
    tables = [(pack(ADAPTERS[number]), rows_n) for number, rows_n in groups]
    group = PackedGroup(range(len(WIDTHS)), WIDTHS)
    group.add_outputs(outputs, x_NI, PackedRows(tables))
    return outputs


def test_it_equals_the_reference() -> None:
    outputs = run(X, BASE, list(enumerate(ROWS)))
    is_changed = [torch.zeros(len(X), dtype=torch.bool) for _ in WIDTHS]
    for adapter, rows_n in zip(ADAPTERS, ROWS, strict=True):
        for index, factors in enumerate(adapter):
            if factors is None:
                continue
            is_changed[index][rows_n] = True
            expected = BASE[index].double()
            wide = TorchFactors(
                factors.a_RI.double(),
                factors.b_OR.double(),
                factors.scale,
                None if factors.gain_O is None else factors.gain_O.double(),
                None if factors.offset_O is None else factors.offset_O.double(),
            )
            wide.add_output(expected, X.double(), rows_n)
            ours = outputs[index][rows_n].double()
            exact = expected[rows_n]
            # z is rounded to bf16, and the result
            assert (ours - exact).norm() / exact.norm() < 2.0**-8
            assert (BASE[index][rows_n].double() - exact).norm() / exact.norm() > 0.1
    for index, y in enumerate(outputs):
        assert torch.equal(y[~is_changed[index]], BASE[index][~is_changed[index]])


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    together = run(X, BASE, list(enumerate(ROWS)))
    for number, rows_n in enumerate(ROWS):
        for row in rows_n.tolist():
            base = [y[row : row + 1] for y in BASE]
            alone = run(X[row : row + 1].contiguous(), base, [(number, torch.tensor([0]))])
            for index in range(len(WIDTHS)):
                assert torch.equal(alone[index][0], together[index][row])


def test_without_dora_it_has_the_bits_of_a_lora_linear() -> None:
    """Evaluations run the adapter of a run through `PackedAdapters`."""
    together = run(X, BASE, list(enumerate(ROWS)))
    for adapter, rows_n in zip(ADAPTERS, ROWS, strict=True):
        for index, factors in enumerate(adapter):
            if factors is None or factors.gain_O is not None:
                continue
            packed = PackedAdapters([(factors.a_RI, factors.b_OR, factors.scale)])
            x_nI, y_nO = X[rows_n].contiguous(), BASE[index][rows_n].contiguous()
            packed.add_outputs([y_nO], packed.compute_inner(x_nI))
            assert torch.equal(together[index][rows_n], y_nO)


def test_threads_change_no_bit() -> None:
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(run(X, BASE, list(enumerate(ROWS))))
    finally:
        torch.set_num_threads(threads)
    for outputs in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(outputs, runs[0], strict=True))


def test_nothing_is_written_outside() -> None:
    width = WIDTHS[1]
    memory = torch.full((len(X) * width + 256,), 7, dtype=torch.bfloat16)
    y = memory[128:-128].view(len(X), width)
    y.copy_(BASE[1])
    table = pack([None, ADAPTERS[2][0] or ADAPTERS[2][1], None])
    PackedGroup([1], [width]).add_outputs([y], X, PackedRows([(table, torch.arange(len(X)))]))
    assert not torch.equal(y, BASE[1])
    assert (memory[:128] == 7).all()
    assert (memory[-128:] == 7).all()


def test_nan_stays_in_its_row() -> None:
    x = X.clone()
    row = int(ROWS[5][7])
    x[row, 3] = float("nan")
    outputs = run(x, BASE, list(enumerate(ROWS)))
    clean = run(X, BASE, list(enumerate(ROWS)))
    others = torch.arange(len(X)) != row
    for index, factors in enumerate(ADAPTERS[5]):
        assert outputs[index][row].isnan().all() == (factors is not None)
        assert torch.equal(outputs[index][others], clean[index][others])


def test_a_table_has_the_size_that_c_reads() -> None:
    assert FactorsTable.ENTRY.size == 4 * ctypes.sizeof(ctypes.c_void_p) + 16
