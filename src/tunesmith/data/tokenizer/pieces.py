"""Cut long texts into pieces that the tokenizers library encodes in bounded memory.

    split_text(text, max_chars)       -> pieces, cut between words where there are any
    split_grown_text(text, normalize) -> the same for a normalizer that writes more than it reads
    estimate_growth(normalizer)       -> bytes that it writes for one, at most
    WordEncoder.from_tokenizer(data, encode).encode_text(text) -> ids, where that is exact

The library takes up to 200 bytes of memory per token, nothing can interrupt it, and a token can be
a single byte. So what one call encodes is bounded in bytes after normalization, which are measured
before: U+FDFA is one letter, and eighteen in compatibility form (NFKC, NFKD). A piece that starts
at a space between two words has the ids that it has in the whole text; a text that has none where
it would have to be cut is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.tokenizer.tokenizer_json import count_written_chars, iter_steps

MAX_PIECE_BYTES = 2**19  # of UTF-8, after normalization
CHAR_BYTES = 4  # at most
MAX_PIECE_CHARS = MAX_PIECE_BYTES // CHAR_BYTES
CUT_BYTES = MAX_PIECE_BYTES // 2  # after which it ends at the next space
BLOCK_CHARS = 2**12  # normalized at once to measure them
# Normalization forms, and the others that make text longer -> bytes for one of theirs, at most
UNICODE_GROWTH = {
    **dict.fromkeys(("NFKC", "NFKD", "Precompiled"), 18),
    **dict.fromkeys(("NFC", "NFD"), 4),
    "BertNormalizer": 12,
    "Lowercase": 2,
}


def estimate_growth(normalizer: Any) -> int:
    """Return how many bytes a normalizer of a tokenizer.json writes for one, at most."""
    factors: list[int] = []
    for step in iter_steps(normalizer):
        written = count_written_chars(step)
        factors.append(UNICODE_GROWTH.get(str(step.get("type")), 1))
        factors.append(CHAR_BYTES * written if written > 1 else 1)
    return math.prod(factors)


def split_grown_text(text: str, normalize: Callable[[str], str]) -> Iterator[str]:
    """Yield a text in pieces of at most half of MAX_PIECE_CHARS, and MAX_PIECE_BYTES once it is
    normalized. Raises InputError where that would cut a word."""
    for piece in split_text(text, MAX_PIECE_CHARS // 2):
        start = 0
        num_bytes = 0
        for block_start in range(0, len(piece), BLOCK_CHARS):
            block = piece[block_start : block_start + BLOCK_CHARS]
            block_bytes = _count_bytes(block, normalize)
            if num_bytes + block_bytes > CUT_BYTES:
                cut = _find_cut(piece, (start + block_start) // 2 + 1, block_start)
                if start < cut and piece[cut] in " \n":
                    yield piece[start:cut]
                    start = cut
                    num_bytes = _count_bytes(piece[cut:block_start], normalize)
            num_bytes += block_bytes
            if num_bytes > MAX_PIECE_BYTES:
                raise _make_growth_error(block_start + len(block) - start, num_bytes)
        yield piece[start:]


def _count_bytes(text: str, normalize: Callable[[str], str]) -> int:
    return len(normalize(text).encode(errors="surrogatepass"))


def _make_growth_error(num_chars: int, num_bytes: int) -> InputError:
    message = (
        f"{num_chars:,} characters without a space between words become {num_bytes:,} bytes by the"
        " tokenizer's normalization"
    )
    return InputError(message, fix="write them in their decomposed form, or drop the row")


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Yield a text in pieces of at most `max_chars`, cut before a space between two words, where
    tokens start anyway; else before another space or line end; else anywhere."""
    start = 0
    while len(text) - start > max_chars:
        end = _find_cut(text, start + max_chars // 2, start + max_chars)
        yield text[start:end]
        start = end
    yield text[start:]


def _find_cut(text: str, low: int, high: int) -> int:
    position = high
    while (position := text.rfind(" ", low, position)) >= 0:
        if text[position - 1].isalpha() and text[position + 1].isalpha():
            return position
    space = max(text.rfind(space, low, high) for space in " \n")
    return space if space >= 0 else high


# ---------------------------------------------------------------- word by word

# A text is cut before a space or line end that follows a printable ASCII character. GPT-2's pattern
# for byte-level BPE makes no token across such a cut, and the two sides do not depend on each
# other: only a run of white space looks ahead, and it is after the cut with what follows it. So the
# ids of a text are those of its pieces, concatenated, and each is encoded once. Tokenizers with
# another pattern, a normalizer, or added tokens in plain text are left to the library.

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
