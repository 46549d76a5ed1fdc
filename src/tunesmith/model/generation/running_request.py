"""A request while it is answered: its tokens, its random numbers, and the text that is settled.

In: the next token, again and again. Out: text that no later token changes, piece by piece, and why
the answer ended. Left out: which token is next (sampling.py), and the stored keys and values
(paged_cache.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from tunesmith.core.errors import TunesmithError
from tunesmith.core.types import GenerationOutput, GenerationRequest, TokenLogprobs
from tunesmith.model.paged_cache import BlockContent, CacheRow, extend_contents, make_origin_key
from tunesmith.model.rotary import RotationKey

DecodeFn = Callable[[Sequence[int]], str]
FinishReason = Literal["", "end", "stop", "length", "cancelled", "error"]

REPLACEMENT_CHAR = "\ufffd"  # how a decoder shows the bytes of an incomplete character
# decoded again for every token: enough for a character in bytes, and for what a decoder strips at
# the start of a text
WINDOW_TOKENS = 16


class AnswerGrammar(Protocol):
    """Decides which tokens may follow in one answer."""

    def find_allowed(self, tokens: Sequence[int]) -> Tensor:
        """Return which tokens may follow `tokens` [V], on the CPU."""
        ...


class AnswerText:
    """The text of a growing answer, of which a few tokens are decoded at a time.

    `settled` is what no later token changes: it ends before an incomplete character and before
    what may become a stop string."""

    def __init__(self, decode: DecodeFn, stop_strings: Sequence[str]) -> None:
        self.settled = ""
        self._decode = decode
        self._stop_strings = stop_strings
        self._start = 0  # the first token of the window
        self._settled_chars = 0  # of the window's text

    def extend(self, tokens: Sequence[int]) -> bool:
        """Settle what the last of `tokens` decides; return whether a stop string ends the text."""
        text = self._decode(tokens[self._start :])
        stop_start = _find_stop(text, self._stop_strings)
        if stop_start is not None:
            self._settle(text[:stop_start])
            return True
        self._settle(_trim_unsettled(text, self._stop_strings))
        if len(tokens) - self._start > 2 * WINDOW_TOKENS:
            self._move_window(tokens, text)
        return False

    def finish(self, tokens: Sequence[int]) -> None:
        """Settle everything."""
        self._settle(self._decode(tokens[self._start :]))

    def _settle(self, text: str) -> None:
        self.settled += text[self._settled_chars :]
        self._settled_chars = max(self._settled_chars, len(text))

    def _move_window(self, tokens: Sequence[int], text: str) -> None:
        """Start the window later, where its tokens have the same text as in the longer window."""
        start = len(tokens) - WINDOW_TOKENS
        tail = self._decode(tokens[start:])
        dropped_chars = len(text) - len(tail)
        if text.endswith(tail) and dropped_chars <= self._settled_chars:
            self._start = start
            self._settled_chars -= dropped_chars


def _find_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Return where the first stop string begins."""
    starts = [text.find(stop) for stop in stop_strings]
    return min((start for start in starts if start >= 0), default=None)


def _trim_unsettled(text: str, stop_strings: Sequence[str]) -> str:
    """Remove an incomplete character and a possible beginning of a stop string from the end of a
    growing text."""
    text = text.rstrip(REPLACEMENT_CHAR)
    tail_chars = 0
    for stop_string in stop_strings:
        for n in range(1, len(stop_string)):
            if text.endswith(stop_string[:n]):
                tail_chars = max(tail_chars, n)
    return text[: len(text) - tail_chars]


class RunningRequest:
    """A request being answered. `finish_reason` is empty until the answer is complete."""

    def __init__(
        self,
        request: GenerationRequest,
        decode: DecodeFn,
        end_ids: Collection[int],
        *,
        max_tokens: int,
        grammar: AnswerGrammar | None = None,
    ) -> None:
        """Start an answer that ends with one of `end_ids`, and after `max_tokens` at the latest."""
        self.request = request
        self.grammar = grammar
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []  # of `tokens`, if the request wants them
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt after its first token
        self.new_text = ""  # what the last token added to `text`
        self.finish_reason: FinishReason = ""
        self.error: TunesmithError | None = None  # why there is no answer
        self.cached_tokens = 0  # of the prompt, whose keys and values were stored already
        # what the cache stores of it, while it has a slot
        self.cache_row: CacheRow | None = None
        self.rotation_key: RotationKey = ()
        self.contents: list[BlockContent] = []  # of its full blocks
        self.num_published = 0  # blocks that other rows can find
        self._origin_key = b""
        # on the CPU, for the same numbers on every device
        self.generator = torch.Generator().manual_seed(request.seed)
        self._end_ids = frozenset(request.end_ids or end_ids)
        self._max_tokens = max_tokens
        self._text = AnswerText(decode, request.stop)

    @property
    def text(self) -> str:
        """The answer as far as no later token changes it, without its end token or stop string."""
        return self._text.settled

    @property
    def context(self) -> tuple[int, ...]:
        """The prompt and the answer so far."""
        return (*self.request.tokens, *self.tokens)

    @property
    def num_tokens(self) -> int:
        """The length of the context."""
        return len(self.request.tokens) + len(self.tokens)

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether tokens of the prompt have no log-probabilities yet that the request wants."""
        is_wanted = self.request.num_prompt_logprobs >= 0
        return is_wanted and len(self.prompt_logprobs) < len(self.request.tokens) - 1

    @property
    def last_token(self) -> int:
        return self.tokens[-1] if self.tokens else self.request.tokens[-1]

    @property
    def stored(self) -> CacheRow:
        """Its row of the cache."""
        assert self.cache_row is not None, "the request waits"
        return self.cache_row

    def extend_contents(self) -> None:
        """Compute what the full blocks of the context hold, for `rotation_key`. Blocks are shared
        within one adapter, scale and salt only."""
        request = self.request
        adapter = (request.adapter, request.adapter_scale)
        if not request.adapter or not request.adapter_scale:
            adapter = ("", 1.0)  # the base
        origin_key = make_origin_key(*adapter, request.cache_salt, self.rotation_key)
        if origin_key != self._origin_key:
            self.contents.clear()
            self._origin_key = origin_key
        extend_contents(self.contents, origin_key, self.context)

    def get_parent_key(self, block: int) -> bytes:
        """Return the key of all tokens before a block."""
        return self.contents[block - 1].key if block else self._origin_key

    def add_token(self, token: int) -> None:
        """Append the next token and check whether the answer ends with it."""
        old_chars = len(self.text)
        self.tokens.append(token)
        if token in self._end_ids:
            self.finish_reason = "end"
            self._text.finish(self.tokens[:-1])
        elif self._text.extend(self.tokens):
            self.finish_reason = "stop"
        elif len(self.tokens) == self._max_tokens:
            self.finish_reason = "length"
            self._text.finish(self.tokens)
        self.new_text = self.text[old_chars:]

    def fail(self, error: TunesmithError) -> None:
        """End without an answer."""
        self.finish_reason = "error"
        self.error = error
        self.new_text = ""

    def find_banned_tokens(self) -> list[int]:
        """Return the tokens that would complete a banned sequence."""
        banned_tokens: list[int] = []
        for sequence in self.request.bad_words_ids:
            prefix = sequence[:-1]
            if tuple(self.tokens[len(self.tokens) - len(prefix) :]) == prefix:
                banned_tokens.append(sequence[-1])
        return banned_tokens

    def to_generation(self) -> GenerationOutput:
        """Return the complete answer."""
        reason = self.finish_reason
        assert reason in ("end", "stop", "length"), f"an answer that ended with {reason!r}"
        prompt_tokens = len(self.request.tokens)
        logprobs = tuple(self.logprobs)
        return GenerationOutput(self.text, tuple(self.tokens), reason, prompt_tokens, logprobs)
