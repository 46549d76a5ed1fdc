"""Encode long plain texts word by word, each word once: many times faster than the library.

    WordEncoder.from_tokenizer(data, encode) -> WordEncoder, or None if it would not be exact
    word_encoder.encode_text(text)           -> ids

A text is cut before a space or line end that follows a printable ASCII character. GPT-2's pattern
for byte-level BPE makes no token across such a cut, and the two sides do not depend on each other:
only a run of white space looks ahead, and it is after the cut with what follows it. So the ids of a
text are those of its pieces, concatenated. Tokenizers with another pattern, a normalizer, or added
tokens in plain text are left to the library."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tunesmith.core.types import Json

MAX_WORDS = 2**19  # cached pieces, some 80 MB
MAX_WORD_CHARS = 64  # longer pieces are not cached
_CUT = re.compile(r"(?<=[!-~])(?=[ \n])")


class WordEncoder(dict[str, bytes]):
    """Cache of piece -> ids (int32 bytes), up to MAX_WORDS pieces."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    @classmethod
    def from_tokenizer(cls, data: Json, encode: Callable[[str], list[int]]) -> WordEncoder | None:
        """Build an encoder, or return None if it would not be exact.

        `data` is a tokenizer.json in which plain text makes no added tokens; `encode` calls the
        library."""
        steps = _list_steps(data.get("pre_tokenizer"))
        digits = steps[0]
        if digits == {"type": "Digits", "individual_digits": digits.get("individual_digits")}:
            steps = steps[1:]
        if len(steps) != 1 or steps[0].get("type") != "ByteLevel":
            return None
        byte_level = steps[0]
        if not byte_level.get("use_regex", True) or byte_level.get("add_prefix_space", True):
            return None
        model = data["model"]
        if model.get("type") != "BPE" or model.get("dropout") or data.get("normalizer") is not None:
            return None
        return cls(encode)

    def encode_text(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32."""
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
