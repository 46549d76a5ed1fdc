"""Preflight: the length of a pack does not change how its documents are rotated.

In: our model, whose rotary embedding depends on the length, and the probed documents. Out: a
CheckResult, or GateError. Left out: rotary embeddings that depend on the position only, which have
nothing to check here; the blocks that use them (preflight_blocks.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.core.types import Batch
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.rotary import DocumentRotary
from tunesmith.session.preflight_probe import (
    PreflightSamples,
    choose_packed_documents,
    pack_beyond,
)
from tunesmith.train.preflight_tokens import REPORT_FIX

# Largest difference of two correct cosines or sines.
ROTATION_TOLERANCE = 1e-4


def check_rotation(
    model: PackedCausalLM,
    rotary: DocumentRotary,
    samples: PreflightSamples,
    corrupt: Callable[[Batch], Batch] = lambda batch: batch,
) -> CheckResult:
    """Check that each document of a pack is rotated as if it were alone.

    For rotary embeddings that depend on the length: the shortest documents and the longest one, in
    a pack of more tokens than the limit from which on they do."""
    documents = choose_packed_documents(samples.documents)
    batch = pack_beyond(documents, rotary.longest_limit, model.device)
    layout = batch.layout
    model.set_layout(corrupt(batch).layout)
    x = torch.empty(0, dtype=torch.float32, device=model.device)
    worst = 0.0
    for arguments in rotary.list_layer_types():
        tables = rotary(x, batch.positions_T[None], *arguments)
        alone: dict[int, tuple[Tensor, Tensor]] = {}
        for start, length in zip(layout.starts, layout.lengths, strict=True):
            if length not in alone:
                alone[length] = rotary.compute_alone(x, length, *arguments)
            for packed_1TD, alone_1LD in zip(tables, alone[length], strict=True):
                difference = packed_1TD[:, start : start + length] - alone_1LD
                worst = max(worst, float(difference.abs().max()))
    if not worst <= ROTATION_TOLERANCE:
        raise GateError(
            f"the length of a pack changes the rotation of its documents by {worst:.2g}",
            where="preflight",
            fix=REPORT_FIX,
        )
    lengths = f"{min(layout.lengths)} to {max(layout.lengths)} tokens"
    evidence = (
        f"{len(layout.lengths)} documents of {lengths} in a pack of {layout.num_tokens:,}, "
        f"difference at most {worst:.1e}"
    )
    return CheckResult.from_items(
        "rotation per document", len(layout.lengths), evidence, if_none="there is no document"
    )


def is_rotated_otherwise(
    model: PackedCausalLM, rotary: DocumentRotary, samples: PreflightSamples
) -> bool:
    """Return whether a document would be rotated otherwise by the length of its pack."""
    documents = choose_packed_documents(samples.documents)
    layout = pack_beyond(documents, rotary.longest_limit).layout
    x = torch.empty(0, dtype=torch.float32, device=model.device)
    for arguments in rotary.list_layer_types():
        as_pack = rotary.compute_alone(x, layout.num_tokens, *arguments)
        for length in set(layout.lengths):
            alone = rotary.compute_alone(x, length, *arguments)
            for pack_1TD, alone_1LD in zip(as_pack, alone, strict=True):
                if (pack_1TD[:, :length] - alone_1LD).abs().max() > ROTATION_TOLERANCE:
                    return True
    return False
