"""Texts by their words: the library's own ids for any text, from tokenizers that it is exact for,
and only those."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from tunesmith.data.tokenizer import pieces as module
from tunesmith.data.tokenizer.pieces import WordEncoder

TEXT = (
    "the cat's 12 hats, isn't it?  a  b\n\n\tfor x in (1, 2):\n        return f(x)  "
    "# größer — 日本語\r\n don't \u00a0\u3000 \x1c "
)
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
STEPS: dict[str, Any] = {
    "gpt-2": LEVEL,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LEVEL]),
    "numbers": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), LEVEL]),
}


def trained(steps: Any) -> Tokenizer:
    """With merges, of white space too."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = steps
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        [TEXT * 3, "    \n\n    a   b\n\n\n  !!  ..\n" * 5, "日本語 größer ¿qué? " * 5], trainer
    )
    return tokenizer


@pytest.fixture(scope="module", params=list(STEPS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(STEPS[request.param])


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


PIECES = st.lists(
    st.sampled_from(
        [*TEXT, *" \n\t\r.'s1é日", "  ", "\n\n", "'ll", "\x85", "\u2028", "\u200b", "\x1f", "the"]
    )
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(PIECES.map("".join), st.text(max_size=60)))
def test_any_text_has_the_ids_of_the_library(tokenizer: Tokenizer, text: str) -> None:
    words = WordEncoder.from_tokenizer(
        json.loads(tokenizer.to_str()), lambda piece: encode(tokenizer, piece)
    )
    assert words is not None
    assert words.encode_text(text).tolist() == encode(tokenizer, text)
    assert words.encode_text(text).tolist() == encode(tokenizer, text), "from memory"


def test_memory_has_an_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WORDS", 3)
    words = WordEncoder.from_tokenizer(
        json.loads(tokenizer.to_str()), lambda piece: encode(tokenizer, piece)
    )
    assert words is not None
    assert np.array_equal(words.encode_text(TEXT * 2), encode(tokenizer, TEXT * 2))
    assert len(words) == 3


SPLIT = {"type": "Split", "pattern": {"Regex": r"\S+\n"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    "changed",
    [
        {"pre_tokenizer": None},
        {
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "never",
                "split": False,
            }
        },
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [SPLIT, BYTES | {"use_regex": False}],
            }
        },
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits"}, BYTES, SPLIT],
            }
        },
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
        {"pre_tokenizer": BYTES | {"use_regex": False}},
        {"normalizer": {"type": "NFC"}},
        {"model": {"type": "BPE", "dropout": 0.1}},
        {"model": {"type": "Unigram"}},
    ],
)
def test_other_tokenizers_are_left_to_the_library(changed: Any) -> None:
    data = {"normalizer": None, "pre_tokenizer": BYTES, "model": {"type": "BPE", "dropout": None}}
    assert WordEncoder.from_tokenizer(data, lambda _: []) is not None
    assert WordEncoder.from_tokenizer(data | changed, lambda _: []) is None
