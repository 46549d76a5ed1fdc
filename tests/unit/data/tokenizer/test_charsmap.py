"""A damaged table of a SentencePiece normalizer is refused in words, before Rust panics."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers import normalizers

from tunesmith.core.errors import InputError
from tunesmith.data.tokenizer.charsmap import MAX_TRIE_UNITS, check_charsmap

A = ord("a")
CHILD = 256 ^ A  # root's children are in the second block
TRIE = {
    0: 256 << 10,
    CHILD: A << 10 | 1 << 8 | A,  # a text follows, and its place is unit 256
    256: 1 << 31 | 2,
}
TEXTS = "x\0größer\0".encode()


def make_table(trie: Mapping[int, int] = TRIE, texts: bytes = TEXTS, size: int = 512) -> bytes:
    units = [trie.get(number, 0) for number in range(size)]
    return (
        (4 * size).to_bytes(4, "little") + b"".join(u.to_bytes(4, "little") for u in units) + texts
    )


def check(table: bytes) -> int:
    return check_charsmap(base64.b64encode(table).decode())


def test_a_table_is_read_as_the_library_reads_it() -> None:
    assert normalizers.Precompiled(make_table()).normalize_str("bab") == "bgrößerb"
    assert check(make_table()) == len("größer")
    in_third_block = {0: 512 << 10, 512 ^ A: (512 ^ 256 ^ A) << 10 | 1 << 8 | A, 256: TRIE[256]}
    assert check(make_table(in_third_block, size=768)) == len("größer")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"", "a trie of 0 units"),
        (make_table(size=512)[:2000], "a trie of 512 units in 2000 bytes"),
        (make_table(size=MAX_TRIE_UNITS + 1), "are the most"),
        (make_table(texts=b"\xff\0"), "can't decode"),
        (make_table(size=511), "a unit outside of its trie"),  # the block of the root's children
        (make_table(TRIE | {0: 512 << 10}), "a unit outside of its trie"),
        (make_table(TRIE | {CHILD: 1000 << 10 | 1 << 8 | A}), "a unit outside of its trie"),
        (make_table(TRIE | {256: len(TEXTS) + 1}), "a place outside of its texts"),
        (make_table(TRIE | {256: 5}), "a place outside of its texts"),  # inside of ö
    ],
)
def test_what_would_panic_is_refused(table: bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"precompiled_charsmap is damaged: .*{message}") as caught:
        check(table)
    assert caught.value.fix == "download the model again"


@pytest.mark.parametrize("charsmap", [None, 3, [], "?", ""])
def test_what_is_no_table_is_refused(charsmap: Any) -> None:
    with pytest.raises(InputError, match="precompiled_charsmap is damaged"):
        check_charsmap(charsmap)


def test_no_damaged_table_that_passes_panics(capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    text = "".join(map(chr, range(1, 2000)))
    num_passed = 0
    for _ in range(300):
        table = bytearray(make_table())
        position = draw.choice((0, 1, 2, 3, 4 * CHILD, 4 * CHILD + 1, 4 * CHILD + 2, 1024, 1025))
        table[4 + position] = draw.randrange(256)
        try:
            check(bytes(table))
        except InputError:
            continue
        normalizers.Precompiled(bytes(table)).normalize_str(text)
        num_passed += 1
    assert 20 < num_passed < 280
    assert "panicked" not in capfd.readouterr().err
