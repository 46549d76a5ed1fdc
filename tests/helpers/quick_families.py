"""The families that `make test` runs on: one of each kind of layer. `make slow` runs all others."""

from collections.abc import Iterable
from typing import Any

import pytest

QUICK_FAMILIES = {
    *("llama", "llama-tied", "qwen3"),  # plain; norms of queries and keys
    *("gemma2", "granite"),  # windows, caps, norms after each block; multipliers
    *("gpt2", "phi"),  # learned positions, stored transposed; partial rotation, layer norms
    *("gemma4", "gemma4_text"),  # shared keys and values, inputs of each layer
    *("deepseek_v3", "qwen3_moe", "gpt_oss"),  # latent attention, experts, sinks
    *("qwen3_5", "qwen3_5_text", "qwen3_next", "olmo_hybrid"),  # three forms of the delta rule
    *("lfm2", "nemotron_h"),  # convolutions, states
    *("phi3-128k", "llama-dynamic"),  # rotation by length
}


def leave_others_to_slow(cases: Iterable[Any]) -> list[Any]:
    """Mark each case of another family as slow; the family of a tuple is its first element."""
    marked: list[Any] = []
    for case in cases:
        family = case if isinstance(case, str) else case[0]
        marks = () if family in QUICK_FAMILIES else pytest.mark.slow
        marked.append(pytest.param(case, marks=marks))
    return marked
