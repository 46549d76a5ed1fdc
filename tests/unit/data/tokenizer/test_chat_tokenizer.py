"""Plain text to ids beside the full tokenizer of the tokenizers library."""

import base64
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from toy_chat import CHATML_TOKENS, make_newline_bpe, make_sentence_bpe, write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.data.chat_template.encode import TrackedText, encode
from tunesmith.data.chat_template.tracked_str import concat, make_origin, track_str
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer

WORDS = [
    "user",
    " the",
    "\n",
    "  ",
    "é",
    "e\u0301",
    "🤗",
    "12",
    " ",
    "<",
    "|>",
    "<b>",
    "</b>",
    "ß\t",
    "\u3000",
    "日本",
]


def kinds(path: Path) -> dict[str, set[str]]:
    tokenizer = ChatTokenizer.from_folder(path)
    structural = {text for text, control in tokenizer.controls.items() if control.is_structural}
    return {"structural": structural, "control": set(tokenizer.controls) - structural}


def test_three_kinds_of_added_tokens(tmp_path: Path) -> None:
    tokens = [*CHATML_TOKENS, "<table>", "</table>", "<alone>", "<s>", "</s>", "<|x>", "<x|>"]
    plain = [
        AddedToken(text, special=False, normalized=False)
        for text in ("<|y>", "<y|>", "<|fim|>", "<pad>", "</pad>")
    ]
    tokens_by_kind = kinds(
        write_model_folder(tmp_path, tokens=[*tokens, *plain], pad_token="<pad>")
    )
    assert tokens_by_kind["structural"] == {"<think>", "</think>", "<|y>", "<y|>"}
    assert tokens_by_kind["control"] == {
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<alone>", "<|x>", "<x|>", "<|fim|>",
        "<pad>", "</pad>",
    }  # fmt: skip


def test_added_tokens_that_plain_text_makes_anyway_are_vocabulary(tmp_path: Path) -> None:
    newline = AddedToken("\n\n", special=False, normalized=False)
    path = write_model_folder(tmp_path, tokens=[newline, "<eos>"], base=make_newline_bpe())
    tokenizer = ChatTokenizer.from_folder(path)
    assert set(tokenizer.controls) == {"<unk>", "<eos>"}
    assert (
        tokenizer.encode("a\n\nb", is_start=True)
        == Tokenizer.from_file(str(path / "tokenizer.json")).encode("a\n\nb").ids
    )


@pytest.mark.parametrize("kind", ["bytes", "prepend", "first", "always", "none"])
def test_runs_between_control_tokens_equal_the_full_tokenizer(tmp_path: Path, kind: str) -> None:
    path = write_model_folder(tmp_path, base=None if kind == "bytes" else make_sentence_bpe(kind))
    tokenizer, full = (
        ChatTokenizer.from_folder(path),
        Tokenizer.from_file(str(path / "tokenizer.json")),
    )
    draw = random.Random(kind)
    for _ in range(200):
        parts = draw.choices([*WORDS, "<|im_start|>", "<|im_end|>"], k=draw.randint(1, 12))
        text = track_str("".join(parts))
        assert encode(TrackedText(text, tokenizer, ())).ids == full.encode("".join(parts)).ids, (
            parts
        )


@pytest.mark.parametrize("strips", [(True, False), (False, True), (True, True)])
def test_tokens_that_swallow_white_space_do_so_here_too(
    tmp_path: Path, strips: tuple[bool, bool]
) -> None:
    greedy = AddedToken("<|g|>", special=True, normalized=False, lstrip=strips[0], rstrip=strips[1])
    path = write_model_folder(tmp_path, tokens=["<|im_end|>", greedy])
    tokenizer, full = (
        ChatTokenizer.from_folder(path),
        Tokenizer.from_file(str(path / "tokenizer.json")),
    )
    draw = random.Random(1)
    for _ in range(200):
        text = "".join(
            draw.choices([" ", "\n", "\u3000", "\u2028", "\x1c", "x", "<|g|>", "<|im_end|>"], k=10)
        )
        assert encode(TrackedText(track_str(text), tokenizer, ())).ids == full.encode(text).ids, (
            repr(text)
        )


def test_single_words_count_only_alone(tmp_path: Path) -> None:
    path = write_model_folder(
        tmp_path, tokens=[AddedToken("end", special=True, normalized=False, single_word=True)]
    )
    tokenizer, full = (
        ChatTokenizer.from_folder(path),
        Tokenizer.from_file(str(path / "tokenizer.json")),
    )
    texts = ["end", "the end.", "endless", "bend", "_end", " end\nend", "éend", "end-end"]
    for text in [*texts, "{end}", "`end", "end_", "e end x"]:
        assert encode(TrackedText(track_str(text), tokenizer, ())).ids == full.encode(text).ids, (
            text
        )


def test_the_longest_control_token_wins(tmp_path: Path) -> None:
    path = write_model_folder(tmp_path, tokens=["<|a|>", "<|a|><|b|>", "<|ab|>", "<|", "x.*"])
    tokenizer, full = (
        ChatTokenizer.from_folder(path),
        Tokenizer.from_file(str(path / "tokenizer.json")),
    )
    for text in ("<|a|><|b|>", "<|a|><|a|><|b|", "<|ab|><|abc", "x.*xyz", "<||a|>"):
        assert encode(TrackedText(track_str(text), tokenizer, ())).ids == full.encode(text).ids, (
            text
        )


def test_a_continuation_gets_no_space_of_its_own(tmp_path: Path) -> None:
    for kind in ("prepend", "first", "always", "none"):
        tokenizer = ChatTokenizer.from_folder(
            write_model_folder(tmp_path / kind, base=make_sentence_bpe(kind))
        )
        assert tokenizer.decode(tokenizer.encode_continuation("user")) == "user"
        assert tokenizer.decode(tokenizer.encode_continuation(" user")) == " user"
        in_front = "" if kind == "none" else " "
        assert tokenizer.decode(tokenizer.encode("user", is_start=True)) == in_front + "user"
        assert (
            tokenizer.decode(tokenizer.encode("user", is_start=False))
            == (in_front if kind != "first" else "") + "user"
        )


def test_a_token_matched_after_normalisation_is_refused_where_that_matters(tmp_path: Path) -> None:
    fragile = AddedToken("<|n|>", special=True, normalized=True)
    base = json.loads(make_sentence_bpe("prepend"))
    tokenizer = ChatTokenizer.from_folder(
        write_model_folder(tmp_path, tokens=[fragile], base=json.dumps(base))
    )
    with pytest.raises(InputError, match=r"normalization changes the added token '<\|n\|>'"):
        TrackedText(track_str("a<|n|>b"), tokenizer, ())
    from_row = concat([track_str("a"), track_str("<|n|>", make_origin(0, "content"))])
    assert TrackedText(from_row, tokenizer, ()).has_control_like_text


def test_a_control_token_that_plain_text_would_make_is_refused(tmp_path: Path) -> None:
    """A vocabulary whose merges reach a special token: no text may use them."""
    base = json.loads(make_sentence_bpe("none"))
    base["model"]["vocab"] |= {"<e": 600, "<eo": 601, "<eos": 602, "<eos>": 603}
    base["model"]["vocab"] |= {
        letter: 610 + i for i, letter in enumerate("<>eos") if letter not in base["model"]["vocab"]
    }
    base["model"]["merges"][:0] = [["<", "e"], ["<e", "o"], ["<eo", "s"], ["<eos", ">"]]
    special = AddedToken("<eos>", special=True, normalized=False)
    tokenizer = ChatTokenizer.from_folder(
        write_model_folder(tmp_path, tokens=[special], base=json.dumps(base))
    )
    with pytest.raises(InputError, match="the control token '<eos>' from plain text"):
        tokenizer.encode("x<eos>", is_start=True)


def test_what_stands_in_front_of_plain_text(tmp_path: Path) -> None:
    tokens = ["<|endoftext|>", "<|bos|>"]
    with_bos = ChatTokenizer.from_folder(
        write_model_folder(tmp_path / "a", tokens=tokens, bos="<|bos|>")
    )
    assert with_bos.bos_ids == (with_bos.token_to_id("<|bos|>"),)
    assert (
        ChatTokenizer.from_folder(write_model_folder(tmp_path / "b", tokens=tokens)).bos_ids == ()
    )
    off = write_model_folder(tmp_path / "c", tokens=tokens, bos="<|bos|>", add_bos_token=False)
    assert ChatTokenizer.from_folder(off).bos_ids == ()


def test_a_post_processor_that_changes_plain_text_is_refused(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    token = {"id": "<|endoftext|>", "ids": [400], "tokens": ["<|endoftext|>"]}
    only = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": only,
        "pair": only,
        "special_tokens": {"<|endoftext|>": token},
    }
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match="before plain text, or changes its ids") as caught:
        ChatTokenizer.from_folder(folder)
    assert caught.value.where.endswith("tokenizer.json")


def test_names_and_end_tokens_come_from_the_config_files(tmp_path: Path) -> None:
    path = write_model_folder(
        tmp_path,
        eos_token={"content": "<|im_end|>", "lstrip": False},
        extra_special_tokens={"image_token": "<|i|>"},
    )
    ends = [
        Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id(text)
        for text in ("<|endoftext|>", "<|im_end|>")
    ]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (path / "special_tokens_map.json").write_text('{"pad_token": "<|endoftext|>"}')
    tokenizer = ChatTokenizer.from_folder(path)
    assert tokenizer.special_tokens == {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "image_token": "<|i|>",
    }
    assert tokenizer.end_ids == tuple(ends)
    assert tokenizer.eos_id == ends[1]


def test_added_tokens_of_the_config_count_as_they_do_in_transformers(tmp_path: Path) -> None:
    def token(text: str, **flags: bool) -> dict[str, object]:
        return {"content": text, "special": True, "normalized": False, **flags}

    path = write_model_folder(
        tmp_path,
        tokens=["<|endoftext|>", "<|a|>", "<x>"],
        tokenizer_class="PreTrainedTokenizerFast",
    )
    first = Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id("<|a|>")
    config = json.loads((path / "tokenizer_config.json").read_text())
    more = [token("<|a|>", rstrip=True), token("<x>"), token("<|new|>", lstrip=True)]
    config["added_tokens_decoder"] = {str(first + i): entry for i, entry in enumerate(more)}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, stock = ChatTokenizer.from_folder(path), AutoTokenizer.from_pretrained(path)
    text = "b<|a|>  c <x> d <|new|>e<|endoftext|>"
    assert encode(TrackedText(track_str(text), tokenizer, ())).ids == stock.encode(text)
    assert tokenizer.decode(stock.encode(text)) == stock.decode(stock.encode(text))


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        ChatTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError, match="not valid JSON"):
        ChatTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "Magic"}}')
    with pytest.raises(InputError, match="unknown model 'Magic'"):
        ChatTokenizer.from_folder(tmp_path)
    path = write_model_folder(tmp_path)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        ChatTokenizer.from_folder(path)


def nested_tokens(count: int) -> dict[str, Any]:
    contents = ["<" + "a" * length for length in range(1, count + 1)]
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    tokens = [
        {"id": 400 + i, "content": text, "special": True, **flags}
        for i, text in enumerate(contents)
    ]
    return {"added_tokens": tokens}


def added_token(**fields: Any) -> dict[str, Any]:
    return {"added_tokens": [{"id": 400, "content": "<x>", "special": True, **fields}]}


MALFORMED: list[dict[str, Any]] = [
    {"model": {"type": "Unigram", "unk_id": [1], "vocab": [["a", 0.0]]}},
    {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}},
    {"model": {"type": "Unigram", "unk_id": {}, "vocab": [["a", 0.0]]}},
    {"model": {"type": "WordLevel", "unk_token": ["x"], "vocab": {}}},
    {"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {}}},
    {"model": {"type": ["BPE"]}},
    {"model": {"type": "BPE", "vocab": [], "merges": 3}},
    {"normalizer": 3},
    {"normalizer": {}},
    {"normalizer": {"type": 3}},
    {"normalizer": {"type": "Sequence", "normalizers": 3}},
    {"normalizer": {"type": "Sequence", "normalizers": [3]}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "(?"}, "content": "a"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": 3}},
    {"pre_tokenizer": []},
    {"pre_tokenizer": {"pretokenizers": []}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": None}},
    {"post_processor": {"type": "TemplateProcessing", "single": "x"}},
    {"post_processor": []},
    {"decoder": {"type": "Sequence", "decoders": [1]}},
    {"added_tokens": {}},
    {"added_tokens": None},
    added_token(id=-1),
    added_token(id=2**31),
    added_token(id=10**30),
    added_token(special=None),
    added_token(content=["x"]),
]


@pytest.mark.parametrize("parts", MALFORMED, ids=str)
def test_fault_11_a_malformed_tokenizer_is_an_input_error(
    parts: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_model_folder(tmp_path)
    file = path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    with suppress(InputError):
        tokenizer = ChatTokenizer.from_folder(path)
        tokenizer.decode(tokenizer.encode("some text", is_start=True))
    assert "panicked" not in capfd.readouterr().err  # Rust writes its own lines


def test_fault_11_a_random_table_of_sentencepiece_is_an_input_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_model_folder(tmp_path)
    file = path / "tokenizer.json"
    draw = random.Random(0)
    for size in (8, 400):
        for _ in range(2):
            raw = (4 * (size // 8)).to_bytes(4, "little") + draw.randbytes(size)
            table = {
                "type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode(),
            }  # fmt: skip
            file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": table}))
            with suppress(InputError):
                tokenizer = ChatTokenizer.from_folder(path)
                tokenizer.encode("some text", is_start=True)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.promise
def test_fault_11_nested_added_tokens_are_matched_at_any_depth(tmp_path: Path) -> None:
    path = write_model_folder(tmp_path)
    file = path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | nested_tokens(1000)))
    tokenizer = ChatTokenizer.from_folder(path)
    for length in (1, 49, 50, 51, 60, 999, 1000):
        match = tokenizer.pattern.match("<" + "a" * length + "b")
        assert match
        assert len(match[0]) == 1 + length


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"1": 3}},
        {"added_tokens_decoder": {"x": {}}},
        {"added_tokens_decoder": {"1": {"content": 3}}},
        {"eos_token": 3},
        {"eos_token": {"content": []}},
        {"extra_special_tokens": [1]},
        {"extra_special_tokens": {"x": {}}},
    ],
    ids=str,
)
def test_fault_11_a_malformed_config_is_an_input_error(
    config: dict[str, Any], tmp_path: Path
) -> None:
    path = write_model_folder(tmp_path)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with suppress(InputError):
        ChatTokenizer.from_folder(path)
