"""Generation: many requests at once, each answered as if it were alone.

In: a LanguageModel, Requests of token ids, a `decode` from ids to text, the ids that end an answer.
Out: Generations as they finish. Rows of different lengths run side by side without padding; a
finished row leaves at once and the next request takes its place. What all prompts begin with is
computed once. When memory runs out, what is not answered yet starts again with half as many rows.
Left out: prompts as text (data/render.py), which adapter is on (the model's state). Rounding can
differ with what else is in the batch; the mathematics does not."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import GenerationOutput, GenerationRequest
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.sampling import sample_tokens
from tunesmith.model.kv_cache import RaggedKVCache
from tunesmith.model.oom import OutOfMemory, memory_errors

DecodeFn = Callable[[Sequence[int]], str]
AllowedTokensFn = Callable[
    [int, Sequence[int]], Tensor
]  # index of a request, its answer so far -> which tokens may follow [V]

MAX_BATCH_ROWS = {
    "cpu": 64,
    "cuda": 256,
}  # more rows gain little: by then the matrix products fill the machine
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**33}
PREFILL_TOKENS = 4096  # prompts computed in one forward
MIN_SHARED_TOKENS = 16  # a shorter common beginning is not worth a forward of its own
REPLACEMENT_CHAR = "\ufffd"  # how a decoder shows bytes that are not a whole character yet


def generate(
    model: PackedCausalLM,
    requests: Sequence[GenerationRequest],
    *,
    decode: DecodeFn,
    end_ids: Collection[int],
    batch_size: int | None = None,
    allowed_tokens_fn: AllowedTokensFn | None = None,
) -> Iterator[tuple[int, GenerationOutput]]:
    """(index of the request, its answer), in the order in which they finish; `sorted` restores the
    order of requests. `allowed`: a grammar's word on the next token of each answer.

    A Generation's `tokens` are all that were produced, an end token or stop string included; an
    answer also ends where the model's context does. The model must be in evaluation mode. Raises
    InputError for a prompt that is empty or fills the context, GateError for logits that are not
    finite."""
    check_requests(model, requests)
    pending = sorted(range(len(requests)), key=lambda index: (-len(requests[index].tokens), index))
    slots = min(batch_size or compute_max_batch_rows(model, requests), max(1, len(pending)))
    while pending:
        try:
            with memory_errors():
                batch = _DecodeBatch(
                    model,
                    slots,
                    decode,
                    end_ids,
                    allowed_tokens_fn,
                    longest_tokens=compute_longest_row(requests),
                )
                for row in _generate_rows(
                    [_RunningRequest(index, requests[index]) for index in pending], batch
                ):
                    pending.remove(row.index)
                    yield row.index, row.to_generation()
        except OutOfMemory:
            if slots == 1:
                raise
            slots //= 2


def _generate_rows(
    rows: Sequence[_RunningRequest], batch: _DecodeBatch
) -> Iterator[_RunningRequest]:
    waiting = deque(rows)
    batch.share_prefix([row.request.tokens for row in rows])
    while waiting or batch.rows:
        yield from batch.step(waiting)


def stream_answer(
    model: PackedCausalLM, request: GenerationRequest, *, decode: DecodeFn, end_ids: Collection[int]
) -> Iterator[str]:
    """One answer, piece by piece; a piece comes once no later token can change it. Raises as
    `generate` does."""
    check_requests(model, [request])
    row, sent_chars = _RunningRequest(0, request), 0
    batch, waiting = (
        _DecodeBatch(model, 1, decode, end_ids, longest_tokens=compute_longest_row([request])),
        deque([row]),
    )
    while not row.finish_reason:
        with memory_errors():
            batch.step(waiting)
        text = row.text if row.finish_reason else _trim_unsettled(decode(row.tokens), request.stop)
        if len(text) > sent_chars:
            yield text[sent_chars:]
            sent_chars = len(text)


def _trim_unsettled(text: str, stop_strings: Sequence[str]) -> str:
    """A growing text up to a cut character, and up to what may be the beginning of a stop
    string."""
    text = text.rstrip(REPLACEMENT_CHAR)
    tail_chars = (
        n
        for stop_string in stop_strings
        for n in range(1, len(stop_string))
        if text.endswith(stop_string[:n])
    )
    return text[: len(text) - max(tail_chars, default=0)]


def check_requests(model: PackedCausalLM, requests: Sequence[GenerationRequest]) -> None:
    assert not model.network.training, "generation needs a model in evaluation mode"
    for index, request in enumerate(requests):
        assert request.max_new_tokens > 0, "an answer needs room for a token"
        if not request.tokens:
            raise InputError("the prompt is empty", where=f"request {index}")
        if len(request.tokens) >= model.context_length:
            message = f"the prompt has {len(request.tokens)} tokens and fills the context of {model.context_length}"
            raise InputError(message, where=f"request {index}", fix="shorten the prompt")


def compute_max_batch_rows(model: PackedCausalLM, requests: Sequence[GenerationRequest]) -> int:
    """As many rows as help, within the memory set aside for their keys and values."""
    device, longest_tokens = model.device.type, compute_longest_row(requests)
    return max(
        1,
        min(
            MAX_BATCH_ROWS[device],
            CACHE_BYTES[device] // (longest_tokens * model.cache_bytes_per_token),
        ),
    )


def compute_longest_row(requests: Sequence[GenerationRequest]) -> int:
    """Tokens of a prompt and its answer."""
    return max((len(request.tokens) + request.max_new_tokens for request in requests), default=1)


def find_common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all sequences begin with: in sorted order the first and the last one differ the
    earliest."""
    first, last = min(sequences), max(sequences)
    shared_pairs = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(first, last, strict=False)
    )
    return tuple(token for token, _ in shared_pairs)


class _RunningRequest:
    """A request being answered. `finished` stays empty until the answer is complete; then `text`
    holds it."""

    def __init__(self, index: int, request: GenerationRequest) -> None:
        self.index, self.request = index, request
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: Literal["", "end", "stop", "length"] = ""
        self.generator = torch.Generator().manual_seed(
            request.seed
        )  # on the CPU: the same numbers for any device
        longest_stop = max((len(stop.encode()) for stop in request.stop), default=0)
        self._tail_tokens = (
            longest_stop + 8
        )  # a token is at least a byte; the rest is for characters cut at the seam

    def add_token(
        self, token: int, decode: DecodeFn, end_ids: Collection[int], max_tokens: int
    ) -> None:
        """Take the next token and see whether the answer ends with it."""
        self.tokens.append(token)
        if token in end_ids:
            self.finish_reason, self.text = "end", decode(self.tokens[:-1])
            return
        if self._find_stop(decode(self.tokens[-self._tail_tokens :])) is not None:
            text = decode(self.tokens)
            stop_start = self._find_stop(text)
            if stop_start is not None:
                self.finish_reason, self.text = "stop", text[:stop_start]
                return
        if len(self.tokens) == min(self.request.max_new_tokens, max_tokens):
            self.finish_reason, self.text = "length", decode(self.tokens)

    def find_banned_tokens(self) -> list[int]:
        """The tokens that would complete a banned sequence."""
        sequences = self.request.bad_words_ids
        return [
            sequence[-1]
            for sequence in sequences
            if tuple(self.tokens[len(self.tokens) - len(sequence) + 1 :]) == sequence[:-1]
        ]

    def _find_stop(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min(
            (start for stop in self.request.stop if (start := text.find(stop)) >= 0), default=None
        )

    def to_generation(self) -> GenerationOutput:
        assert self.finish_reason
        return GenerationOutput(
            self.text, tuple(self.tokens), self.finish_reason, len(self.request.tokens)
        )


class _DecodeBatch:
    """The rows that are being answered, and what the model remembers of them: row i of both is the
    same."""

    def __init__(
        self,
        model: PackedCausalLM,
        slots: int,
        decode: DecodeFn,
        end_ids: Collection[int],
        allowed_tokens_fn: AllowedTokensFn | None = None,
        *,
        longest_tokens: int,
    ) -> None:
        self.model, self.decode, self.end_ids, self.allowed_tokens_fn = (
            model,
            decode,
            frozenset(end_ids),
            allowed_tokens_fn,
        )
        self.cache = RaggedKVCache(slots, longest_tokens)
        self.rows: list[_RunningRequest] = []

    def share_prefix(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Compute what all prompts begin with once. Each keeps a token of its own, which predicts
        its answer."""
        prefix = find_common_prefix([prompt[:-1] for prompt in prompts]) if len(prompts) > 1 else ()
        if len(prefix) >= MIN_SHARED_TOKENS:
            self.model.prefill([prefix], self.cache)
            self.cache.share_prefix()

    def step(self, waiting: deque[_RunningRequest]) -> list[_RunningRequest]:
        """Compute the prompts of waiting rows where there is room, else one more token of every
        row. Returns the rows that this finished."""
        arriving = self._admit_waiting(waiting)
        if arriving:
            hidden_BH = self.model.prefill([row.request.tokens for row in arriving], self.cache)
        else:
            hidden_BH = self.model.decode_step([row.tokens[-1] for row in self.rows], self.cache)
        self.rows += arriving
        stepped = arriving or self.rows
        for row, token in zip(stepped, self._sample_next_tokens(hidden_BH, stepped), strict=True):
            row.add_token(
                token,
                self.decode,
                self.end_ids,
                self.model.context_length - len(row.request.tokens),
            )
        return self._remove_finished()

    def _admit_waiting(self, waiting: deque[_RunningRequest]) -> list[_RunningRequest]:
        arriving: list[_RunningRequest] = []
        tokens = 0
        while waiting and len(self.rows) + len(arriving) < self.cache.slots:
            tokens += len(waiting[0].request.tokens) - self.cache.prefix_length
            if arriving and tokens > PREFILL_TOKENS:
                break
            arriving.append(waiting.popleft())
        return arriving

    @torch.no_grad()
    def _sample_next_tokens(self, hidden_BH: Tensor, rows: Sequence[_RunningRequest]) -> list[int]:
        logits_BV = self.model.head.compute_logits(hidden_BH)
        if not bool(logits_BV.amax(dim=-1).isfinite().all()):
            raise GateError(
                "the model's logits are not finite", fix="lower learning_rate, or use dtype: fp32"
            )
        for index, row in enumerate(rows):
            if banned_tokens := row.find_banned_tokens():
                logits_BV[index, banned_tokens] = -torch.inf
            if self.allowed_tokens_fn is not None:
                logits_BV[index].masked_fill_(
                    ~self.allowed_tokens_fn(row.index, row.tokens).to(logits_BV.device), -torch.inf
                )
        return sample_tokens(
            logits_BV, [row.request for row in rows], [row.generator for row in rows]
        )

    def _remove_finished(self) -> list[_RunningRequest]:
        """As the cache does: the last row moves into the place of one that leaves."""
        finished = [row for row in self.rows if row.finish_reason]
        for index in reversed(range(len(self.rows))):
            if self.rows[index].finish_reason:
                self.cache.drop_row(index)
                last = self.rows.pop()
                if index < len(self.rows):
                    self.rows[index] = last
        return finished
