"""Digests of examples, to find equal ones (duplicates, leaks, splits), and their shapes.

Rows of one shape differ, for a chat template, in their texts only. A template refuses by shape, so
rendering one row of each shape finds refusals that a random sample would miss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain

from tunesmith.core.types import Example, Json

PIECE_CHARS = 2**18  # of a long text, whose words are held at once
CLOSING_CHARS = "?!. \n\t"  # ignored at the end of a question


def hash_example(example: Example) -> tuple[int, int]:
    """Return 64-bit digests of (the full example, everything before its last answer).

    A rejected side does not count: a pair has the digest of the row that its chosen side is. White
    space is collapsed; in the second digest case and closing marks are ignored as well. Both are
    the same if nothing precedes the answer, as in a plain text."""
    if example.text is not None:
        prompt = [example.prompt] if example.prompt else []
        return _hash_parts(prompt, [example.text])
    *context, answer = [_split_message(message) for message in example.messages]
    tools = [json.dumps(example.tools, sort_keys=True)] if example.tools else []
    return _hash_parts([*tools, *chain.from_iterable(context)], answer)


def hash_text(text: str) -> int:
    """Return a 64-bit digest of a text, with white space collapsed."""
    return _hash_normalized([text])


def iter_collapsed(text: str) -> Iterator[str]:
    """Yield a text with white space collapsed, piece by piece: a list of its words takes 60 bytes
    for each."""
    separator = ""
    end = 0
    while end < len(text):
        start = end
        end = text.find(" ", start + PIECE_CHARS)
        end = len(text) if end < 0 else end
        if words := text[start:end].split():
            yield separator + " ".join(words)
            separator = " "


def compute_shape(example: Example) -> object:
    """Return the kinds of turns that follow each other, and their fields, without lengths."""
    kinds: list[tuple[object, ...] | None] = []
    for message, weight in zip(example.messages, example.turn_weights, strict=True):
        is_blank = not message["content"].strip()
        kinds.append((message["role"], is_blank, *sorted(message), weight > 0))
    pairs = zip([None, *kinds], [*kinds, None], strict=True)
    return frozenset(pairs), bool(example.tools), example.prompt is None


def _split_message(message: Json) -> tuple[str, str, str]:
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return message["role"], message["content"], json.dumps(rest, sort_keys=True) if rest else ""


def _hash_parts(prompt: Sequence[str], answer: Sequence[str]) -> tuple[int, int]:
    full_digest = _hash_normalized([*prompt, *answer])
    if not prompt:
        return full_digest, full_digest
    return full_digest, _hash_normalized([p.casefold().rstrip(CLOSING_CHARS) for p in prompt])


def _hash_normalized(parts: Sequence[str]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        for piece in iter_collapsed(part):
            digest.update(piece.encode())
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "big")
