"""Generation: many requests at once, each answered as if it were alone.

In: a LanguageModel, Requests of token ids, a `decode` from ids to text, the ids that end an answer. Out: Generations as
they finish. Rows of different lengths run side by side without padding; a finished row leaves at once and the next
request takes its place. What all prompts begin with is computed once. When memory runs out, what is not answered yet
starts again with half as many rows. Left out: prompts as text (data/render.py), which adapter is on (the model's
state). Rounding can differ with what else is in the batch; the mathematics does not.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import Generation, Request
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.generation.sampling import choose
from tunesmith.model.kv_cache import RowCache
from tunesmith.model.oom import OutOfMemory, memory_errors

Decode = Callable[[Sequence[int]], str]
Allowed = Callable[[int, Sequence[int]], Tensor]  # index of a request, its answer so far -> which tokens may follow [V]

MOST_ROWS = {"cpu": 64, "cuda": 256}  # more rows gain little: by then the matrix products fill the machine
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**33}
PREFILL_TOKENS = 4096  # prompts computed in one forward
SHARED_TOKENS = 16  # a shorter common beginning is not worth a forward of its own
CUT = "\ufffd"  # how a decoder shows bytes that are not a whole character yet


def generate(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    decode: Decode,
    end_ids: Collection[int],
    batch_size: int | None = None,
    allowed: Allowed | None = None,
) -> Iterator[tuple[int, Generation]]:
    """(index of the request, its answer), in the order in which they finish; `sorted` restores the order of requests.
    `allowed`: a grammar's word on the next token of each answer.

    A Generation's `tokens` are all that were produced, an end token or stop string included; an answer also ends where
    the model's context does. The model must be in evaluation mode. Raises InputError for a prompt that is empty or
    fills the context, GateError for logits that are not finite.
    """
    check_requests(model, requests)
    left = sorted(range(len(requests)), key=lambda i: (-len(requests[i].tokens), i))
    slots = min(batch_size or most_rows(model, requests), max(1, len(left)))
    while left:
        try:
            with memory_errors():
                batch = _Batch(model, slots, decode, end_ids, allowed, longest=longest_row(requests))
                for row in _answered([_Row(i, requests[i]) for i in left], batch):
                    left.remove(row.index)
                    yield row.index, row.generation()
        except OutOfMemory:
            if slots == 1:
                raise
            slots //= 2


def _answered(rows: Sequence[_Row], batch: _Batch) -> Iterator[_Row]:
    waiting = deque(rows)
    batch.share([row.request.tokens for row in rows])
    while waiting or batch.rows:
        yield from batch.step(waiting)


def stream(model: LanguageModel, request: Request, *, decode: Decode, end_ids: Collection[int]) -> Iterator[str]:
    """One answer, piece by piece; a piece comes once no later token can change it. Raises as `generate` does."""
    check_requests(model, [request])
    row, sent = _Row(0, request), 0
    batch, waiting = _Batch(model, 1, decode, end_ids, longest=longest_row([request])), deque([row])
    while not row.finished:
        with memory_errors():
            batch.step(waiting)
        text = row.text if row.finished else _settled(decode(row.tokens), request.stop)
        if len(text) > sent:
            yield text[sent:]
            sent = len(text)


def _settled(text: str, stop: Sequence[str]) -> str:
    """A growing text up to a cut character, and up to what may be the beginning of a stop string."""
    text = text.rstrip(CUT)
    held = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return text[: len(text) - max(held, default=0)]


def check_requests(model: LanguageModel, requests: Sequence[Request]) -> None:
    assert not model.network.training, "generation needs a model in evaluation mode"
    for i, request in enumerate(requests):
        assert request.max_new_tokens > 0, "an answer needs room for a token"
        if not request.tokens:
            raise InputError("the prompt is empty", where=f"request {i}")
        if len(request.tokens) >= model.context_length:
            what = f"the prompt has {len(request.tokens)} tokens and fills the context of {model.context_length}"
            raise InputError(what, where=f"request {i}", fix="shorten the prompt")


def most_rows(model: LanguageModel, requests: Sequence[Request]) -> int:
    """As many rows as help, within the memory set aside for their keys and values."""
    device, longest = model.device.type, longest_row(requests)
    return max(1, min(MOST_ROWS[device], CACHE_BYTES[device] // (longest * model.cache_bytes_per_token)))


def longest_row(requests: Sequence[Request]) -> int:
    """Tokens of a prompt and its answer."""
    return max((len(request.tokens) + request.max_new_tokens for request in requests), default=1)


def common_start(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all sequences begin with: in sorted order the first and the last one differ the earliest."""
    first, last = min(sequences), max(sequences)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return tuple(token for token, _ in same)


class _Row:
    """A request being answered. `finished` stays empty until the answer is complete; then `text` holds it."""

    def __init__(self, index: int, request: Request) -> None:
        self.index, self.request = index, request
        self.tokens: list[int] = []
        self.text = ""
        self.finished: Literal["", "end", "stop", "length"] = ""
        self.generator = torch.Generator().manual_seed(request.seed)  # on the CPU: the same numbers for any device
        longest_stop = max((len(stop.encode()) for stop in request.stop), default=0)
        self._tail = longest_stop + 8  # a token is at least a byte; the rest is for characters cut at the seam

    def add(self, token: int, decode: Decode, end_ids: Collection[int], room: int) -> None:
        """Take the next token and see whether the answer ends with it."""
        self.tokens.append(token)
        if token in end_ids:
            self.finished, self.text = "end", decode(self.tokens[:-1])
            return
        if self._stop_in(decode(self.tokens[-self._tail :])) is not None:
            text = decode(self.tokens)
            place = self._stop_in(text)
            if place is not None:
                self.finished, self.text = "stop", text[:place]
                return
        if len(self.tokens) == min(self.request.max_new_tokens, room):
            self.finished, self.text = "length", decode(self.tokens)

    def refused(self) -> list[int]:
        """The tokens that would complete a banned sequence."""
        bans = self.request.banned
        return [ban[-1] for ban in bans if tuple(self.tokens[len(self.tokens) - len(ban) + 1 :]) == ban[:-1]]

    def _stop_in(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((place for stop in self.request.stop if (place := text.find(stop)) >= 0), default=None)

    def generation(self) -> Generation:
        assert self.finished
        return Generation(self.text, tuple(self.tokens), self.finished, len(self.request.tokens))


class _Batch:
    """The rows that are being answered, and what the model remembers of them: row i of both is the same."""

    def __init__(
        self,
        model: LanguageModel,
        slots: int,
        decode: Decode,
        end_ids: Collection[int],
        allowed: Allowed | None = None,
        *,
        longest: int,
    ) -> None:
        self.model, self.decode, self.end_ids, self.allowed = model, decode, frozenset(end_ids), allowed
        self.cache = RowCache(slots, longest)
        self.rows: list[_Row] = []

    def share(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Compute what all prompts begin with once. Each keeps a token of its own, which predicts its answer."""
        beginning = common_start([prompt[:-1] for prompt in prompts]) if len(prompts) > 1 else ()
        if len(beginning) >= SHARED_TOKENS:
            self.model.prefill([beginning], self.cache)
            self.cache.share()

    def step(self, waiting: deque[_Row]) -> list[_Row]:
        """Compute the prompts of waiting rows where there is room, else one more token of every row. Returns the rows
        that this finished."""
        arriving = self._admit(waiting)
        if arriving:
            hidden_BH = self.model.prefill([row.request.tokens for row in arriving], self.cache)
        else:
            hidden_BH = self.model.extend([row.tokens[-1] for row in self.rows], self.cache)
        self.rows += arriving
        stepped = arriving or self.rows
        for row, token in zip(stepped, self._next_tokens(hidden_BH, stepped), strict=True):
            row.add(token, self.decode, self.end_ids, self.model.context_length - len(row.request.tokens))
        return self._remove_finished()

    def _admit(self, waiting: deque[_Row]) -> list[_Row]:
        arriving: list[_Row] = []
        tokens = 0
        while waiting and len(self.rows) + len(arriving) < self.cache.slots:
            tokens += len(waiting[0].request.tokens) - self.cache.shared
            if arriving and tokens > PREFILL_TOKENS:
                break
            arriving.append(waiting.popleft())
        return arriving

    @torch.no_grad()
    def _next_tokens(self, hidden_BH: Tensor, rows: Sequence[_Row]) -> list[int]:
        logits_BV = self.model.head.logits(hidden_BH)
        if not bool(logits_BV.amax(dim=-1).isfinite().all()):
            raise GateError("the model's logits are not finite", fix="lower learning_rate, or use dtype: fp32")
        for place, row in enumerate(rows):
            if refused := row.refused():
                logits_BV[place, refused] = -torch.inf
            if self.allowed is not None:
                logits_BV[place].masked_fill_(~self.allowed(row.index, row.tokens).to(logits_BV.device), -torch.inf)
        return choose(logits_BV, [row.request for row in rows], [row.generator for row in rows])

    def _remove_finished(self) -> list[_Row]:
        """As the cache does: the last row moves into the place of one that leaves."""
        finished = [row for row in self.rows if row.finished]
        for i in reversed(range(len(self.rows))):
            if self.rows[i].finished:
                self.cache.drop(i)
                last = self.rows.pop()
                if i < len(self.rows):
                    self.rows[i] = last
        return finished
