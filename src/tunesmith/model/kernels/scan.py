"""The short convolution and the recurrence of Gated DeltaNet and Mamba2 through convolution.c and
recurrence.c: bf16 on CPUs with AVX512-BF16.

In: the inputs of a mixer's scan over a pack, and what the gradients need. Out: its outputs and
gradients. Sums, states and products are fp32, as in the torch path of model/mixers, which is the
reference; the number of threads changes nothing. Left out: other dtypes and processors, sizes of
heads that are no multiple of 16, rows of generation. Legend: T tokens, C channels, K taps, G heads
of q and k, H heads of v, E value size."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.types import PackLayout
from tunesmith.model.kernels import ops
from tunesmith.model.kernels.build import call_kernel, load_library
from tunesmith.model.machine_errors import OutOfMemory

LANES = 16  # of vectors.h
MIN_TASKS = 8  # of a document in the backward, for the threads to share
CACHED_LAYOUTS = 16


@dataclass(frozen=True)
class ScanHeads:
    """The heads of a mixer, and how its convolved channels are divided among them."""

    num_groups: int  # G
    heads_per_group: int  # H / G
    key_size: int
    value_size: int  # E
    # q, k, v with q and k normalized, or v, k, q
    is_delta_rule: bool

    @property
    def num_heads(self) -> int:
        return self.num_groups * self.heads_per_group

    def count_parts(self) -> int:
        """Return into how many parts the heads of a group are divided in the backward. Each part
        has gradients of q and k of its own."""
        for parts in range(1, self.heads_per_group):
            if self.heads_per_group % parts == 0 and parts * self.num_groups >= MIN_TASKS:
                return parts
        return 1 if self.num_groups >= MIN_TASKS else self.heads_per_group


@functools.cache
def is_available() -> bool:
    """Return whether recurrence.c was compiled and this processor has its instructions."""
    library = load_library()
    return library is not None and bool(library.recurrence_available())


def is_supported(mixed_TC: Tensor, heads: ScanHeads) -> bool:
    """Return whether the kernels can take the inputs of a scan."""
    has_lanes = heads.key_size % LANES == 0 and heads.value_size % LANES == 0
    return has_lanes and ops.is_supported(mixed_TC) and is_available()


def _call(name: str, *arguments: Tensor | int) -> None:
    if call_kernel(name, *arguments):
        fix = "lower pack_length, or free memory"
        raise OutOfMemory("no memory for the scratch space of a recurrent layer", fix=fix)


# ---------------------------------------------------------------- convolution


@dataclass(frozen=True, eq=False)
class Taps:
    """A convolution: the token k before each one on its path, -1 for none; weights and bias."""

    back_TK: Tensor
    weight_KC: Tensor  # fp32, by how far each looks back
    bias_C: Tensor | None  # fp32

    def convolve(self, mixed_TC: Tensor) -> Tensor:
        """Return silu(convolution) [T, C]."""
        active_TC = torch.empty_like(mixed_TC)
        tensors = (mixed_TC, self.weight_KC, _or_null(self.bias_C), self.back_TK, active_TC)
        call_kernel("convolve", *tensors, *mixed_TC.shape, len(self.weight_KC))
        return active_TC

    def backward(
        self, mixed_TC: Tensor, dactive_TC: Tensor, *, should_add_weights: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of the input, and of weight [K, C] and bias [C] in fp32, if they
        are wanted and there is one."""
        dmixed_TC = torch.empty_like(mixed_TC)
        dweight_KC = torch.zeros_like(self.weight_KC) if should_add_weights else None
        has_bias = should_add_weights and self.bias_C is not None
        dbias_C = torch.zeros_like(self.weight_KC[0]) if has_bias else None
        inputs = (mixed_TC, self.weight_KC, _or_null(self.bias_C), self.back_TK, dactive_TC)
        outputs = (dmixed_TC, _or_null(dweight_KC), _or_null(dbias_C))
        sizes = (*mixed_TC.shape, len(self.weight_KC))
        _call("convolve_backward", *inputs, *outputs, *sizes)
        return dmixed_TC, dweight_KC, dbias_C


def _or_null(x: Tensor | None) -> Tensor:
    """Return a tensor whose address is null if there is none."""
    return torch.empty(0) if x is None else x


# ---------------------------------------------------------------- recurrence


@functools.lru_cache(maxsize=CACHED_LAYOUTS)
def _list_segments(layout: PackLayout) -> tuple[Tensor, Tensor, Tensor]:
    parents = torch.tensor(layout.parents) if layout.parents else torch.empty(0)
    return torch.tensor(layout.starts), torch.tensor(layout.lengths), parents


def run_recurrence(
    active_TC: Tensor,
    decay_TH: Tensor,
    beta_TH: Tensor,
    skip_H: Tensor | None,
    layout: PackLayout,
    heads: ScanHeads,
) -> Tensor:
    """Return the outputs [T, H * E]."""
    out = active_TC.new_empty(len(active_TC), heads.num_heads * heads.value_size)
    inputs = (active_TC, decay_TH, beta_TH, _or_null(skip_H))
    _run(inputs, (out, *[torch.empty(0)] * 5), layout, heads, parts=1)
    return out


def run_recurrence_backward(
    dout: Tensor,
    active_TC: Tensor,
    decay_TH: Tensor,
    beta_TH: Tensor,
    skip_H: Tensor | None,
    layout: PackLayout,
    heads: ScanHeads,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the convolved channels [T, C], decay and beta [T, H] in fp32, from
    that of the outputs [T, H * E]."""
    parts = heads.count_parts()
    keys = 2 * heads.num_groups * heads.key_size
    dactive_TC = torch.empty(active_TC.shape, dtype=torch.float32)
    dkeys = torch.empty((parts, len(active_TC), keys) if parts > 1 else 0, dtype=torch.float32)
    ddecay_TH = torch.empty_like(decay_TH)
    dbeta_TH = torch.empty_like(beta_TH)
    inputs = (active_TC, decay_TH, beta_TH, _or_null(skip_H))
    outputs = (torch.empty(0), dout, dactive_TC, dkeys, ddecay_TH, dbeta_TH)
    _run(inputs, outputs, layout, heads, parts)
    if parts > 1:
        first = 0 if heads.is_delta_rule else active_TC.shape[1] - keys
        torch.sum(dkeys, 0, out=dactive_TC[:, first : first + keys])
    return dactive_TC, ddecay_TH, dbeta_TH


def _run(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    layout: PackLayout,
    heads: ScanHeads,
    parts: int,
) -> None:
    sizes = (heads.num_groups, heads.heads_per_group, heads.key_size, heads.value_size)
    counts = (len(layout.lengths), len(inputs[0]), *sizes, parts, int(heads.is_delta_rule))
    _call("recurrence", *inputs, *outputs, *_list_segments(layout), *counts)
