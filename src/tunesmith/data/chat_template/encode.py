"""Tracked text to ids: cut at the control tokens that the template wrote, everything between encoded as plain text.

A control token counts where each of its characters comes from the template, a structural one also where all come from
one assistant message. Whatever else looks like a control token is text. For a render without such text the ids are
those of the full tokenizer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from tunesmith.core.errors import InputError
from tunesmith.core.types import Span
from tunesmith.data.chat_template.tracked_str import TEMPLATE, VALUE, Tracked, message_of, plain, stretches
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer, Control

# White space as the tokenizers library sees it, for added tokens that swallow it.
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


@dataclass(frozen=True)
class Found:
    """A control token in a text: characters start:end, of which the token's own end at `core`."""

    start: int
    core: int
    end: int
    control: Control


class MarkedText:
    """A rendered text with its writers and its control tokens; nothing is encoded yet."""

    def __init__(self, tracked: Tracked, tokenizer: ChatTokenizer, assistants: Container[int]) -> None:
        """`assistants`: indices of the assistant messages."""
        self.plain, self.tokenizer = plain(tracked), tokenizer
        self.stretches = list(stretches(tracked))
        self.structural = False  # structural tokens stand in assistant text
        spans: list[tuple[int, int]] = []
        for start, end, origin in self.stretches:
            answer = message_of(origin) in assistants
            if origin != TEMPLATE and not answer:
                continue
            for match in tokenizer.pattern.finditer(self.plain, start, end):
                if not answer or tokenizer.controls[match[0]].structural:
                    spans.append(match.span())
                    self.structural |= answer
        self.controls = self._swallowing(spans)
        everywhere = [match.span() for match in tokenizer.pattern.finditer(self.plain)]
        self.foreign = everywhere != spans  # some text of the row looks like a control token
        if self.foreign and any(self.writers(*span) == {TEMPLATE, VALUE} for span in everywhere):
            raise InputError("the chat template writes a control token around a number: nobody knows whose it is")

    def writers(self, start: int, end: int) -> set[int]:
        """Origins of the characters start:end."""
        first = bisect_right(self.stretches, start, key=lambda stretch: stretch[1])
        last = bisect_left(self.stretches, end, key=lambda stretch: stretch[0])
        return {origin for _, _, origin in self.stretches[first:last]}

    def _swallowing(self, spans: list[tuple[int, int]]) -> list[Found]:
        """lstrip, rstrip and single_word, in the order in which tokenizers apply them."""
        controls: list[Found] = []
        at = 0
        for start, core in spans:
            control = self.tokenizer.controls[self.plain[start:core]]
            around = self.plain[start - 1 : start] + self.plain[core : core + 1]
            if start < at or (control.single_word and any(c.isalnum() or c == "_" for c in around)):
                continue
            if not self.tokenizer.matches(control, self.plain[core : core + 4]):
                raise InputError(f"the tokenizer's normalisation changes the added token {control.text!r}")
            left = at + len(self.plain[at:start].rstrip(SPACES)) if control.lstrip else start
            at = len(self.plain) - len(self.plain[core:].lstrip(SPACES)) if control.rstrip else core
            controls.append(Found(left, core, at, control))
        return controls


@dataclass(frozen=True)
class Piece:
    """Characters start:end and their ids, plain text or one control token; `core` as in Found."""

    start: int
    end: int
    ids: list[int]
    core: int = -1


@dataclass(frozen=True)
class Encoded:
    text: MarkedText
    pieces: list[Piece]

    @cached_property
    def ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.ids]

    @cached_property
    def _counts(self) -> list[int]:
        return [0, *accumulate(len(piece.ids) for piece in self.pieces)]

    def tokens_before(self, character: int) -> int | None:
        """How many tokens the text up to `character` has; None if a token reaches over that place, so that the text
        before it would be encoded otherwise alone."""
        index = bisect_right(self.pieces, character, key=lambda piece: piece.start) - 1
        piece = self.pieces[index]
        if character >= piece.end:
            return self._counts[index + 1]
        if character == piece.start:
            return self._counts[index]
        if piece.core >= 0:
            return self._counts[index + 1] if character >= piece.core else None
        alone = _run(self.text, piece.start, character).ids
        return self._counts[index] + len(alone) if piece.ids[: len(alone)] == alone else None


def encode(text: MarkedText, *, cut: int = -1) -> Encoded:
    """At character `cut`, plain text is cut into two runs, the second of which goes on from the first."""
    pieces: list[Piece] = []
    at = 0
    for found in text.controls:
        pieces += _runs(text, at, found.start, cut)
        pieces.append(Piece(found.start, found.end, [found.control.id], found.core))
        at = found.end
    pieces += _runs(text, at, len(text.plain), cut)
    return Encoded(text, pieces)


def plain_runs(text: MarkedText, *, cut: int = -1) -> Iterator[tuple[str, bool]]:
    """What `encode` will ask the tokenizer for: each run of plain text, and whether the document starts with it."""
    bounds = [0, *(place for found in text.controls for place in (found.start, found.end)), len(text.plain)]
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        if start < end:
            yield text.plain[start : cut if start < cut < end else end], start == 0


def _runs(text: MarkedText, start: int, end: int, cut: int) -> list[Piece]:
    if start == end:
        return []
    if start < cut < end:
        rest = Piece(cut, end, text.tokenizer.encode_continuation(text.plain[cut:end]))
        return [_run(text, start, cut), rest]
    return [_run(text, start, end)]


def _run(text: MarkedText, start: int, end: int) -> Piece:
    return Piece(start, end, text.tokenizer.encode(text.plain[start:end], at_start=start == 0))


def bad_tokens(encoded: Encoded, start: int, end: int, said: str, spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Tokens first:last that hold any character of the spans of `said`, which stands in the characters start:end."""
    begin = encoded.text.plain.find(said, start, end)
    if begin < 0:
        fix = "drop the row, or write the answer as the template will"
        raise InputError("the chat template changes the answer, so nobody knows which tokens are bad", fix=fix)
    return [
        (_nearest(encoded, begin + span.start, start, -1), _nearest(encoded, begin + span.end, end, 1))
        for span in spans
    ]


def _nearest(encoded: Encoded, character: int, most: int, step: int) -> int:
    """How many tokens stand before the next place, that way, where one token ends and another begins."""
    while (tokens := encoded.tokens_before(character)) is None and character != most:
        character += step
    if tokens is None:
        raise InputError("the tokenizer swallows the place where an answer begins")
    return tokens
