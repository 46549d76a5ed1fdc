"""A tiny model, prompts of unequal lengths, and a decoder that is easy to read."""

from collections.abc import Callable, Sequence

import pytest
import torch

from tiny_models import VOCABULARY, make_tiny_model
from tunesmith.model.causal_lm import PackedCausalLM


@pytest.fixture
def model() -> PackedCausalLM:
    return make_tiny_model(method=None)


@pytest.fixture
def prompts() -> list[tuple[int, ...]]:
    """Nine prompts of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 17, 9, 1, 17, 12, 5, 30, 2)
    return [
        tuple(torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths
    ]


@pytest.fixture
def spell() -> Callable[[Sequence[int]], str]:
    """Decode ids to text: one character per id, from the exclamation mark on."""

    def decode(tokens: Sequence[int]) -> str:
        return "".join(chr(33 + token) for token in tokens)

    return decode
