"""The low-rank products of adapters through lora.c: bf16 on CPUs with AVX512-BF16, in about half of
oneDNN's time.

In: the adapters of linears that share one input. Out: their inner activations, outputs and
gradients. Sums are fp32 and rounded once; the same number of threads gives the same bits. Left out:
dropout, other dtypes and processors (the torch path in model/lora.py, which is the reference).
Legend: N rows, I inputs, O outputs, R rank, W inputs or outputs, V blocks of 16 ranks;
z [V, N, 16] = A x, block by block.

`PackedRows` is the same for rows of different adapters (model/bank_linear.py): one call for all
linears of an input, whatever the number of adapters."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tunesmith.model.kernels import ops
from tunesmith.model.kernels.build import call_kernel, load_library

# of lora.c
LANES = 16
STRIP = 32
TILE_ROWS = 8  # rows of one adapter that are computed together
MAX_RANK = 256 * LANES
# rows of a forward; for the few rows of a generation step packing takes longer than it saves
MIN_ROWS = 64
Adapter = tuple[Tensor, Tensor, float]  # A [R, I], B [O, R], scale


@functools.cache
def is_available() -> bool:
    """Return whether lora.c was compiled and this processor has its instructions."""
    library = load_library()
    return library is not None and bool(library.lora_available())


def is_supported(x_NI: Tensor, adapters: Sequence[Adapter | None]) -> bool:
    """Return whether lora.c can take this input with these adapters."""
    if not x_NI.is_contiguous() or x_NI.shape[1] % 2:
        return False
    for adapter in adapters:
        if adapter and len(adapter[1]) % 2:
            return False
    return ops.is_supported(x_NI) and is_available()


class AdapterFactor:
    """A tall matrix [W, R], or several side by side, in the two layouts that lora.c reads."""

    def __init__(self, blocks: int, width: int) -> None:
        self.blocks = blocks
        self.width = width
        self.padded_width = -(-width // STRIP) * STRIP
        self.down = torch.empty(blocks, width // 2, LANES, dtype=torch.int32)
        self.up = torch.empty(blocks, LANES // 2, self.padded_width, dtype=torch.int32)

    def pack(self, m_WR: Tensor, blocks: slice) -> None:
        """Copy a bf16 matrix, contiguous itself or transposed, into `blocks`."""
        source = m_WR if m_WR.is_contiguous() else m_WR.t()
        down = self.down[blocks]
        up = self.up[blocks]
        call_kernel("lora_pack", source, down, up, *m_WR.shape, *m_WR.stride())

    def add_product(self, y_NW: Tensor, z: Tensor, scale: float) -> None:
        """Add scale * z m^T to y in place."""
        shape = (len(y_NW), self.width, self.blocks, torch.get_num_threads())
        call_kernel("lora_add", y_NW, z, self.up, *shape, float(scale))

    def compute_grad(
        self, x_NW: Tensor, z: Tensor, scale: float, dz: Tensor | None = None
    ) -> Tensor:
        """Return scale * z^T x of each thread's rows [threads, V * 16, W], and write
        dz = scale * x m if `dz` is passed."""
        threads = torch.get_num_threads()
        shape = (len(x_NW), self.width, self.blocks, threads)
        sums = torch.empty(threads, self.blocks * LANES, self.padded_width, dtype=torch.float32)
        null = z.new_empty(0)  # a null pointer in C
        outputs = (null, null) if dz is None else (self.down, dz)
        call_kernel("lora_gradient", x_NW, z, *outputs, sums, *shape, float(scale))
        return sums[..., : self.width]


@dataclass(frozen=True, eq=False)
class _AdapterSlot:
    """One linear's adapter in a group: its rows of z are `rows`."""

    b: AdapterFactor
    rows: slice
    rank: int
    scale: float


class PackedAdapters:
    """The adapters of several linears on one input, None for a linear without an adapter. Lists are
    aligned with the linears."""

    def __init__(self, adapters: Sequence[Adapter | None]) -> None:
        blocks = [-(-len(adapter[0]) // LANES) if adapter else 0 for adapter in adapters]
        in_features = next(adapter[0].shape[1] for adapter in adapters if adapter)
        self.a = AdapterFactor(sum(blocks), in_features)
        self.slots: list[_AdapterSlot | None] = []
        for adapter, count, end in zip(adapters, blocks, accumulate(blocks), strict=True):
            if adapter is None:
                self.slots.append(None)
                continue
            a, b, scale = adapter
            rows = slice(end - count, end)
            slot = _AdapterSlot(AdapterFactor(count, len(b)), rows, len(a), scale)
            self.a.pack(a.t(), rows)
            slot.b.pack(b, slice(None))
            self.slots.append(slot)

    def compute_inner(self, x_NI: Tensor) -> Tensor:
        """Return z of all linears."""
        z = x_NI.new_empty(self.a.blocks, len(x_NI), LANES)
        shape = (len(x_NI), self.a.width, self.a.blocks, torch.get_num_threads())
        call_kernel("lora_inner", x_NI, self.a.down, z, *shape)
        return z

    def add_outputs(self, outputs: Sequence[Tensor], z: Tensor) -> None:
        """Add scale * B z to the output of each linear in place."""
        for y, slot in zip(outputs, self.slots, strict=True):
            if slot:
                slot.b.add_product(y, z[slot.rows], slot.scale)

    def outputs_backward(
        self, gradients: Sequence[Tensor], z: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return dz and the gradient of each B in fp32, from each dy."""
        dz = torch.empty_like(z)
        dbs: list[Tensor | None] = []
        for dy, slot in zip(gradients, self.slots, strict=True):
            if slot is None:
                dbs.append(None)
                continue
            rows = slot.rows
            sums = slot.b.compute_grad(dy.contiguous(), z[rows], slot.scale, dz[rows])
            dbs.append(sums[:, : slot.rank].sum(0).t())
        return dz, dbs

    def add_inputs(self, dx_NI: Tensor, dz: Tensor) -> None:
        """Add dz A of all linears to dx in place."""
        self.a.add_product(dx_NI, dz, 1.0)

    def inputs_backward(self, x_NI: Tensor, dz: Tensor) -> list[Tensor | None]:
        """Return the gradient of each A in fp32."""
        sums = self.a.compute_grad(x_NI, dz, 1.0)
        das: list[Tensor | None] = []
        for slot in self.slots:
            if slot is None:
                das.append(None)
                continue
            start = slot.rows.start * LANES
            das.append(sums[:, start : start + slot.rank].sum(0))
        return das


# ---------------------------------------------------------------- rows of different adapters


@dataclass(frozen=True, eq=False)
class PackedFactors:
    """The adapter of one linear in the layouts of lora.c: y = g * (y + s B A x) + offset."""

    down: Tensor  # A
    up: Tensor  # B
    scale: float
    gain_O: Tensor | None = None  # fp32
    offset_O: Tensor | None = None  # fp32

    @property
    def nbytes(self) -> int:
        tensors = [self.down, self.up, self.gain_O, self.offset_O]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack_factors(
    a_RI: Tensor, b_OR: Tensor, scale: float, gain_O: Tensor | None, offset_O: Tensor | None
) -> PackedFactors:
    """Pack an adapter, A and B in bf16. Only the layouts of a forward stay in memory."""
    rank, in_features = a_RI.shape
    assert rank <= MAX_RANK, "lora.c has room for so many ranks"
    blocks = -(-rank // LANES)
    a = AdapterFactor(blocks, in_features)
    a.pack(a_RI.contiguous().t(), slice(None))
    b = AdapterFactor(blocks, len(b_OR))
    b.pack(b_OR.contiguous(), slice(None))
    gain_O = None if gain_O is None else gain_O.float().contiguous()
    offset_O = None if offset_O is None else offset_O.float().contiguous()
    return PackedFactors(a.down, b.up, scale, gain_O, offset_O)


class FactorsTable:
    """The factors of an adapter for each linear of a bank, None for those without, as lora.c reads
    them."""

    ENTRY = struct.Struct("@PPPPlf4x")  # Factors of lora.c

    def __init__(self, factors: Sequence[PackedFactors | None]) -> None:
        self.factors = factors  # keeps the tensors alive
        self._entries = ctypes.create_string_buffer(b"".join(map(self._encode, factors)))
        self.address = ctypes.addressof(self._entries)

    def _encode(self, factors: PackedFactors | None) -> bytes:
        if factors is None:
            return self.ENTRY.pack(0, 0, 0, 0, 0, 0.0)
        pointers = [factors.down.data_ptr(), factors.up.data_ptr()]
        for tensor in (factors.gain_O, factors.offset_O):
            pointers.append(0 if tensor is None else tensor.data_ptr())
        return self.ENTRY.pack(*pointers, len(factors.down), factors.scale)


class PackedRows:
    """The rows of a forward in tiles of one adapter each."""

    def __init__(self, groups: Sequence[tuple[FactorsTable, Tensor]]) -> None:
        """Take the table of each adapter and the indices of its rows."""
        self.tables = [table for table, _ in groups]  # keeps them alive
        tiles: list[int] = []
        order: list[int] = []
        for table, rows_n in groups:
            rows = rows_n.tolist()
            for first in range(0, len(rows), TILE_ROWS):
                count = min(TILE_ROWS, len(rows) - first)
                tiles += (table.address, len(order) + first, count)
            order += rows
        self.num_tiles = len(tiles) // 3
        self.tiles = (ctypes.c_long * len(tiles))(*tiles)
        self.order = (ctypes.c_long * len(order))(*order)


class PackedGroup:
    """The linears that share an input: where each is in a table, and its number of outputs."""

    def __init__(self, entries: Sequence[int], widths: Sequence[int]) -> None:
        self.num_linears = len(entries)
        pairs: list[int] = []
        for entry, width in zip(entries, widths, strict=True):
            pairs += (entry, width)
        self.linears = (ctypes.c_long * len(pairs))(*pairs)

    def add_outputs(self, outputs: Sequence[Tensor], x_NI: Tensor, rows: PackedRows) -> None:
        """Change W x + b of each row and linear to the outputs with the row's adapter, in place.

        It is called for each input of a step, so it converts nothing that is known before."""
        pointers = (ctypes.c_void_p * self.num_linears)(*[y.data_ptr() for y in outputs])
        library = load_library()
        assert library is not None
        library.lora_rows(
            ctypes.c_void_p(x_NI.data_ptr()),
            pointers,
            rows.tiles,
            rows.order,
            self.linears,
            ctypes.c_long(rows.num_tiles),
            ctypes.c_long(self.num_linears),
            ctypes.c_long(x_NI.shape[1]),
        )
