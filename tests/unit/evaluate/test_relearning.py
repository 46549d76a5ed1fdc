"""The same targets by themselves and after other texts; only what stands before them differs."""

import numpy as np
import pytest

from tunesmith.core.types import Document
from tunesmith.evaluate.general_text import GeneralText, measure_bits_per_byte
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.relearning import measure_after_shots
from tunesmith.model.causal_lm import PackedCausalLM

TEXTS = [
    GeneralText(f"g:{n}", text, "a")
    for n, text in enumerate(["one two", "three four five", "six", "seven 8"])
]


def spelt(text: str) -> list[int]:
    return list(text.encode())


def bits(model: PackedCausalLM, shots: int, window: int = 200) -> tuple[float, ...]:
    return measure_after_shots(model, TEXTS, spelt, shots=shots, window=window, task="t").values


def test_without_shots_it_is_what_is_always_measured(model: PackedCausalLM) -> None:
    assert bits(model, 0) == pytest.approx(
        measure_bits_per_byte(model, TEXTS, spelt, window=200).values, rel=1e-6
    )


def test_with_shots_a_text_is_measured_after_the_next_ones(model: PackedCausalLM) -> None:
    tokens = np.array(list(b"six" + b"seven 8" + b"three four five"), np.int32)
    weights = np.zeros(len(tokens), np.float32)
    weights[len(b"six" + b"seven 8") + 1 :] = 1
    ((_, nats, count),) = compute_nll(model, [Document("g:1", tokens, weights)], 200)
    assert count == len(TEXTS[1].text) - 1
    assert bits(model, 2)[1] == pytest.approx(nats / np.log(2) / len(TEXTS[1].text), rel=1e-6)
    assert bits(model, 2) != pytest.approx(bits(model, 0), rel=1e-3)


def test_what_does_not_fit_leaves_the_beginning_of_the_shots_out(model: PackedCausalLM) -> None:
    assert bits(model, 2, window=8)[2] != pytest.approx(bits(model, 2)[2], rel=1e-4)
    longest = max(len(text.text) for text in TEXTS)
    assert bits(model, 2, window=longest)[1] == pytest.approx(bits(model, 0)[1], rel=1e-6), (
        "no room for shots"
    )
