"""The tokenizer.json of a stranger: what would blow text up, match everywhere or make Rust panic is
refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from toy_chat import make_byte_bpe, write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.data.tokenizer import tokenizer_json
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer
from tunesmith.data.tokenizer.tokenizer_json import TokenizerErrors, parse_tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def changed(**parts: Any) -> bytes:
    return json.dumps(json.loads(make_byte_bpe()) | parts).encode()


def model(**parts: Any) -> bytes:
    return changed(model=json.loads(make_byte_bpe())["model"] | parts)


def replaces(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def token(**parts: Any) -> list[dict[str, Any]]:
    return [{"id": 400, "content": "<a>", "special": True, **parts}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "cannot be read: nested too deeply"),
        (b"\xff", "not valid JSON: byte 0 is not UTF-8"),
        (b"[" + b"1" * 5000, "an integer has more than 4,300 digits"),
        (b"[]", "no added_tokens or no model"),
        (changed(model={"type": "Magic"}), "unknown model 'Magic'"),
        (
            changed(normalizer=replaces("a", "a" * 10**6)),
            r"normalizer expands text up to 1,000,000 times \(steps: 1\)",
        ),
        (
            changed(normalizer={"type": "Sequence", "normalizers": [replaces("a", "aa")] * 30}),
            r"normalizer expands text .*\(steps: 31\)",
        ),
        (
            changed(normalizer={"type": "Prepend", "prepend": "a" * 100}),
            r"normalizer expands text .*\(steps: 1\)",
        ),
        (
            changed(pre_tokenizer={"type": "Metaspace", "replacement": "a" * 99}),
            "pre_tokenizer expands",
        ),
        (
            changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 20}),
            "pre_tokenizer expands text up to 1,099,511,627,776 times",
        ),
        (
            changed(normalizer={"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 4}),
            "normalizer expands text up to 256 times",
        ),
        (
            changed(decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}] * 300}),
            r"decoder expands text .*\(steps: 301\)",
        ),
        (model(dropout=0.1), "BPE dropout"),
        (model(continuing_subword_prefix="#" * 99), "continuing_subword_prefix is too long"),
        (model(max_input_chars_per_word=10**9), "max_input_chars_per_word is out of range"),
        (changed(added_tokens=token(content="")), "no valid text and id"),
        (changed(added_tokens=token(content="x" * 2000)), "no valid text and id"),
        (changed(added_tokens=token(id="400")), "no valid text and id"),
        (changed(added_tokens=["<a>"]), "no valid text and id"),
        (changed(added_tokens=token(special="yes")), "a flag that is not a boolean"),
    ],
)
def test_a_hostile_tokenizer_is_refused_before_the_library_sees_it(
    content: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        parse_tokenizer(content)


def wrap(single: list[dict[str, Any]], *, names: tuple[str, ...] = ("s",)) -> dict[str, Any]:
    """Return a TemplateProcessing with special tokens of these names."""
    tokens = {name: {"id": name, "ids": [1], "tokens": [name]} for name in names}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
SECOND_TEXT = {"Sequence": {"id": "B", "type_id": 0}}
TOKEN = {"SpecialToken": {"id": "s", "type_id": 0}}
PANICS: dict[str, dict[str, Any]] = {
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "nothing prepended": {"normalizer": {"type": "Prepend", "prepend": ""}},
    "an empty text replaced": {
        "normalizer": {"type": "Sequence", "normalizers": [replaces("", "x")]}
    },
    "a second text": {"post_processor": wrap([TEXT, SECOND_TEXT])},
    "an unknown token": {"post_processor": wrap([TOKEN, TEXT], names=("t",))},
}


@pytest.mark.parametrize("name", PANICS)
def test_what_the_library_panics_over_is_refused_on_loading(name: str, tmp_path: Path) -> None:
    path = write_model_folder(tmp_path)
    (path / "tokenizer.json").write_bytes(changed(**PANICS[name]))
    with pytest.raises(InputError, match="cannot use this tokenizer"):
        ChatTokenizer.from_folder(path)


def test_a_huge_file_is_refused_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_json, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="more than 10"):
        parse_tokenizer(make_byte_bpe().encode())


def test_a_file_of_too_many_values_is_refused_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_json, "MAX_VOCAB", 100)
    with pytest.raises(InputError, match=r"vocabulary has .* tokens, more than 100"):
        parse_tokenizer(make_byte_bpe().encode())
    monkeypatch.setattr(tokenizer_json, "MAX_VALUES", 9)
    with pytest.raises(InputError, match="more than 9 commas and brackets"):
        parse_tokenizer(b"[],[],[],[],[], nothing parses this")


def test_sound_ones_pass_without_their_truncation_and_padding() -> None:
    """Truncation would cut rows in silence."""
    parsed = parse_tokenizer(
        changed(truncation={"max_length": 8}, padding={"length": 8}, normalizer=replaces(" ", "▁"))
    )
    assert parsed["truncation"] is None
    assert parsed["padding"] is None


@pytest.mark.parametrize(
    "parts",
    [
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {"pre_tokenizer": {"type": "Magic"}},
        {"decoder": {"type": "ByteLevel", "add_prefix_space": "perhaps"}},
        {"added_tokens": token(id=-1)},
    ],
)
def test_what_the_library_cannot_use_is_a_clear_error(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    path = write_model_folder(tmp_path)
    (path / "tokenizer.json").write_bytes(changed(**parts))
    with pytest.raises(InputError, match="tokenizer"):
        ChatTokenizer.from_folder(path)


def test_a_panic_of_rust_is_a_clear_error_and_an_interrupt_is_none() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(InputError, match="cannot use this tokenizer: no more"), TokenizerErrors():
        raise panic("no more")
    with pytest.raises(KeyboardInterrupt), TokenizerErrors():
        raise KeyboardInterrupt


def test_a_memory_error_is_no_fault_of_a_tokenizer() -> None:
    assert not any(issubclass(MemoryError, kind) for kind in tokenizer_json.UNUSABLE_ERRORS)
    with pytest.raises(MemoryError), TokenizerErrors(*tokenizer_json.UNUSABLE_ERRORS):
        raise MemoryError
