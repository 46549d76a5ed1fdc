"""Preflight: no document of a pack reaches another.

In: our model and a pack. Out: how many segments others were compared for, or GateError. The tokens
of each segment are changed in turn, and the hidden states of all segments that do not continue it
must stay bitwise equal.

With experts they may be rounded otherwise, since a matrix product of other rows may round a row
otherwise, and then a router that meets two equal scores may decide otherwise. So another claim
stands in for equality there: no gradient of the others' hidden states reaches the changed tokens,
exactly. Experts with a limited capacity, whose choices have no gradient, are found by comparing
blocks in a pack with documents alone (preflight_blocks.py). Layers that carry state have a backward
of their own, which may cross documents where the forward does not: their gradient is computed too,
once.

The tokens that are changed are few; a leak of later ones is one of `compare_hidden` and of the
blocks: whole documents in a pack and alone. Left out: the choice of the documents, and the losses
(preflight.py)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.core.errors import GateError
from tunesmith.core.types import Batch, PackLayout
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.experts import find_experts
from tunesmith.model.layers import MIXERS

# Largest difference of hidden states in a pack and alone, relative to their norm, in groups of 64
# tokens. In bf16 two correct computations of 25 random networks differed by up to 0.042, with
# experts by 0.18: a router that decides otherwise changes a token at once.
HIDDEN_TOLERANCE = {
    torch.bfloat16: 0.08,
    torch.float16: 0.02,
    torch.float32: 1e-3,
    torch.float64: 1e-5,
}
ROUTED_TOLERANCE = HIDDEN_TOLERANCE | {torch.bfloat16: 0.25, torch.float16: 0.25}
GROUP_TOKENS = 64
FEW_TOKENS = 8
BACKEND_FIX = "use another attention backend"


@dataclass(frozen=True)
class Isolation:
    """The number of segments that were changed. With `is_bitwise` the others stayed bitwise equal,
    else only their gradient is 0."""

    num_segments: int
    is_bitwise: bool

    @property
    def extent(self) -> str:
        """Return in what sense the others are unchanged."""
        return "bitwise" if self.is_bitwise else "by their gradient, which is 0"


def refuse_leakage(model: PackedCausalLM, batch: Batch, layout: PackLayout) -> Isolation:
    """Change the tokens of each segment in turn; only segments that continue it may change.

    `layout` says which do; the batch's own may be corrupted. Raises GateError if an unrelated
    segment changes."""
    all_positions_S = torch.arange(batch.layout.num_tokens, device=model.device)
    batch = dataclasses.replace(batch, positions_S=all_positions_S)
    has_experts = bool(find_experts(model.network))
    has_state = any(isinstance(module, MIXERS) for module in model.network.modules())
    before = None if has_experts else model.compute_hidden(batch)
    num_segments = 0
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        unrelated_U = _find_unrelated(layout, segment).to(model.device)
        if not len(unrelated_U):
            continue
        num_segments += 1
        if has_experts or (has_state and num_segments == 1):
            _refuse_gradient(model, batch, slice(start, start + length), unrelated_U)
        if before is None:
            continue
        tokens_T = batch.tokens_T.clone()
        tokens_T[start : start + length] = tokens_T[start : start + length].roll(1) + 1
        tokens_T %= model.token_rows
        after = model.compute_hidden(dataclasses.replace(batch, tokens_T=tokens_T))
        if not torch.equal(before[unrelated_U], after[unrelated_U]):
            raise GateError(
                "documents in a pack attend to each other", where="preflight", fix=BACKEND_FIX
            )
    return Isolation(num_segments, is_bitwise=not has_experts)


def compare_hidden(packed_SH: Tensor, alone_SH: Tensor, *, has_experts: bool) -> float:
    """Return the largest difference of a group of consecutive tokens relative to its norm.

    Fewer tokens than a few count as a part of them, since one may be rounded worse than most; with
    experts, fewer than a group, since one may meet another expert."""
    few = GROUP_TOKENS if has_experts else FEW_TOKENS
    worst = 0.0
    packed_groups = packed_SH.double().split(GROUP_TOKENS)
    for packed, alone in zip(packed_groups, alone_SH.double().split(GROUP_TOKENS), strict=True):
        error = float((packed - alone).norm() / alone.norm())
        error *= min(1.0, len(alone) / few) ** 0.5
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def _find_unrelated(layout: PackLayout, segment: int) -> Tensor:
    """Return the indices [U] of the tokens of segments that do not continue this one."""
    is_unrelated = [segment not in layout.get_path(i) for i in range(len(layout.lengths))]
    (indices,) = np.nonzero(np.repeat(is_unrelated, layout.lengths))
    return torch.from_numpy(indices)


def _refuse_gradient(
    model: PackedCausalLM, batch: Batch, changed: slice, unrelated_U: Tensor
) -> None:
    """Raise GateError if unrelated hidden states have a gradient at the embeddings of the `changed`
    tokens, or none at their own."""
    embeddings: list[Tensor] = []

    def make_leaf(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    hook = model.network.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        with torch.enable_grad():
            hidden_UH = model.compute_hidden(batch)[unrelated_U]
            generator = torch.Generator().manual_seed(0)
            direction_UH = torch.randn(hidden_UH.shape, generator=generator).to(hidden_UH)
            (gradient,) = torch.autograd.grad((hidden_UH * direction_UH).sum(), embeddings)
    finally:
        hook.remove()
    felt_T = gradient.reshape(batch.layout.num_tokens, -1).abs().sum(1)
    if felt_T[changed].any() or not felt_T[unrelated_U].any():
        message = "documents in a pack attend to each other"
        if not felt_T[changed].any():
            message = "gradient check inconclusive: no gradient even at a document's own tokens"
        raise GateError(message, where="preflight", fix=BACKEND_FIX)
