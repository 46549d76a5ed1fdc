"""Digests of texts and words do not depend on the pieces in which long ones are read."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tunesmith.core.types import Example
from tunesmith.data import hashing
from tunesmith.data.checks import ngrams
from tunesmith.data.checks.ngrams import hash_words
from tunesmith.data.hashing import hash_example, hash_text, iter_collapsed


def make_text(seed: int) -> str:
    draw = random.Random(seed)
    words = ["a", "Größe", "日本", "x" * 40, "\n\n", "\t", "  ", "no-one.", "\u2003"]
    return "".join(draw.choice(words) + draw.choice([" ", "   ", ""]) for _ in range(300))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_long_text_has_the_digest_that_it_has_at_once(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["", " ", "one", *map(make_text, range(20))]
    examples = [Example("x:1", text=text, prompt=texts[-1]) for text in texts]
    expected = [(hash_text(text), hash_words(text).tolist()) for text in texts]
    digests = [hash_example(example) for example in examples]
    assert len(set(digests)) == len(texts) - 1, "white space alone is the same text"
    monkeypatch.setattr(hashing, "PIECE_CHARS", size)
    monkeypatch.setattr(ngrams, "PART_BYTES", size)
    assert [(hash_text(text), hash_words(text).tolist()) for text in texts] == expected
    assert [hash_example(example) for example in examples] == digests
    assert ["".join(iter_collapsed(text)) for text in texts] == [
        " ".join(text.split()) for text in texts
    ]
    assert hash_text("a b") == hash_text("  a \n b ") != hash_text("ab")
    assert hash_words(make_text(0)).dtype == np.uint64


def test_stored_splits_keep_their_digests() -> None:
    """Rows are divided by these numbers: another one would move rows between splits."""
    assert hash_text("What is  it?\n") == 8500838188785550163
    assert hash_example(Example("x:1", text="b", prompt="a"))[0] == 12479399744289587911
