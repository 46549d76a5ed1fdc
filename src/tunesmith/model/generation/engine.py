"""Generation: many requests in one batch, each answered independently of the others.

    batch = DecodeBatch(model, ...); row = batch.submit(request); batch.step() -> rows that advanced
    generate(model, requests, ...)     loops over it, and yields outputs as they finish
    stream_answer(model, request, ...) the same for one answer, in pieces

In: a PackedCausalLM, requests of token ids, a `decode` function from ids to text, the ids that end
an answer. Rows of different lengths run without padding; a finished row leaves at once and the next
request takes its slot. A prefix that all prompts share is computed once. Left out: prompts as text
(data/chat_template), which adapter is active (the model's state). Rounding may depend on the rest
of the batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.hardware import read_free_gpu_bytes, release_memory
from tunesmith.core.types import GenerationOutput, GenerationRequest
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.grammar import Grammar
from tunesmith.model.generation.running_request import AnswerGrammar, DecodeFn, RunningRequest
from tunesmith.model.generation.sampling import (
    measure_logprobs,
    penalize_answer_tokens,
    penalize_repetition,
    sample_tokens,
)
from tunesmith.model.kv_cache import RaggedKVCache
from tunesmith.model.oom import OutOfMemory, memory_errors

# more rows gain little: the matrix products already use the whole machine
MAX_BATCH_ROWS = {"cpu": 64, "cuda": 256}
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**33}
PREFILL_TOKENS = 4096  # prompts computed in one forward
MIN_SHARED_TOKENS = 16  # a shorter prefix is not worth a forward


def generate(
    model: PackedCausalLM,
    requests: Sequence[GenerationRequest],
    *,
    decode: DecodeFn,
    end_ids: Collection[int],
    batch_size: int | None = None,
    grammar: Grammar | None = None,
) -> Iterator[tuple[int, GenerationOutput]]:
    """Yield (index of the request, its output) in the order in which they finish.

    `tokens` of an output are all generated tokens, including an end token or stop string; an answer
    also ends at the model's context length. Every answer follows `grammar`. When memory runs out,
    the unanswered requests start again with half as many rows. The model must be in evaluation
    mode. Raises InputError for a prompt that is empty or fills the context, GateError for NaN or
    infinite logits."""
    for index, request in enumerate(requests):
        check_request(model, request, where=f"request {index}")
    # longest prompts first
    pending = sorted(range(len(requests)), key=lambda index: (-len(requests[index].tokens), index))
    slots = min(batch_size or compute_max_batch_rows(model, requests), max(1, len(pending)))
    longest_tokens = compute_longest_row(requests)
    cache_bytes = max(CACHE_BYTES[model.device.type], longest_tokens * model.cache_bytes_per_token)
    while pending:
        release_memory()  # of activations, or of a larger cache: the cache needs large buffers
        try:
            with memory_errors():
                batch = DecodeBatch(
                    model, slots=slots, decode=decode, end_ids=end_ids, cache_bytes=cache_bytes
                )
                batch.reserve_rows([requests[index] for index in pending])
                index_by_row: dict[RunningRequest, int] = {}
                for index in pending:
                    row_grammar = grammar.start_answer() if grammar else None
                    index_by_row[batch.submit(requests[index], row_grammar)] = index
                for row in _iter_finished(batch):
                    pending.remove(index_by_row[row])
                    yield index_by_row[row], row.to_generation()
        except OutOfMemory:
            if slots == 1:
                raise
            slots //= 2


def _iter_finished(batch: DecodeBatch) -> Iterator[RunningRequest]:
    """Step until nothing is left to do. Raises the error of a row."""
    while batch.has_work:
        for row in batch.step():
            if row.error is not None:
                raise row.error
            if row.finish_reason:
                yield row


def stream_answer(
    model: PackedCausalLM, request: GenerationRequest, *, decode: DecodeFn, end_ids: Collection[int]
) -> Iterator[str]:
    """Yield one answer in pieces, each as soon as no later token can change it. Raises the errors
    of `generate`."""
    cache_bytes = max(
        CACHE_BYTES[model.device.type], compute_longest_row([request]) * model.cache_bytes_per_token
    )
    batch = DecodeBatch(model, slots=1, decode=decode, end_ids=end_ids, cache_bytes=cache_bytes)
    batch.reserve_rows([request])
    row = batch.submit(request)
    while not row.finish_reason:
        with memory_errors():
            batch.step()
        if row.error is not None:
            raise row.error
        if row.new_text:
            yield row.new_text


def check_request(
    model: PackedCausalLM, request: GenerationRequest, *, where: str = "request"
) -> None:
    """Raise InputError for a prompt that is empty or fills the context, and for a biased token that
    the model does not have."""
    assert not model.network.training, "generation needs a model in evaluation mode"
    assert request.max_new_tokens > 0, "max_new_tokens must be positive"
    if not request.tokens:
        raise InputError("the prompt is empty", where=where)
    if len(request.tokens) >= model.context_length:
        message = (
            f"the prompt has {len(request.tokens)} tokens "
            f"and fills the context of {model.context_length}"
        )
        raise InputError(message, where=where, fix="shorten the prompt")
    vocab_size = model.network.get_output_embeddings().weight.shape[0]
    for token, _ in request.logit_bias:
        if not 0 <= token < vocab_size:
            message = f"logit_bias: token {token} is not one of the model's {vocab_size}"
            raise InputError(message, where=where)


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


def _has_fixed_rotation(model: PackedCausalLM, requests: Sequence[GenerationRequest]) -> bool:
    """Return whether all prompts and answers, however long, have the same rotary frequencies."""
    keys = {model.get_rotation_key(len(request.tokens)) for request in requests}
    longest = min(compute_longest_row(requests), model.context_length)
    keys.add(model.get_rotation_key(longest))
    return len(keys) == 1


class DecodeBatch:
    """Requests that are answered together, and the model's cache. Owned by one thread.

    Row i of the cache is row i of `rows`; `waiting` requests get a slot in their order."""

    def __init__(
        self,
        model: PackedCausalLM,
        *,
        slots: int,
        decode: DecodeFn,
        end_ids: Collection[int],
        cache_bytes: int,
    ) -> None:
        """Answer up to `slots` requests at a time. No row has more keys and values than
        `cache_bytes`."""
        self.model = model
        self.decode = decode
        self.end_ids = frozenset(end_ids)
        self.cache_bytes = cache_bytes
        self.cache = RaggedKVCache(slots)
        self.waiting: deque[RunningRequest] = deque()
        self.rows: list[RunningRequest] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.rows)

    def reserve_rows(self, requests: Sequence[GenerationRequest]) -> None:
        """Make room for rows as long as these, and compute what all their prompts begin with."""
        self.cache.max_length = compute_longest_row(requests)
        if _has_fixed_rotation(self.model, requests):
            self._share_prefix([request.tokens for request in requests])

    def submit(
        self, request: GenerationRequest, grammar: AnswerGrammar | None = None
    ) -> RunningRequest:
        """Let a request wait for a slot. Raises InputError for a prompt that is empty or fills the
        context, and for a row that the cache has no room for."""
        check_request(self.model, request)
        if request.adapter:
            raise InputError(f"there is no adapter {request.adapter!r}", where="request")
        max_tokens = self.model.context_length - len(request.tokens)
        max_tokens = min(max_tokens, request.max_new_tokens)
        row_tokens = len(request.tokens) + max_tokens
        if row_tokens * self.model.cache_bytes_per_token > self.cache_bytes:
            message = (
                f"prompt and answer have {row_tokens} tokens, more than the cache has room for"
            )
            raise InputError(message, where="request", fix="shorten the prompt or max_new_tokens")
        row = RunningRequest(
            request, self.decode, self.end_ids, max_tokens=max_tokens, grammar=grammar
        )
        self.waiting.append(row)
        return row

    def cancel(self, row: RunningRequest) -> None:
        """End a row that waits or runs, and free its slot at once."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.rows:
            self._drop_row(self.rows.index(row))
        else:
            return
        row.finish_reason = "cancelled"

    def step(self) -> list[RunningRequest]:
        """Compute the prompts of waiting requests if there are free slots, else one more token of
        every row. Returns the rows that advanced or ended."""
        if not self.has_work:
            return []
        self._restart_rerotated()
        arriving = self._admit_waiting()
        if arriving:
            hidden_BH = self.model.prefill([row.context for row in arriving], self.cache)
        else:
            hidden_BH = self.model.decode_step([row.tokens[-1] for row in self.rows], self.cache)
        self.rows += arriving
        stepped = arriving or list(self.rows)
        self._add_next_tokens(hidden_BH, stepped)
        for index in reversed(range(len(self.rows))):
            if self.rows[index].finish_reason:
                self._drop_row(index)
        return stepped

    def _share_prefix(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Compute the prefix of all prompts once. Each prompt keeps at least its last token, which
        predicts the answer."""
        if len(prompts) < 2:
            return
        prefix = find_common_prefix([prompt[:-1] for prompt in prompts])
        if len(prefix) >= MIN_SHARED_TOKENS:
            self.model.prefill([prefix], self.cache, min(map(len, prompts)))
            self.cache.share_prefix()

    def _restart_rerotated(self) -> None:
        """Move rows whose next token changes the rotary frequencies back to `waiting`: their keys
        must be computed again, since stored ones are rotated already."""
        get_key = self.model.get_rotation_key
        for index in reversed(range(len(self.rows))):
            row = self.rows[index]
            length = len(row.context)
            if get_key(length) != get_key(length - 1):
                self.waiting.appendleft(row)
                self._drop_row(index)

    def _admit_waiting(self) -> list[RunningRequest]:
        arriving: list[RunningRequest] = []
        tokens = 0
        while self.waiting and len(self.rows) + len(arriving) < self.cache.slots:
            tokens += len(self.waiting[0].context) - self.cache.prefix_length
            if arriving and tokens > PREFILL_TOKENS:
                break
            arriving.append(self.waiting.popleft())
        return arriving

    @torch.no_grad()
    def _add_next_tokens(self, hidden_BH: Tensor, rows: Sequence[RunningRequest]) -> None:
        """Choose the next token of each row. A row without finite logits ends with an error."""
        logits_BV = self.model.head.compute_logits(hidden_BH)
        is_finite_B = logits_BV.amax(dim=-1).isfinite()
        if not bool(is_finite_B.all()):
            fix = "lower learning_rate, or use dtype: fp32"
            for row, is_finite in zip(rows, is_finite_B.tolist(), strict=True):
                if not is_finite:
                    row.fail(GateError("the model's logits are NaN or infinite", fix=fix))
            rows = [row for row in rows if row.error is None]
            logits_BV = logits_BV[is_finite_B]
        if not rows:
            return
        raw_BV = logits_BV.clone() if any(_has_logprobs(row) for row in rows) else logits_BV
        for logits_V, row in zip(logits_BV, rows, strict=True):
            _adjust_logits(logits_V, row)
        requests = [row.request for row in rows]
        tokens = sample_tokens(logits_BV, requests, [row.generator for row in rows])
        _add_logprobs(raw_BV, tokens, rows)
        for row, token in zip(rows, tokens, strict=True):
            row.add_token(token)

    def _drop_row(self, index: int) -> None:
        """Drop a row as the cache does: the last row moves to the freed index."""
        self.cache.drop_row(index)
        last = self.rows.pop()
        if index < len(self.rows):
            self.rows[index] = last


def _has_logprobs(row: RunningRequest) -> bool:
    return row.request.num_logprobs >= 0


def _add_logprobs(raw_BV: Tensor, tokens: Sequence[int], rows: Sequence[RunningRequest]) -> None:
    """Note the log-probabilities of the next tokens in the rows that want them."""
    indices = [index for index, row in enumerate(rows) if _has_logprobs(row)]
    if not indices:
        return
    counts = [rows[index].request.num_logprobs for index in indices]
    logprobs = measure_logprobs(raw_BV[indices], [tokens[index] for index in indices], counts)
    for index, token_logprobs in zip(indices, logprobs, strict=True):
        rows[index].logprobs.append(token_logprobs)


def _adjust_logits(logits_V: Tensor, row: RunningRequest) -> None:
    """Apply the penalties, the biases, the bans and the grammar of a row, in place."""
    request = row.request
    if request.repetition_penalty != 1:
        penalize_repetition(logits_V, row.context, request.repetition_penalty)
    if row.tokens and (request.presence_penalty or request.frequency_penalty):
        penalize_answer_tokens(logits_V, row.tokens, request)
    for token, bias in request.logit_bias:
        logits_V[token] += bias
    if banned_tokens := row.find_banned_tokens():
        logits_V[banned_tokens] = -torch.inf
    if row.grammar is not None:
        is_allowed_V = row.grammar.find_allowed(row.tokens).to(logits_V.device)
        logits_V.masked_fill_(~is_allowed_V, -torch.inf)
