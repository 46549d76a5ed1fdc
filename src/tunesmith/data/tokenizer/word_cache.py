"""Plain text to ids by its words, each of which is encoded once: many times faster than the library
on long texts.

    Words.of(tokenizer.json, encode) -> Words, or None where it would not be exact; words.ids(text) -> ids

A text is cut before a space or line end that follows a printable ASCII character. GPT-2's pattern
for byte-level BPE makes no token across such a place, and what it makes on one side does not depend
on the other: a run of white space is the only thing that looks ahead, and it lies behind the cut
with what follows it. So the ids of a text are those of its pieces, one after the other. Tokenizers
with another pattern, a normalizer, or added tokens that plain text makes are left to the library.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tunesmith.core.types import Json

MAX_WORDS = 2**19  # pieces that are remembered, some 80 MB
MAX_WORD_CHARS = 64  # characters of one that is
_CUT = re.compile(r"(?<=[!-~])(?=[ \n])")


class WordEncoder(dict[str, bytes]):
    """Piece -> its ids, int32. Grows up to `MOST`."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    @classmethod
    def from_tokenizer(cls, data: Json, encode: Callable[[str], list[int]]) -> WordEncoder | None:
        """`data`: a tokenizer.json without added tokens that plain text makes; `encode`: by the
        library."""
        first, *rest = _list_steps(data.get("pre_tokenizer"))
        has_digits = first == {
            "type": "Digits",
            "individual_digits": first.get("individual_digits"),
        }
        last = rest[0] if has_digits and rest else first
        is_byte_level = (
            last.get("type") == "ByteLevel"
            and last.get("use_regex", True)
            and not last.get("add_prefix_space", True)
        )
        model, is_last_step = data["model"], len(rest) == int(has_digits)
        is_plain_bpe = (
            model.get("type") == "BPE"
            and not model.get("dropout")
            and data.get("normalizer") is None
        )
        return cls(encode) if is_byte_level and is_last_step and is_plain_bpe else None

    def encode_text(self, text: str) -> np.ndarray:
        """int32."""
        return np.frombuffer(b"".join(map(self.__getitem__, _CUT.split(text))), dtype=np.int32)

    def __missing__(self, piece: str) -> bytes:
        ids = np.array(self._encode(piece), dtype=np.int32).tobytes()
        if len(self) < MAX_WORDS and len(piece) <= MAX_WORD_CHARS:
            self[piece] = ids
        return ids


def _list_steps(pre_tokenizer: Any) -> list[Json]:
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        return pre_tokenizer["pretokenizers"] or [{}]
    return [pre_tokenizer or {}]
