"""The skinny products of adapters through lora.c: bf16 on CPUs with AVX512-BF16, about half of
oneDNN's time.

In: the adapters of linears that share one input; out: their inner activations, what they add and
their gradients. Sums are fp32 and rounded once; the same number of threads gives the same bits.
Left out: dropout, other dtypes and processors (lora.py's torch path, which is also the reference).
Legend: N rows, I inputs, O outputs, R rank, V blocks of 16 ranks; z [V, N, 16] = A x, block by
block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tunesmith.model.kernels import ops

LANES, STRIP = 16, 32  # lora.c's
# of one forward; packing takes longer than it saves for the few rows of a generation step
MIN_ROWS = 64
Adapter = tuple[Tensor, Tensor, float]  # A [R, I], B [O, R], scale


@functools.cache
def is_available() -> bool:
    """Was lora.c compiled, and for a processor that has what it needs?"""
    compiled = ops.load_library()
    return compiled is not None and bool(compiled.lora_available())


def is_supported(x_NI: Tensor, adapters: Sequence[Adapter | None]) -> bool:
    widths = [x_NI.shape[1], *(len(adapter[1]) for adapter in adapters if adapter)]
    is_aligned = x_NI.is_contiguous() and not any(width % 2 for width in widths)
    return is_aligned and ops.is_supported(x_NI) and is_available()


class AdapterFactor:
    """A tall matrix [W, R], or several side by side, in the two orders that lora.c reads."""

    def __init__(self, blocks: int, width: int) -> None:
        self.blocks, self.width, self.padded_width = blocks, width, -(-width // STRIP) * STRIP
        self.down = torch.empty(blocks, width // 2, LANES, dtype=torch.int32)
        self.up = torch.empty(blocks, LANES // 2, self.padded_width, dtype=torch.int32)

    def pack(self, m_WR: Tensor, blocks: slice) -> None:
        """m_WR: bf16, or its transpose, contiguous."""
        source = m_WR if m_WR.is_contiguous() else m_WR.t()
        ops.call_kernel(
            "lora_pack", source, self.down[blocks], self.up[blocks], *m_WR.shape, *m_WR.stride()
        )

    def add_product(self, y_NW: Tensor, z: Tensor, scale: float) -> None:
        """y += scale * z m^T"""
        shape = len(y_NW), self.width, self.blocks, torch.get_num_threads()
        ops.call_kernel("lora_add", y_NW, z, self.up, *shape, float(scale))

    def compute_grad(
        self, x_NW: Tensor, z: Tensor, scale: float, dz: Tensor | None = None
    ) -> Tensor:
        """scale * z^T x of each thread's rows [threads, V * 16, W]; also dz = scale * x m where
        `dz` is given."""
        shape = len(x_NW), self.width, self.blocks, torch.get_num_threads()
        sums = torch.empty(shape[-1], self.blocks * LANES, self.padded_width)
        null = z.new_empty(0)  # a null pointer
        outputs = (null, null) if dz is None else (self.down, dz)
        ops.call_kernel("lora_gradient", x_NW, z, *outputs, sums, *shape, float(scale))
        return sums[..., : self.width]


@dataclass(frozen=True, eq=False)
class _AdapterSlot:
    """One linear's adapter among those of its input: `rows` of z are its own."""

    b: AdapterFactor
    rows: slice
    rank: int
    scale: float


class PackedAdapters:
    """The adapters of several linears on one input, None for a linear without one: lists of all
    methods are aligned."""

    def __init__(self, adapters: Sequence[Adapter | None]) -> None:
        blocks = [-(-len(adapter[0]) // LANES) if adapter else 0 for adapter in adapters]
        self.a = AdapterFactor(
            sum(blocks), next(adapter[0].shape[1] for adapter in adapters if adapter)
        )
        self.slots: list[_AdapterSlot | None] = []
        for adapter, count, end in zip(adapters, blocks, accumulate(blocks), strict=True):
            slot = None
            if adapter:
                a, b, scale = adapter
                slot = _AdapterSlot(
                    AdapterFactor(count, len(b)), slice(end - count, end), len(a), scale
                )
                self.a.pack(a.t(), slot.rows)
                slot.b.pack(b, slice(None))
            self.slots.append(slot)

    def compute_inner(self, x_NI: Tensor) -> Tensor:
        """z of all linears."""
        z = x_NI.new_empty(self.a.blocks, len(x_NI), LANES)
        shape = len(x_NI), self.a.width, self.a.blocks, torch.get_num_threads()
        ops.call_kernel("lora_inner", x_NI, self.a.down, z, *shape)
        return z

    def add_outputs(self, outputs: Sequence[Tensor], z: Tensor) -> None:
        """y += scale * B z of each linear."""
        for y, slot in zip(outputs, self.slots, strict=True):
            if slot:
                slot.b.add_product(y, z[slot.rows], slot.scale)

    def outputs_backward(
        self, gradients: Sequence[Tensor], z: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """From each dy: dz, and the gradient of each B in fp32."""
        dz = torch.empty_like(z)
        dbs: list[Tensor | None] = []
        for dy, slot in zip(gradients, self.slots, strict=True):
            sums = slot and slot.b.compute_grad(
                dy.contiguous(), z[slot.rows], slot.scale, dz[slot.rows]
            )
            dbs.append(None if sums is None or slot is None else sums[:, : slot.rank].sum(0).t())
        return dz, dbs

    def add_inputs(self, dx_NI: Tensor, dz: Tensor) -> None:
        """dx += dz A of all linears at once."""
        self.a.add_product(dx_NI, dz, 1.0)

    def inputs_backward(self, x_NI: Tensor, dz: Tensor) -> list[Tensor | None]:
        """The gradient of each A in fp32."""
        sums = self.a.compute_grad(x_NI, dz, 1.0)
        rank_ranges = [
            (slot.rows.start * LANES, slot.rank) if slot else None for slot in self.slots
        ]
        return [
            sums[:, rank_range[0] : rank_range[0] + rank_range[1]].sum(0) if rank_range else None
            for rank_range in rank_ranges
        ]
