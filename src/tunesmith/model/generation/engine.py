"""Generation: many requests in one batch, each answered independently of the others.

In: a PackedCausalLM, requests of token ids, a `decode` function from ids to text, the ids that end
an answer. Out: outputs as they finish. Rows of different lengths run without padding; a finished
row leaves at once and the next request takes its slot. A prefix that all prompts share is computed
once. When memory runs out, the unanswered requests start again with half as many rows. Left out:
prompts as text (data/chat_template), which adapter is active (the model's state). Rounding may
depend on the rest of the batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.hardware import read_free_gpu_bytes, release_memory
from tunesmith.core.types import GenerationOutput, GenerationRequest
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.sampling import penalize_repetition, sample_tokens
from tunesmith.model.kv_cache import RaggedKVCache
from tunesmith.model.oom import OutOfMemory, memory_errors

DecodeFn = Callable[[Sequence[int]], str]
# index of a request, its answer so far -> which tokens may follow [V]
AllowedTokensFn = Callable[[int, Sequence[int]], Tensor]

# more rows gain little: the matrix products already use the whole machine
MAX_BATCH_ROWS = {"cpu": 64, "cuda": 256}
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**33}
PREFILL_TOKENS = 4096  # prompts computed in one forward
MIN_SHARED_TOKENS = 16  # a shorter prefix is not worth a forward
REPLACEMENT_CHAR = "\ufffd"  # how a decoder shows the bytes of an incomplete character


def generate(
    model: PackedCausalLM,
    requests: Sequence[GenerationRequest],
    *,
    decode: DecodeFn,
    end_ids: Collection[int],
    batch_size: int | None = None,
    allowed_tokens_fn: AllowedTokensFn | None = None,
) -> Iterator[tuple[int, GenerationOutput]]:
    """Yield (index of the request, its output) in the order in which they finish.

    `tokens` of an output are all generated tokens, including an end token or stop string; an answer
    also ends at the model's context length. `allowed_tokens_fn` constrains the next token, as a
    Grammar does. The model must be in evaluation mode. Raises InputError for a prompt that is empty
    or fills the context, GateError for NaN or infinite logits."""
    check_requests(model, requests)
    # longest prompts first
    pending = sorted(range(len(requests)), key=lambda index: (-len(requests[index].tokens), index))
    slots = min(batch_size or compute_max_batch_rows(model, requests), max(1, len(pending)))
    longest_tokens = compute_longest_row(requests)
    while pending:
        release_memory()  # of activations, or of a larger cache: the cache needs large buffers
        try:
            with memory_errors():
                batch = _DecodeBatch(
                    model, slots, decode, end_ids, allowed_tokens_fn, longest_tokens=longest_tokens
                )
                rows = [_RunningRequest(index, requests[index]) for index in pending]
                for row in _generate_rows(rows, batch):
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
    requests = [row.request for row in rows]
    if _has_fixed_rotation(batch.model, requests):
        batch.share_prefix([request.tokens for request in requests])
    while waiting or batch.rows:
        yield from batch.step(waiting)


def _has_fixed_rotation(model: PackedCausalLM, requests: Sequence[GenerationRequest]) -> bool:
    """Return whether all prompts and answers, however long, have the same rotary frequencies."""
    keys = {model.get_rotation_key(len(request.tokens)) for request in requests}
    longest = min(compute_longest_row(requests), model.context_length)
    keys.add(model.get_rotation_key(longest))
    return len(keys) == 1


def stream_answer(
    model: PackedCausalLM, request: GenerationRequest, *, decode: DecodeFn, end_ids: Collection[int]
) -> Iterator[str]:
    """Yield one answer in pieces, each as soon as no later token can change it. Raises the errors
    of `generate`."""
    check_requests(model, [request])
    row = _RunningRequest(0, request)
    longest_tokens = compute_longest_row([request])
    batch = _DecodeBatch(model, 1, decode, end_ids, longest_tokens=longest_tokens)
    waiting = deque([row])
    sent_chars = 0
    while not row.finish_reason:
        with memory_errors():
            batch.step(waiting)
        text = row.text if row.finish_reason else _trim_unsettled(decode(row.tokens), request.stop)
        if len(text) > sent_chars:
            yield text[sent_chars:]
            sent_chars = len(text)


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


def check_requests(model: PackedCausalLM, requests: Sequence[GenerationRequest]) -> None:
    """Raise InputError for a prompt that is empty or fills the context."""
    assert not model.network.training, "generation needs a model in evaluation mode"
    for index, request in enumerate(requests):
        assert request.max_new_tokens > 0, "max_new_tokens must be positive"
        where = f"request {index}"
        if not request.tokens:
            raise InputError("the prompt is empty", where=where)
        if len(request.tokens) >= model.context_length:
            message = (
                f"the prompt has {len(request.tokens)} tokens "
                f"and fills the context of {model.context_length}"
            )
            raise InputError(message, where=where, fix="shorten the prompt")


def compute_max_batch_rows(model: PackedCausalLM, requests: Sequence[GenerationRequest]) -> int:
    """Return the largest useful number of rows whose keys, values and states fit in CACHE_BYTES,
    and in half of the free memory of a GPU."""
    device = model.device.type
    row_bytes = compute_longest_row(requests) * model.cache_bytes_per_token
    row_bytes += model.state_bytes_per_row
    cache_bytes = CACHE_BYTES[device]
    if device == "cuda":
        release_memory()
        cache_bytes = min(cache_bytes, read_free_gpu_bytes() // 2)
    return max(1, min(MAX_BATCH_ROWS[device], cache_bytes // row_bytes))


def compute_longest_row(requests: Sequence[GenerationRequest]) -> int:
    """Return the most tokens that a prompt and its answer may have."""
    lengths = [len(request.tokens) + request.max_new_tokens for request in requests]
    return max(lengths, default=1)


def find_common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the longest prefix of all sequences: in sorted order, the first and the last differ
    earliest."""
    first = min(sequences)
    last = max(sequences)
    for index, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return first[:index]
    return first[: len(last)]


class _RunningRequest:
    """A request being answered. `finish_reason` is empty until the answer is complete; then `text`
    holds it."""

    def __init__(self, index: int, request: GenerationRequest) -> None:
        self.index = index
        self.request = request
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: Literal["", "end", "stop", "length"] = ""
        # on the CPU, for the same numbers on every device
        self.generator = torch.Generator().manual_seed(request.seed)
        longest_stop = max((len(stop.encode()) for stop in request.stop), default=0)
        # a token is at least a byte; the rest is for characters cut at the start of the tail
        self._tail_tokens = longest_stop + 8

    @property
    def context(self) -> tuple[int, ...]:
        """The prompt and the answer so far."""
        return (*self.request.tokens, *self.tokens)

    def add_token(
        self, token: int, decode: DecodeFn, end_ids: Collection[int], max_tokens: int
    ) -> None:
        """Append the next token and check whether the answer ends with it."""
        self.tokens.append(token)
        if token in end_ids:
            self.finish_reason = "end"
            self.text = decode(self.tokens[:-1])
            return
        if self._find_stop(decode(self.tokens[-self._tail_tokens :])) is not None:
            text = decode(self.tokens)
            stop_start = self._find_stop(text)
            if stop_start is not None:
                self.finish_reason = "stop"
                self.text = text[:stop_start]
                return
        if len(self.tokens) == min(self.request.max_new_tokens, max_tokens):
            self.finish_reason = "length"
            self.text = decode(self.tokens)

    def find_banned_tokens(self) -> list[int]:
        """Return the tokens that would complete a banned sequence."""
        banned_tokens: list[int] = []
        for sequence in self.request.bad_words_ids:
            prefix = sequence[:-1]
            if tuple(self.tokens[len(self.tokens) - len(prefix) :]) == prefix:
                banned_tokens.append(sequence[-1])
        return banned_tokens

    def _find_stop(self, text: str) -> int | None:
        """Return where the first stop string begins."""
        starts = [text.find(stop) for stop in self.request.stop]
        return min((start for start in starts if start >= 0), default=None)

    def to_generation(self) -> GenerationOutput:
        assert self.finish_reason
        prompt_tokens = len(self.request.tokens)
        return GenerationOutput(self.text, tuple(self.tokens), self.finish_reason, prompt_tokens)


class _DecodeBatch:
    """The rows being answered and the model's cache: row i of both is the same."""

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
        self.model = model
        self.decode = decode
        self.end_ids = frozenset(end_ids)
        self.allowed_tokens_fn = allowed_tokens_fn
        self.cache = RaggedKVCache(slots, longest_tokens)
        self.rows: list[_RunningRequest] = []

    def share_prefix(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Compute the prefix of all prompts once. Each prompt keeps at least its last token, which
        predicts the answer."""
        if len(prompts) < 2:
            return
        prefix = find_common_prefix([prompt[:-1] for prompt in prompts])
        if len(prefix) >= MIN_SHARED_TOKENS:
            self.model.prefill([prefix], self.cache, min(map(len, prompts)))
            self.cache.share_prefix()

    def _restart_rerotated(self, waiting: deque[_RunningRequest]) -> None:
        """Move rows whose next token changes the rotary frequencies back to `waiting`: their keys
        must be computed again, since stored ones are rotated already."""
        get_key = self.model.get_rotation_key
        for index in reversed(range(len(self.rows))):
            row = self.rows[index]
            length = len(row.request.tokens) + len(row.tokens)
            if get_key(length) != get_key(length - 1):
                waiting.appendleft(row)
                self._drop_row(index)

    def step(self, waiting: deque[_RunningRequest]) -> list[_RunningRequest]:
        """Compute the prompts of waiting requests if there are free slots, else one more token of
        every row. Returns the rows that finished."""
        self._restart_rerotated(waiting)
        arriving = self._admit_waiting(waiting)
        if arriving:
            hidden_BH = self.model.prefill([row.context for row in arriving], self.cache)
        else:
            hidden_BH = self.model.decode_step([row.tokens[-1] for row in self.rows], self.cache)
        self.rows += arriving
        stepped = arriving or self.rows
        next_tokens = self._sample_next_tokens(hidden_BH, stepped)
        for row, token in zip(stepped, next_tokens, strict=True):
            max_tokens = self.model.context_length - len(row.request.tokens)
            row.add_token(token, self.decode, self.end_ids, max_tokens)
        return self._remove_finished()

    def _admit_waiting(self, waiting: deque[_RunningRequest]) -> list[_RunningRequest]:
        arriving: list[_RunningRequest] = []
        tokens = 0
        while waiting and len(self.rows) + len(arriving) < self.cache.slots:
            tokens += len(waiting[0].context) - self.cache.prefix_length
            if arriving and tokens > PREFILL_TOKENS:
                break
            arriving.append(waiting.popleft())
        return arriving

    @torch.no_grad()
    def _sample_next_tokens(self, hidden_BH: Tensor, rows: Sequence[_RunningRequest]) -> list[int]:
        logits_BV = self.model.head.compute_logits(hidden_BH)
        if not bool(logits_BV.amax(dim=-1).isfinite().all()):
            fix = "lower learning_rate, or use dtype: fp32"
            raise GateError("the model's logits are NaN or infinite", fix=fix)
        for index, row in enumerate(rows):
            if row.request.repetition_penalty != 1:
                penalty = row.request.repetition_penalty
                penalize_repetition(logits_BV[index], row.context, penalty)
            if banned_tokens := row.find_banned_tokens():
                logits_BV[index, banned_tokens] = -torch.inf
            if self.allowed_tokens_fn is not None:
                allowed_V = self.allowed_tokens_fn(row.index, row.tokens).to(logits_BV.device)
                logits_BV[index].masked_fill_(~allowed_V, -torch.inf)
        requests = [row.request for row in rows]
        return sample_tokens(logits_BV, requests, [row.generator for row in rows])

    def _remove_finished(self) -> list[_RunningRequest]:
        """Drop finished rows as the cache does: the last row moves to the freed index."""
        finished = [row for row in self.rows if row.finish_reason]
        for index in reversed(range(len(self.rows))):
            if self.rows[index].finish_reason:
                self._drop_row(index)
        return finished

    def _drop_row(self, index: int) -> None:
        self.cache.drop_row(index)
        last = self.rows.pop()
        if index < len(self.rows):
            self.rows[index] = last
