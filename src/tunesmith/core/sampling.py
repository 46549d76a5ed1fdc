"""Sampling options of generated answers, under the names of transformers and vLLM.

In: numbers from a user. Out: a checked `SamplingParams`. Left out: applying them
(model/generation/sampling.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunesmith.core.errors import InputError

MAX_SEED = 2**63 - 1
SAMPLED_ONLY = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}  # key -> no effect


@dataclass(frozen=True)
class SamplingParams:
    """How each next token is chosen; the default is greedy.

    The order is that of transformers: repetition_penalty, temperature, top_k, top_p, min_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 512


RANGES = {
    "temperature": (0.0, 100.0, "from 0 (greedy) to 100"),
    "top_p": (math.ulp(0.0), 1.0, "above 0 and at most 1"),
    "top_k": (-1, math.inf, "0 for all tokens, or a number of tokens"),
    "min_p": (0.0, 1.0, "from 0 to 1"),
    "repetition_penalty": (1e-6, 100.0, "above 0; 1 is none"),
    "seed": (0, MAX_SEED, "an integer of at least 0"),
    "max_new_tokens": (1, math.inf, "at least 1"),
}


def check_sampling(params: SamplingParams) -> None:
    """Raise InputError for a value out of range, and for one that has no effect on greedy
    decoding."""
    for key, (low, high, description) in RANGES.items():
        value = getattr(params, key)
        if not low <= value <= high or math.isinf(value):
            raise InputError(f"{key} is {value:g}", where=key, fix=f"use a number {description}")
    if params.temperature > 0:
        return
    for key, neutral in SAMPLED_ONLY.items():
        is_neutral = getattr(params, key) == neutral or (key, params.top_k) == ("top_k", -1)
        if not is_neutral:
            message = f"{key} has no effect at temperature 0, which takes the most likely token"
            raise InputError(message, where=key, fix="add a temperature: --temperature 0.7")
