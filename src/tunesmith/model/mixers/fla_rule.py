"""The gated delta rule of a pack on an NVIDIA GPU, through the kernels of flash-linear-attention.

In: q, k, v [T, ...] in 16 bits, decays and strengths of a pack. Out: what recurrence.py computes,
differentiable by autograd. One call per depth of the pack: first all roots, then all segments that
continue them, from the states at their ends. A plain pack is one call. The package (fla-core, MIT)
is an extra and is imported for the first pack; its chunks have 64 tokens. Left out: other dtypes
and larger keys, deterministic mode, Mamba2, generation (recurrence.py). Legend: T tokens, G heads
of q and k, R heads of v for each of them, D key size, E value size, S segments of a depth."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.hardware import parse_version, upload
from tunesmith.core.types import PackLayout
from tunesmith.model.flash_attention import accumulate_lengths
from tunesmith.model.kernels.scan import ScanHeads

DTYPES = (torch.bfloat16, torch.float16)
MAX_KEY_SIZE = 256
CACHED_LAYOUTS = 16
MIN_VERSION = (0, 6)


def is_supported(active_TC: Tensor, heads: ScanHeads) -> bool:
    """Return whether the package is installed and takes the inputs of a scan."""
    return (
        heads.is_delta_rule
        and active_TC.device.type == "cuda"
        and active_TC.dtype in DTYPES
        and heads.key_size <= MAX_KEY_SIZE
        and not torch.are_deterministic_algorithms_enabled()
        and has_package()
    )


@functools.cache
def has_package() -> bool:
    """Return whether fla-core is installed, in a version that takes these arguments: older ones
    ignore those that they do not know."""
    if find_spec("fla") is None:
        return False
    try:
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:  # before its kernels had a package
        return False
    return parse_version(version) >= MIN_VERSION


@dataclass(frozen=True, eq=False)
class Level:
    """The segments of one depth. Tokens None: they are the whole pack, in its order."""

    tokens: Tensor | None
    ends: Tensor  # int64 [S + 1], the first is 0
    ends_on_host: Tensor
    parents_S: Tensor | None  # of each segment in the level before; None: they are roots


@functools.lru_cache(maxsize=CACHED_LAYOUTS)
def list_levels(layout: PackLayout, device: torch.device) -> tuple[Level, ...]:
    """Copy the depths of a pack to the device, roots first."""
    depths = [len(layout.get_path(segment)) for segment in range(len(layout.lengths))]
    levels: list[Level] = []
    ranks: dict[int, int] = {}  # of the segments of the level before
    for depth in range(1, max(depths) + 1):
        segments = [segment for segment, other in enumerate(depths) if other == depth]
        tokens: list[int] = []
        for segment in segments:
            start = layout.starts[segment]
            tokens += range(start, start + layout.lengths[segment])
        ends = accumulate_lengths([layout.lengths[i] for i in segments], torch.device("cpu")).long()
        parents = [ranks[layout.parents[i]] for i in segments] if depth > 1 else None
        levels.append(
            Level(
                tokens=upload(tokens, device) if max(depths) > 1 else None,
                ends=upload(ends, device),
                ends_on_host=ends,
                parents_S=None if parents is None else upload(parents, device),
            )
        )
        ranks = {segment: rank for rank, segment in enumerate(segments)}
    return tuple(levels)


def run_delta_rule(
    qkv: tuple[Tensor, Tensor, Tensor], decay_TGR: Tensor, beta_TGR: Tensor, layout: PackLayout
) -> Tensor:
    """Return the outputs [T, G, R, E] of q, k [T, G, D], which are normalized here, and of v
    [T, G, R, E]."""
    levels = list_levels(layout, decay_TGR.device)
    # a head of q and k serves R heads of v that follow each other
    inputs = (*qkv[:2], *(x.flatten(1, 2) for x in (qkv[2], decay_TGR, beta_TGR)))
    outputs: list[Tensor] = []
    states = None
    for level in levels:
        initial = None
        if states is not None and level.parents_S is not None:
            initial = states.index_select(0, level.parents_S)
        out, states = _run_level(inputs, level, initial, is_last=level is levels[-1])
        outputs.append(out)
    if levels[0].tokens is None:
        return outputs[0].view_as(qkv[2])
    order = torch.cat([level.tokens for level in levels if level.tokens is not None])
    total = torch.empty_like(inputs[2])
    return total.index_copy(0, order, torch.cat(outputs)).view_as(qkv[2])


def _run_level(
    inputs: tuple[Tensor, ...], level: Level, initial: Tensor | None, *, is_last: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the outputs [tokens, H, E] and, unless it is the last level, the states at the ends of
    the segments [S, H, D, E]."""
    if level.tokens is not None:
        inputs = tuple(x.index_select(0, level.tokens) for x in inputs)
    q, k, v, decay, beta = (x[None] for x in inputs)
    out, states = _load_kernels()(
        q=q,
        k=k,
        v=v,
        g=decay,
        beta=beta,
        initial_state=initial,
        output_final_state=not is_last,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=level.ends,
        cu_seqlens_cpu=level.ends_on_host,
    )
    return out[0], states


@functools.cache
def _load_kernels() -> Any:
    module = importlib.import_module("fla.ops.gated_delta_rule")  # an extra: no types
    return module.chunk_gated_delta_rule
