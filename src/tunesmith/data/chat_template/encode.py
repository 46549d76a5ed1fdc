"""Encode tracked text: split it at the template's control tokens, encode the rest as plain text.

    TrackedStr -> TrackedText (control tokens located) -> encode -> EncodedText (ids)

A control token counts if the template wrote all of its characters, a structural one also if one
assistant message wrote them all. Everything else that looks like a control token is plain text.
Without such text the ids are those of the full tokenizer."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from tunesmith.core.errors import InputError
from tunesmith.data.chat_template.tracked_str import (
    TEMPLATE,
    VALUE,
    TrackedStr,
    get_message_index,
    get_plain_text,
    iter_spans,
)
from tunesmith.data.tokenizer.chat_tokenizer import (
    ChatTokenizer,
    ControlToken,
    refuse_long_rows,
)

# White space of the tokenizers library, for added tokens with lstrip or rstrip.
EN_QUAD_TO_HAIR_SPACE = "".join(map(chr, range(0x2000, 0x200B)))
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + EN_QUAD_TO_HAIR_SPACE


@dataclass(frozen=True)
class ControlMatch:
    """A control token at characters start:end, with the white space that it strips. Without the
    stripped space on its right it ends at `token_end`."""

    start: int
    token_end: int
    end: int
    control: ControlToken


class TrackedText:
    """A rendered text with its origins and control tokens, not encoded yet."""

    def __init__(
        self, tracked: TrackedStr, tokenizer: ChatTokenizer, assistant_indices: Container[int]
    ) -> None:
        """Locate the control tokens. `assistant_indices` are the assistant messages. Raises
        InputError for a control token whose origin is ambiguous."""
        self.tracked = tracked
        self.plain = get_plain_text(tracked)
        self.tokenizer = tokenizer
        self.origin_spans = list(iter_spans(tracked))
        self.has_structural_tokens = False  # inside an assistant message
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
        self.has_control_like_text = all_spans != spans
        if not self.has_control_like_text:
            return
        for start, end in all_spans:
            if self.get_origins(start, end) == {TEMPLATE, VALUE}:
                raise InputError("the chat template builds a control token around a number")

    @cached_property
    def origins(self) -> set[int]:
        return {origin for _, _, origin in self.origin_spans}

    def get_origins(self, start: int, end: int) -> set[int]:
        """Return the origins of the characters start:end."""
        first = bisect_right(self.origin_spans, start, key=lambda span: span[1])
        last = bisect_left(self.origin_spans, end, key=lambda span: span[0])
        return {origin for _, _, origin in self.origin_spans[first:last]}

    def _match_controls(self, spans: list[tuple[int, int]]) -> list[ControlMatch]:
        """Apply lstrip, rstrip and single_word in the order of the tokenizers library."""
        text = self.plain
        controls: list[ControlMatch] = []
        position = 0
        for start, token_end in spans:
            control = self.tokenizer.controls[text[start:token_end]]
            if start < position or (control.single_word and self._is_in_word(start, token_end)):
                continue
            if not self.tokenizer.can_match_control(control, text[token_end : token_end + 4]):
                raise InputError(
                    f"the tokenizer's normalization changes the added token {control.text!r}"
                )
            if control.lstrip:
                start = position + len(text[position:start].rstrip(WHITESPACE))
            position = token_end
            if control.rstrip:
                position = len(text) - len(text[token_end:].lstrip(WHITESPACE))
            controls.append(ControlMatch(start, token_end, position, control))
        return controls

    def _is_in_word(self, start: int, end: int) -> bool:
        neighbors = self.plain[start - 1 : start] + self.plain[end : end + 1]
        return any(char.isalnum() or char == "_" for char in neighbors)

    def iter_plain_spans(self, cut: int = -1) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, is_continuation) of each run of plain text between control tokens.
        The run that holds character `cut` is split there, and its second part is a continuation."""
        start = 0
        for match in [*self.controls, None]:
            end = len(self.plain) if match is None else match.start
            if start < cut < end:
                yield start, cut, False
                yield cut, end, True
            elif start < end:
                yield start, end, False
            if match is not None:
                start = match.end

    def iter_runs(self, cut: int = -1) -> Iterator[tuple[str, bool]]:
        """Yield each run of plain text that `encode` may take from a batch (continuations are
        encoded alone), and whether it starts the document."""
        for start, end, is_continuation in self.iter_plain_spans(cut):
            if not is_continuation:
                yield self.plain[start:end], start == 0


@dataclass(frozen=True)
class EncodedRun:
    """Characters start:end and their ids: plain text, or one control token (see ControlMatch)."""

    start: int
    end: int
    ids: list[int]
    token_end: int = -1


@dataclass(frozen=True)
class EncodedText:
    text: TrackedText
    runs: list[EncodedRun]  # in order, without gaps

    @cached_property
    def ids(self) -> list[int]:
        return [token for run in self.runs for token in run.ids]

    @cached_property
    def _cumulative_counts(self) -> list[int]:
        return [0, *accumulate(len(run.ids) for run in self.runs)]

    def count_tokens_before(self, character: int) -> int | None:
        """Return the number of tokens of the text before `character`, or None if a token spans
        that boundary."""
        index = bisect_right(self.runs, character, key=lambda run: run.start) - 1
        run = self.runs[index]
        count = self._cumulative_counts[index]
        if character >= run.end:
            return count + len(run.ids)
        if character == run.start:
            return count
        if run.token_end >= 0:
            return count + 1 if character >= run.token_end else None
        prefix_ids = _encode_run(self.text, run.start, character).ids
        is_boundary = run.ids[: len(prefix_ids)] == prefix_ids
        return count + len(prefix_ids) if is_boundary else None

    def get_token_index(self, character: int) -> int:
        """Return `count_tokens_before`. Raises InputError if a token spans the boundary."""
        count = self.count_tokens_before(character)
        if count is None:
            raise InputError("one token spans the end of the prompt and the start of the answer")
        return count


def encode(text: TrackedText, *, cut: int = -1) -> EncodedText:
    """Encode a text. At character `cut`, plain text is split in two runs, the second of which
    continues the first. Raises InputError if plain text makes a control token, for a token without
    an embedding, and for too many tokens."""
    text.tokenizer.refuse_rowless_ids([match.control.id for match in text.controls])
    runs = [
        EncodedRun(match.start, match.end, [match.control.id], match.token_end)
        for match in text.controls
    ]
    num_tokens = len(runs)
    for start, end, is_continuation in text.iter_plain_spans(cut):
        if is_continuation:
            ids = text.tokenizer.encode_continuation(text.plain[start:end])
            runs.append(EncodedRun(start, end, ids))
        else:
            runs.append(_encode_run(text, start, end))
        num_tokens += len(runs[-1].ids)
        refuse_long_rows(num_tokens)
    runs.sort(key=lambda run: run.start)
    return EncodedText(text, runs)


def _encode_run(text: TrackedText, start: int, end: int) -> EncodedRun:
    return EncodedRun(start, end, text.tokenizer.encode(text.plain[start:end], is_start=start == 0))
