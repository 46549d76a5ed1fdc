"""What the tokenizers library gets at once is bounded, also where normalization makes it longer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from hostile_rows import NOW
from toy_chat import CHATML, write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.core.types import Example
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.tokenizer import chat_tokenizer, pieces
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer
from tunesmith.data.tokenizer.pieces import CUT_BYTES, estimate_growth, split_grown_text

LIGATURE = "\ufdfa"  # eighteen letters and spaces in NFKD
WORDS = f"a{LIGATURE}b the end "


def write_normalizing(folder: Path, normalizer: Any) -> Path:
    model = write_model_folder(folder, CHATML)
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}))
    return model


@pytest.mark.parametrize("form", ["NFKD", "NFKC", "NFD", "NFC"])
def test_no_letter_grows_more_than_its_form_says(form: str) -> None:
    normalizer = Tokenizer.from_str(
        json.dumps(
            {"version": "1.0", "added_tokens": [], "normalizer": {"type": form},
             "model": {"type": "BPE", "vocab": {}, "merges": []}}
        )
    ).normalizer  # fmt: skip
    growth = estimate_growth({"type": "Sequence", "normalizers": [{"type": form}]})
    for code in (*range(1, 0xD800), *range(0xE000, 0x30000)):
        char = chr(code)
        grown = len(normalizer.normalize_str(char).encode()) / len(char.encode())
        assert grown <= growth, hex(code)


def test_growth_of_steps() -> None:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    assert estimate_growth(None) == 1
    assert estimate_growth({"type": "Sequence", "normalizers": [replace]}) == 1
    assert estimate_growth(replace | {"content": "xyz"}) == 12
    assert estimate_growth({"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 2}) == 324


def test_a_text_that_grows_is_cut_between_words_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_normalizing(tmp_path / "m", {"type": "NFKD"})
    tokenizer = ChatTokenizer.from_folder(folder)
    text = WORDS * 300
    expected = tokenizer.encode(text, is_start=True)
    monkeypatch.setattr(chat_tokenizer, "MAX_PIECE_CHARS", 1000)
    monkeypatch.setattr(pieces, "MAX_PIECE_CHARS", 2**18)
    monkeypatch.setattr(pieces, "MAX_PIECE_BYTES", 8000)
    monkeypatch.setattr(pieces, "CUT_BYTES", 4000)
    monkeypatch.setattr(pieces, "BLOCK_CHARS", 64)
    sizes: list[int] = []
    for piece in split_grown_text(text, tokenizer._normalize):
        sizes.append(len(tokenizer._normalize(piece).encode()))
    assert len(sizes) > 3
    assert max(sizes) <= 4000
    assert sum(sizes) == len(tokenizer._normalize(text).encode())
    assert [i for ids in tokenizer.iter_run_ids(text, is_start=True) for i in ids] == expected
    for encode in (tokenizer.encode_continuation, lambda t: tokenizer.encode(t, is_start=True)):
        with pytest.raises(InputError, match="without a space between words become"):
            encode(LIGATURE * 1000)
    assert tokenizer.encode("a" * 3000, is_start=True), "what does not grow is not refused"


def test_a_long_text_of_ligatures_is_refused_and_one_without_growth_is_not() -> None:
    def grow(text: str) -> str:
        return text * 4

    with pytest.raises(InputError, match="become"):
        list(split_grown_text("日" * 200_000, grow))
    assert len(list(split_grown_text("日" * 60_000, str))) == 1
    assert len(list(split_grown_text("日" * 200_000, "".join))) == 4
    normalizer = normalizers.BertNormalizer()  # puts spaces around each
    assert len(list(split_grown_text("日" * 200_000, normalizer.normalize_str))) == 4
    with pytest.raises(InputError, match=r"4,096 characters .* become 1,638,400 bytes"):
        list(split_grown_text(" ab" * 3_000, lambda text: text * 400))
    words = list(split_grown_text("日本 " * 70_000, grow))
    assert max(len(grow(piece).encode()) for piece in words) <= CUT_BYTES
    assert "".join(words) == "日本 " * 70_000


def test_batches_are_bounded_after_normalization() -> None:
    texts = ["a" * 10_000] * 100
    sizes = [sum(map(len, batch)) for batch in chat_tokenizer._iter_batches(texts, 18)]
    assert sum(sizes) == 1_000_000
    assert max(sizes) * 18 <= chat_tokenizer.MAX_BATCH_BYTES
    assert [len(batch) for batch in chat_tokenizer._iter_batches(["a" * 2**21] * 2, 1)] == [1, 1]


def test_a_row_of_too_many_tokens_is_refused_before_they_are_all_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path / "m", CHATML), now=NOW)
    monkeypatch.setattr(chat_tokenizer, "MAX_PIECE_CHARS", 100)
    monkeypatch.setattr(chat_tokenizer, "MAX_ROW_TOKENS", 1000)
    assert len(renderer.encode_text("qx" * 500)) == 1000
    with pytest.raises(InputError, match="more than 1,000 tokens"):
        renderer.encode_text("qx" * 501)
    pair = [{"role": "user", "content": "qx" * 20}, {"role": "assistant", "content": "yes"}]
    weights = (0.0, 1.0) * 50
    with pytest.raises(InputError, match="x:1: more than 1,000 tokens"):
        renderer.render(Example("x:1", messages=tuple(pair * 50), turn_weights=weights))
    assert sum(map(len, renderer.iter_text_ids("qx" * 800))) > 1000, "texts are packed in parts"
