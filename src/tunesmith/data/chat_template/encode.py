"""Tracked text to ids: cut at the control tokens that the template wrote, everything between
encoded as plain text.

A control token counts where each of its characters comes from the template, a structural one also
where all come from one assistant message. Whatever else looks like a control token is text. For a
render without such text the ids are those of the full tokenizer."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from tunesmith.core.errors import InputError
from tunesmith.core.types import CharSpan
from tunesmith.data.chat_template.tracked_str import (
    TEMPLATE,
    VALUE,
    TrackedStr,
    get_message_index,
    iter_spans,
    to_plain,
)
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer, ControlToken

# White space as the tokenizers library sees it, for added tokens that swallow it.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


@dataclass(frozen=True)
class ControlMatch:
    """A control token in a text: characters start:end, of which the token's own end at `core`."""

    start: int
    token_end: int
    end: int
    control: ControlToken


class TrackedText:
    """A rendered text with its writers and its control tokens; nothing is encoded yet."""

    def __init__(
        self, tracked: TrackedStr, tokenizer: ChatTokenizer, assistant_indices: Container[int]
    ) -> None:
        """`assistants`: indices of the assistant messages."""
        self.plain, self.tokenizer = to_plain(tracked), tokenizer
        self.origin_spans = list(iter_spans(tracked))
        self.has_structural_tokens = False  # structural tokens stand in assistant text
        spans: list[tuple[int, int]] = []
        for start, end, origin in self.origin_spans:
            is_answer = get_message_index(origin) in assistant_indices
            if origin != TEMPLATE and not is_answer:
                continue
            for match in tokenizer.pattern.finditer(self.plain, start, end):
                if not is_answer or tokenizer.controls[match[0]].is_structural:
                    spans.append(match.span())
                    self.has_structural_tokens |= is_answer
        self.controls = self._match_controls(spans)
        all_spans = [match.span() for match in tokenizer.pattern.finditer(self.plain)]
        self.has_control_like_text = (
            all_spans != spans
        )  # some text of the row looks like a control token
        if self.has_control_like_text and any(
            self.get_origins(*span) == {TEMPLATE, VALUE} for span in all_spans
        ):
            raise InputError(
                "the chat template writes a control token around a number: nobody knows whose it is"
            )

    def get_origins(self, start: int, end: int) -> set[int]:
        """Origins of the characters start:end."""
        first = bisect_right(self.origin_spans, start, key=lambda span: span[1])
        last = bisect_left(self.origin_spans, end, key=lambda span: span[0])
        return {origin for _, _, origin in self.origin_spans[first:last]}

    def _match_controls(self, spans: list[tuple[int, int]]) -> list[ControlMatch]:
        """lstrip, rstrip and single_word, in the order in which tokenizers apply them."""
        controls: list[ControlMatch] = []
        position = 0
        for start, token_end in spans:
            control = self.tokenizer.controls[self.plain[start:token_end]]
            neighbours = self.plain[start - 1 : start] + self.plain[token_end : token_end + 1]
            if start < position or (
                control.single_word and any(c.isalnum() or c == "_" for c in neighbours)
            ):
                continue
            if not self.tokenizer.can_match_control(control, self.plain[token_end : token_end + 4]):
                raise InputError(
                    f"the tokenizer's normalisation changes the added token {control.text!r}"
                )
            match_start = (
                position + len(self.plain[position:start].rstrip(WHITESPACE))
                if control.lstrip
                else start
            )
            position = (
                len(self.plain) - len(self.plain[token_end:].lstrip(WHITESPACE))
                if control.rstrip
                else token_end
            )
            controls.append(ControlMatch(match_start, token_end, position, control))
        return controls


@dataclass(frozen=True)
class EncodedRun:
    """Characters start:end and their ids, plain text or one control token; `core` as in Found."""

    start: int
    end: int
    ids: list[int]
    token_end: int = -1


@dataclass(frozen=True)
class EncodedText:
    text: TrackedText
    runs: list[EncodedRun]

    @cached_property
    def ids(self) -> list[int]:
        return [token for run in self.runs for token in run.ids]

    @cached_property
    def _cumulative_counts(self) -> list[int]:
        return [0, *accumulate(len(run.ids) for run in self.runs)]

    def count_tokens_before(self, character: int) -> int | None:
        """How many tokens the text up to `character` has; None if a token reaches over that place,
        so that the text before it would be encoded otherwise alone."""
        index = bisect_right(self.runs, character, key=lambda run: run.start) - 1
        run = self.runs[index]
        if character >= run.end:
            return self._cumulative_counts[index + 1]
        if character == run.start:
            return self._cumulative_counts[index]
        if run.token_end >= 0:
            return self._cumulative_counts[index + 1] if character >= run.token_end else None
        prefix_ids = _encode_run(self.text, run.start, character).ids
        return (
            self._cumulative_counts[index] + len(prefix_ids)
            if run.ids[: len(prefix_ids)] == prefix_ids
            else None
        )


def encode(text: TrackedText, *, cut: int = -1) -> EncodedText:
    """At character `cut`, plain text is cut into two runs, the second of which goes on from the
    first."""
    runs: list[EncodedRun] = []
    position = 0
    for match in text.controls:
        runs += _encode_runs(text, position, match.start, cut)
        runs.append(EncodedRun(match.start, match.end, [match.control.id], match.token_end))
        position = match.end
    runs += _encode_runs(text, position, len(text.plain), cut)
    return EncodedText(text, runs)


def iter_text_runs(text: TrackedText, *, cut: int = -1) -> Iterator[tuple[str, bool]]:
    """What `encode` will ask the tokenizer for: each run of plain text, and whether the document
    starts with it."""
    bounds = [
        0,
        *(bound for match in text.controls for bound in (match.start, match.end)),
        len(text.plain),
    ]
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        if start < end:
            yield text.plain[start : cut if start < cut < end else end], start == 0


def _encode_runs(text: TrackedText, start: int, end: int, cut: int) -> list[EncodedRun]:
    if start == end:
        return []
    if start < cut < end:
        continuation = EncodedRun(cut, end, text.tokenizer.encode_continuation(text.plain[cut:end]))
        return [_encode_run(text, start, cut), continuation]
    return [_encode_run(text, start, end)]


def _encode_run(text: TrackedText, start: int, end: int) -> EncodedRun:
    return EncodedRun(start, end, text.tokenizer.encode(text.plain[start:end], is_start=start == 0))


def find_banned_token_spans(
    encoded: EncodedText, start: int, end: int, answer: str, spans: Sequence[CharSpan]
) -> list[tuple[int, int]]:
    """Tokens first:last that hold any character of the spans of `said`, which stands in the
    characters start:end."""
    answer_start = encoded.text.plain.find(answer, start, end)
    if answer_start < 0:
        fix = "drop the row, or write the answer as the template will"
        raise InputError(
            "the chat template changes the answer, so nobody knows which tokens are bad", fix=fix
        )
    return [
        (
            _snap_to_token(encoded, answer_start + span.start, start, -1),
            _snap_to_token(encoded, answer_start + span.end, end, 1),
        )
        for span in spans
    ]


def _snap_to_token(encoded: EncodedText, character: int, limit: int, step: int) -> int:
    """How many tokens stand before the next place, that way, where one token ends and another
    begins."""
    while (tokens := encoded.count_tokens_before(character)) is None and character != limit:
        character += step
    if tokens is None:
        raise InputError("the tokenizer swallows the place where an answer begins")
    return tokens
