"""Preflight: when the logits of two correct networks differ too much, compare block by block.

In: our model, a document, and what the stock network's blocks computed on it. Out: a description of
the comparison, or GateError that names the block. Experts and recurrent layers amplify rounding: in
bf16 two correct computations of a random network differ by a tenth, and a router that decides
otherwise changes a token at once. On the stock's own inputs each block must agree, and so must the
sums between the blocks and the head. Left out: recording and running (model/layer_outputs.py),
which documents (preflight_probe.py)."""

from __future__ import annotations

import dataclasses

import torch

from tunesmith.core.errors import GateError
from tunesmith.core.types import Document
from tunesmith.data.packing import count_input_tokens
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.layer_outputs import BlockOutputs, compare_blocks
from tunesmith.session.preflight_probe import pack_documents, truncate
from tunesmith.train.preflight_base import compare_logits

# Largest difference of a correct block, relative to the norm of its output; the worst of six
# families of random networks in bf16 was 1.64%.
BLOCK_TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 3e-4, torch.float64: 1e-5}
BLOCK_FIX = "this model family is not supported yet; please report it"


def compare_with_stock_blocks(
    model: PackedCausalLM,
    document: Document,
    recorded: BlockOutputs,
) -> str:
    """Compare each block with the stock's on the stock's inputs, and the head on its final hidden
    states, for the recorded first tokens of the document.

    Raises GateError for the part that differs most, if it is over the tolerance."""
    num_tokens = len(recorded.hidden)
    batch = pack_documents([truncate(document, num_tokens)], model.device)
    all_positions_S = torch.arange(num_tokens, device=model.device)
    batch = dataclasses.replace(batch, positions_S=all_positions_S)
    comparison = compare_blocks(model, batch, recorded)
    hidden_PH = recorded.hidden.to(model.device)[list(recorded.positions)]
    logits_PV = model.head.compute_logits(hidden_PH).float()
    errors = {
        comparison.worst_path: comparison.worst,
        "the sum of the blocks": comparison.hidden,
        "the head": compare_logits(logits_PV, recorded.logits_PV.to(model.device)),
    }
    tolerance = BLOCK_TOLERANCE[model.dtype]
    for part, error in errors.items():
        if not error <= tolerance:  # also refuses NaN
            raise GateError(
                f"{part} is off by {error:.1%} of its norm from transformers', on the same inputs: "
                f"more than {tolerance:.2%}",
                where=f"preflight: {document.id}",
                fix=BLOCK_FIX,
            )
    text = (
        f"{comparison.num_blocks} blocks on transformers' inputs differ by "
        f"{max(errors.values()):.2%} at most"
    )
    if comparison.num_choices:
        counts = f"{comparison.num_equal_choices:,}/{comparison.num_choices:,}"
        text += f", router decisions equal at {counts}"
    if num_tokens < count_input_tokens(document):
        text += f" in its first {num_tokens}"
    return text
