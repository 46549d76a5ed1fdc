"""Proof, for a family that no table names, that ours computes what transformers does.

    model = wrap_proven(network, dtype)    as `wrap_model`, or GateError

Documents of random tokens go through transformers one by one, and through ours in one pack, up to
their last token, which comes from the cache. So all that measures or answers has a proof; before
training, preflight looks closer, at rows of the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import GateError
from tunesmith.model.causal_lm import (
    DTYPES,
    Network,
    PackedCausalLM,
    compute_stock_logits,
    wrap_model,
)
from tunesmith.model.hub.families import FAMILY_FIX, TEXT_FAMILIES
from tunesmith.model.hub.text_class import LOAD_ERRORS
from tunesmith.model.paged_cache import PagedKVCache

LENGTHS = (23, 41, 17)  # tokens of the documents
# Largest relative RMS difference of centered logits. A router that decides otherwise by rounding
# changes a token; what leaves something out, or reads another document, differs by about 100%.
TOLERANCE = {"bf16": 0.5, "fp16": 0.2, "fp32": 0.01, "fp64": 1e-4}


def is_unnamed(network: Network) -> bool:
    """Return whether no table names the family of a network."""
    return network.config.model_type not in TEXT_FAMILIES


def wrap_proven(
    network: Network, dtype: torch.dtype, backend: str = "auto", **settings: Any
) -> PackedCausalLM:
    """Wrap a network. Raise GateError for one of a family that no table names, unless it computes
    the same packed and from the cache. What ranks share is left to preflight."""
    if not is_unnamed(network) or settings.get("shards") is not None:
        return wrap_model(network, dtype, backend, **settings)
    model, error = wrap_and_measure(network, dtype, backend, **settings)
    limits = {DTYPES[name]: limit for name, limit in TOLERANCE.items()}
    if not error <= limits[dtype]:  # also refuses NaN
        message = f"its logits, packed or cached, differ from transformers' by {error:.0%}"
        raise _make_error(network, message)
    return model


def wrap_and_measure(
    network: Network, dtype: torch.dtype, backend: str = "auto", **settings: Any
) -> tuple[PackedCausalLM, float]:
    """Wrap a network; return it and how much its logits differ from those before, relative to their
    norm: in the pack, or from the cache. Raise GateError if it cannot compute them."""
    generator = torch.Generator().manual_seed(0)
    embedding: Any = network.get_input_embeddings()
    rows = len(embedding.weight)  # Gemma 4 has a second table of tokens, which can be smaller
    rows = min(rows, getattr(network.config, "vocab_size_per_layer_input", rows))
    ids = torch.randint(rows, (sum(LENGTHS),), generator=generator)
    documents = [part.tolist() for part in ids.split(LENGTHS)]
    stock = [compute_stock_logits(network, tokens, range(len(tokens))) for tokens in documents]
    try:
        model = wrap_model(network, dtype, backend, **settings)
        ours_PV = _compute_logits(model, documents)
    except LOAD_ERRORS as error:
        message = f"it cannot be packed: {type(error).__name__}: {str(error)[:200]}"
        raise _make_error(network, message) from error
    parts = [part[:-1] for part in stock] + [part[-1:] for part in stock]
    stock_PV = torch.cat(parts)
    stock_PV -= stock_PV.mean(-1, keepdim=True)
    ours_PV -= ours_PV.mean(-1, keepdim=True)
    # few tokens come from the cache, and a mean over all would hide them
    pieces = (slice(None, -len(documents)), slice(-len(documents), None))
    errors = [(ours_PV[at] - stock_PV[at]).norm() / stock_PV[at].norm() for at in pieces]
    return model, float(torch.stack(errors).max())


@torch.no_grad()
def _compute_logits(model: PackedCausalLM, documents: list[list[int]]) -> Tensor:
    """Return fp32 logits [P, V] of all tokens but the last of each document, then of these."""
    cache = PagedKVCache(len(documents), len(documents))  # a document is shorter than a block
    rows = [cache.add_row() for _ in documents]
    prompts = [tokens[:-1] for tokens in documents]
    lengths = [len(tokens) for tokens in documents]
    prompt_PH = model.prefill(rows, prompts, cache, lengths, [len(part) for part in prompts])
    last_BH = model.decode_step(rows, [tokens[-1] for tokens in documents], cache)
    return model.head.compute_logits(torch.cat((prompt_PH, last_BH))).float()


def _make_error(network: Network, reason: str) -> GateError:
    """Return the refusal of a family."""
    config: Any = network.config
    message = f"{config.model_type} is a family that tunesmith does not know: {reason}"
    return GateError(message, where=str(config.name_or_path), fix=FAMILY_FIX)
