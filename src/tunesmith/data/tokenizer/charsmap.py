"""Validate the table of a SentencePiece normalizer before the tokenizers library sees it.

    check_charsmap(base64) -> longest text that the table writes for one, in characters

A table is 4 bytes with the size of a double-array trie, the trie (units of 32 bits), and the texts
that it writes, each ended by a NUL. A unit holds the byte that leads to it, the offset of its
children and whether a text follows, whose place is a unit of its own. The library follows units and
places without looking whether they exist: it panics in the middle of a text, and Rust writes its
own lines to the terminal. So each unit that a text can reach is followed here, once.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from tunesmith.core.errors import InputError

MAX_TRIE_UNITS = 2**19  # the tables of SentencePiece's own rules have up to 90,000
UNITS_AT_ONCE = 2**12
BYTES = np.arange(1, 256)  # a NUL ends a text
BLOCK = 255  # children are in the block of 256 units of their offset
LABEL_BITS = (1 << 31) | 0xFF
VALUE_BITS = (1 << 31) - 1


def check_charsmap(charsmap: Any) -> int:
    """Return the length of the longest text in a table. Raises InputError if it is damaged."""
    if not isinstance(charsmap, str):
        raise _make_error("not a text")
    try:
        raw = base64.b64decode(charsmap, validate=True)
    except ValueError as error:
        raise _make_error(str(error)) from error
    num_units = int.from_bytes(raw[:4], "little") // 4
    start = 4 + 4 * num_units
    if not num_units or len(raw) < start:
        raise _make_error(f"a trie of {num_units} units in {len(raw)} bytes")
    if num_units > MAX_TRIE_UNITS:
        raise _make_error(f"a trie of {num_units:,} units; {MAX_TRIE_UNITS:,} are the most")
    try:
        texts = raw[start:].decode()
    except UnicodeDecodeError as error:
        raise _make_error(str(error)) from error
    places = _list_places(np.frombuffer(raw[4:start], "<u4").astype(np.int64))
    is_start = (np.frombuffer(raw[start:] + b"\0", np.uint8) & 0xC0) != 0x80  # of a character
    if places.size and (places.max() >= len(is_start) or not is_start[places].all()):
        raise _make_error("a place outside of its texts")
    return max(map(len, texts.split("\0")))


def _list_places(units: np.ndarray) -> np.ndarray:
    """Return the places of the texts that a trie can lead to."""
    is_seen = np.zeros(len(units), bool)
    places: list[np.ndarray] = [np.zeros(0, np.int64)]
    pending = [_refuse_outside(_read_offsets(units[:1]), units)]
    while pending:
        offsets = np.unique(pending.pop())
        offsets = offsets[~is_seen[offsets]]
        if len(offsets) > UNITS_AT_ONCE:
            pending.append(offsets[UNITS_AT_ONCE:])
            offsets = offsets[:UNITS_AT_ONCE]
        is_seen[offsets] = True
        positions = offsets[:, None] ^ BYTES
        children = units[positions]
        is_child = (children & LABEL_BITS) == BYTES
        children = children[is_child]
        offsets = _refuse_outside(positions[is_child] ^ _read_offsets(children), units)
        has_text = (children >> 8) & 1 == 1
        places.append(units[offsets[has_text]] & VALUE_BITS)
        if offsets.size:
            pending.append(offsets)
    return np.concatenate(places)


def _read_offsets(units: np.ndarray) -> np.ndarray:
    return (units >> 10) << ((units & (1 << 9)) >> 6)


def _refuse_outside(offsets: np.ndarray, units: np.ndarray) -> np.ndarray:
    if offsets.size and int(offsets.max()) | BLOCK >= len(units):
        raise _make_error("a unit outside of its trie")
    return offsets


def _make_error(reason: str) -> InputError:
    message = f"the tokenizer's precompiled_charsmap is damaged: {reason}"
    return InputError(message, fix="download the model again")
