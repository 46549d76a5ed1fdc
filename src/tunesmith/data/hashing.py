"""Examples as numbers, by which equal ones are found: duplicates, leaks between roles, sides of a
split; and as shapes.

Rows of one shape are the same to a chat template but for their texts: what it refuses, it refuses
by shape, so a look at one row of each shape finds what a sample would miss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain

from tunesmith.core.types import Example, Json

CLOSING_CHARS = "?!. \n\t"  # of a question: with and without them it asks the same


def hash_example(example: Example) -> tuple[int, int]:
    """64-bit digests of (the whole example, what stands before its last answer), white space evened
    out; of a question case and closing marks count for nothing either.

    With nothing before its answer, as in a plain text, both digests are the same.
    """
    rejected = [] if example.rejected is None else [str(hash_example(example.rejected)[0])]
    if example.text is not None:
        return _hash_parts([example.prompt] if example.prompt else [], [example.text, *rejected])
    *context, answer = [_split_message(message) for message in example.messages]
    tools = [json.dumps(example.tools, sort_keys=True)] if example.tools else []
    return _hash_parts([*tools, *chain.from_iterable(context)], [*answer, *rejected])


def hash_text(text: str) -> int:
    """64-bit digest of a text, white space evened out."""
    return int.from_bytes(
        hashlib.blake2b(_encode_normalized([text]), digest_size=8).digest(), "big"
    )


def compute_shape(example: Example) -> object:
    """Which kinds of turns follow on each other, and what they hold beside text; the length does
    not matter."""
    kinds = [
        (message["role"], not message["content"].strip(), *sorted(message), weight > 0)
        for message, weight in zip(example.messages, example.turn_weights, strict=True)
    ]
    return (
        frozenset(zip([None, *kinds], [*kinds, None], strict=True)),
        bool(example.tools),
        example.prompt is None,
    )


def _split_message(message: Json) -> tuple[str, str, str]:
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return message["role"], message["content"], json.dumps(rest, sort_keys=True) if rest else ""


def _hash_parts(prompt: Sequence[str], answer: Sequence[str]) -> tuple[int, int]:
    question = [part.casefold().rstrip(CLOSING_CHARS) for part in prompt]
    full_digest = _to_int(hashlib.blake2b(_encode_normalized([*prompt, *answer]), digest_size=8))
    return full_digest, _to_int(
        hashlib.blake2b(_encode_normalized(question), digest_size=8)
    ) if prompt else full_digest


def _to_int(hasher: hashlib.blake2b) -> int:
    return int.from_bytes(hasher.digest(), "big")


def _encode_normalized(parts: Sequence[str]) -> bytes:
    return "".join(" ".join(part.split()) + "\0" for part in parts).encode()
