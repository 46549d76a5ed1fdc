"""Generation: many requests in one batch, each answered independently of the others.

    batch = DecodeBatch(model, ...); row = batch.submit(request); batch.step() -> rows that advanced
    generate(model, requests, ...)     loops over it, and yields outputs as they finish
    stream_answer(model, request, ...) the same for one answer, in pieces

In: a PackedCausalLM, requests of token ids, a `decode` function from ids to text, the ids that end
an answer. Rows of different lengths run without padding; a finished row leaves at once and the next
request takes its slot. What prompts have in common is computed once. Left
out: prompts as text (data/chat_template), and without a bank, which adapter is active (the model's
state). Rounding may depend on the rest of the batch, and on what was stored already."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.hardware import read_free_gpu_bytes, release_memory
from tunesmith.core.types import GenerationOutput, GenerationRequest
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.decode_layers import build_decode_layers
from tunesmith.model.generation.grammar import Grammar
from tunesmith.model.generation.running_request import AnswerGrammar, DecodeFn, RunningRequest
from tunesmith.model.generation.sampling import (
    measure_logprobs,
    penalize_answer_tokens,
    penalize_repetition,
    sample_tokens,
)
from tunesmith.model.machine_errors import OutOfMemory, machine_errors
from tunesmith.model.paged_cache import (
    BLOCK_TOKENS,
    MIN_COPIED_TOKENS,
    CacheRow,
    PagedKVCache,
    count_blocks,
    count_common,
)

if TYPE_CHECKING:
    from tunesmith.model.adapter_bank import AdapterBank

# more rows gain little: the matrix products already use the whole machine
MAX_BATCH_ROWS = {"cpu": 64, "cuda": 256}
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**33}
LOGPROB_POSITIONS = 64  # of a prompt, whose logits are there at once
# prompts computed in one forward: before anything else, between two tokens of answers, and when
# nothing is being answered
PREFILL_TOKENS = 4096
CHUNK_TOKENS = 128
IDLE_CHUNK_TOKENS = 1024
LOGITS_FIX = "lower learning_rate, or use dtype: fp32"


def generate(
    model: PackedCausalLM,
    requests: Sequence[GenerationRequest],
    *,
    decode: DecodeFn,
    end_ids: Collection[int],
    batch_size: int | None = None,
    grammar: Grammar | None = None,
    bank: AdapterBank | None = None,
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
    batch: DecodeBatch | None = None
    while pending:
        release_memory()  # of activations, or of a larger cache: the cache needs large buffers
        try:
            with machine_errors():
                batch = DecodeBatch(
                    model,
                    slots=slots,
                    decode=decode,
                    end_ids=end_ids,
                    cache_bytes=compute_cache_bytes(model, requests, slots),
                    bank=bank,
                    chunk_tokens=None,
                )
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
            batch = None  # its cache is freed before the next one
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
    check_request(model, request)
    cache_bytes = compute_cache_bytes(model, [request], slots=1)
    batch = DecodeBatch(model, slots=1, decode=decode, end_ids=end_ids, cache_bytes=cache_bytes)
    row = batch.submit(request)
    while not row.finish_reason:
        with machine_errors():
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
    vocab_size = model.head.weight.shape[0] if request.logit_bias else 0
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


def compute_cache_bytes(
    model: PackedCausalLM, requests: Sequence[GenerationRequest], slots: int
) -> int:
    """Return the bytes of the keys and values of the `slots` longest rows, in whole blocks."""
    lengths = [len(request.tokens) + request.max_new_tokens for request in requests]
    blocks = [count_blocks(min(length, model.context_length)) for length in lengths]
    num_blocks = sum(sorted(blocks, reverse=True)[:slots])
    return num_blocks * BLOCK_TOKENS * model.cache_bytes_per_token


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


class DecodeBatch:
    """Requests that are answered together, and the model's cache. Owned by one thread.

    `waiting` requests get a slot in their order; `rows` have one, the oldest first."""

    def __init__(
        self,
        model: PackedCausalLM,
        *,
        slots: int,
        decode: DecodeFn,
        end_ids: Collection[int],
        cache_bytes: int,
        bank: AdapterBank | None = None,
        chunk_tokens: int | None = CHUNK_TOKENS,
    ) -> None:
        """Answer up to `slots` requests at a time, with keys and values of at most `cache_bytes`.

        While rows are answered, a step computes `chunk_tokens` tokens of prompts at most, so that
        no answer waits for a long prompt; with None, prompts go first."""
        self.model = model
        self.head = model.head.block(model.dtype)
        self.decode = decode
        self.end_ids = frozenset(end_ids)
        self.bank = bank
        self.chunk_tokens = chunk_tokens
        block_bytes = model.cache_bytes_per_token * BLOCK_TOKENS
        num_blocks = slots * count_blocks(model.context_length)
        if block_bytes:
            num_blocks = cache_bytes // block_bytes
        self.cache = PagedKVCache(slots, num_blocks)
        self.layers = build_decode_layers(model, self.cache)
        # a state belongs to the end of its row: it is not stored at the ends of blocks
        self.can_share = model.state_bytes_per_row == 0
        # of a part of a block: whole blocks are found without a change of rounding in bf16
        self.min_common_tokens = MIN_COPIED_TOKENS if chunk_tokens is None else BLOCK_TOKENS
        self.waiting: deque[RunningRequest] = deque()
        self.rows: list[RunningRequest] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.rows)

    def submit(
        self, request: GenerationRequest, grammar: AnswerGrammar | None = None
    ) -> RunningRequest:
        """Let a request wait for a slot. Raises InputError for a prompt that is empty or fills the
        context, for a row that the cache has no room for, and for an adapter that is not in the
        bank."""
        check_request(self.model, request)
        self._check_adapter(request)
        max_tokens = self.model.context_length - len(request.tokens)
        max_tokens = min(max_tokens, request.max_new_tokens)
        row_tokens = len(request.tokens) + max_tokens
        if count_blocks(row_tokens) > self.cache.pool.num_blocks:
            message = (
                f"prompt and answer have {row_tokens} tokens, more than the cache has room for"
            )
            raise InputError(message, where="request", fix="shorten the prompt or max_new_tokens")
        row = RunningRequest(
            request, self.decode, self.end_ids, max_tokens=max_tokens, grammar=grammar
        )
        self.waiting.append(row)
        return row

    def _check_adapter(self, request: GenerationRequest) -> None:
        keys = self.bank.keys if self.bank else ()
        if request.adapter and request.adapter not in keys:
            raise InputError(f"there is no adapter {request.adapter!r}", where="request")

    def cancel(self, row: RunningRequest) -> None:
        """End a row that waits or runs, and free its slot and its blocks at once."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.rows:
            self._drop_row(row)
        else:
            return
        row.finish_reason = "cancelled"

    def step(self) -> list[RunningRequest]:
        """Compute prompts, at most a chunk of them if rows are being answered, then one more token
        of those rows. Returns the rows that got a token or ended."""
        stepped = self._fail_orphans()
        self._put_back_rerotated()
        self._admit_waiting()
        answering = [row for row in self.rows if not _needs_prompt(row)]
        started = self._compute_prompts(is_answering=bool(answering))
        if started and self.chunk_tokens is None:
            return stepped + started
        return stepped + started + self._extend_answers(answering)

    def _fail_orphans(self) -> list[RunningRequest]:
        """End the rows whose adapter has left the bank, and return them."""
        orphans: list[RunningRequest] = []
        for row in (*self.rows, *self.waiting):
            try:
                self._check_adapter(row.request)
            except InputError as error:
                self.cancel(row)
                row.fail(error)
                orphans.append(row)
        return orphans

    def _put_back_rerotated(self) -> None:
        """Move rows whose next token changes the rotary frequencies back to `waiting`: their keys
        must be computed again, since stored ones are rotated already."""
        for row in reversed(self.rows):
            if self.model.get_rotation_key(row.num_tokens) != row.rotation_key:
                self._put_back(row)

    def _put_back(self, row: RunningRequest) -> None:
        """Let a row wait again. It keeps its tokens, its text and its random numbers."""
        self._drop_row(row)
        self.waiting.appendleft(row)

    # ---------------------------------------------------------------- prompts

    def _admit_waiting(self) -> None:
        """Give slots and blocks to waiting rows, in their order, as long as there are some.

        A row waits for blocks that another one computes now, instead of computing them, too."""
        blocks_to_come = self._list_blocks_to_come()
        for row in list(self.waiting):
            if len(self.rows) == self.cache.slots:
                return
            row.rotation_key = self.model.get_rotation_key(row.num_tokens)
            if self.can_share:
                row.extend_contents()
            cache_row = self.cache.add_row()
            # the last token predicts the next one: it is always computed
            num_usable = row.num_tokens - 1
            if row.needs_prompt_logprobs:
                row.prompt_logprobs.clear()
                num_usable = 0
            self.cache.start_with_prefix(cache_row, row.contents[: num_usable // BLOCK_TOKENS])
            num_shared = len(cache_row.blocks)
            parent = row.get_parent_key(num_shared)
            block_end = min(num_usable, cache_row.length + BLOCK_TOKENS)
            tokens = row.context[cache_row.length : block_end]
            source, num_copied = self.cache.pool.find_beginning(parent, tokens)
            to_come = blocks_to_come.get(parent, ())
            num_to_come = max((count_common(tokens, other) for other in to_come), default=0)
            if num_to_come >= self.min_common_tokens and num_to_come > num_copied:
                self.cache.drop_row(cache_row)
                continue
            if not self._reserve_prompt(row, cache_row, source, num_copied):
                self.cache.drop_row(cache_row)
                return
            self.waiting.remove(row)
            self.rows.append(row)
            row.cache_row = cache_row
            if not row.tokens:
                row.cached_tokens = cache_row.length
            for content in row.contents[num_shared:]:
                blocks_to_come.setdefault(content.parent, []).append(content.tokens)

    def _reserve_prompt(
        self, row: RunningRequest, cache_row: CacheRow, source: int, num_copied: int
    ) -> bool:
        if num_copied < self.min_common_tokens:
            return self.cache.reserve(cache_row, row.num_tokens)
        return self.cache.reserve_with_copy(cache_row, row.num_tokens, source, num_copied)

    def _list_blocks_to_come(self) -> dict[bytes, list[tuple[int, ...]]]:
        """Return the tokens of the blocks that the prompts of `rows` still lack, by what is before
        them."""
        tokens_by_parent: dict[bytes, list[tuple[int, ...]]] = {}
        for row in self.rows:
            if _needs_prompt(row):
                for content in row.contents[row.stored.length // BLOCK_TOKENS :]:
                    tokens_by_parent.setdefault(content.parent, []).append(content.tokens)
        return tokens_by_parent

    def _compute_prompts(self, *, is_answering: bool) -> list[RunningRequest]:
        """Compute prompts in the order of their rows, up to a number of tokens, and the first
        token of those that are complete."""
        budget = PREFILL_TOKENS
        if self.chunk_tokens is not None:
            budget = self.chunk_tokens if is_answering else IDLE_CHUNK_TOKENS
        chunks: dict[RunningRequest, int] = {}
        for row in self.rows:
            if not _needs_prompt(row):
                continue
            missing = row.num_tokens - row.stored.length
            must_be_complete = self.chunk_tokens is None
            if chunks and (budget <= 0 or (must_be_complete and missing > budget)):
                break
            chunks[row] = missing if must_be_complete else min(missing, budget)
            budget -= chunks[row]
        if not chunks:
            return []
        rows = self._sort_rows(chunks)
        tokens_by_row = [
            row.context[row.stored.length : row.stored.length + chunks[row]] for row in rows
        ]
        num_outputs = [chunks[row] if row.needs_prompt_logprobs else 1 for row in rows]
        with self._use_adapters(rows, [chunks[row] for row in rows]):
            hidden_KH = self.model.prefill(
                [row.stored for row in rows],
                tokens_by_row,
                self.cache,
                [row.num_tokens for row in rows],
                num_outputs,
            )
        complete: list[RunningRequest] = []
        indices: list[int] = []
        end = 0
        for row, count in zip(rows, num_outputs, strict=True):
            end += count
            if row.needs_prompt_logprobs:
                self._add_prompt_logprobs(hidden_KH[end - count : end], row)
            if row.stored.length == row.num_tokens:
                complete.append(row)
                indices.append(end - 1)
        if complete:
            hidden_BH = hidden_KH.index_select(0, torch.tensor(indices, device=hidden_KH.device))
            self._add_next_tokens(hidden_BH, complete)
        return complete

    @torch.no_grad()
    def _add_prompt_logprobs(self, hidden_KH: Tensor, row: RunningRequest) -> None:
        """Note the log-probabilities of the prompt's tokens after those that were just computed."""
        prompt = row.request.tokens
        start = row.stored.length - len(hidden_KH)
        for part_KH in hidden_KH.split(LOGPROB_POSITIONS):
            targets = prompt[start + 1 : start + 1 + len(part_KH)]
            start += len(part_KH)
            if targets:
                logits_KV = self.head.compute_logits(part_KH[: len(targets)])
                logits_KV[:, self.model.token_rows :] = -torch.inf
                counts = [row.request.num_prompt_logprobs] * len(targets)
                row.prompt_logprobs += measure_logprobs(logits_KV, targets, counts)

    # ---------------------------------------------------------------- answers

    def _extend_answers(self, answering: Sequence[RunningRequest]) -> list[RunningRequest]:
        """Compute one more token of each row. If there are not enough blocks, the youngest rows
        are put back."""
        for row in answering:
            while row in self.rows and not self.cache.reserve(row.stored, row.num_tokens):
                self._put_back(self.rows[-1])
        rows = self._sort_rows([row for row in answering if row in self.rows])
        if not rows:
            return []
        with self._use_adapters(rows, [1] * len(rows)):
            hidden_BH = self.model.decode_step(
                [row.stored for row in rows],
                [row.last_token for row in rows],
                self.cache,
                self.layers.run if self.layers is not None else None,
            )
        self._add_next_tokens(hidden_BH, rows)
        return rows

    def _sort_rows(self, rows: Iterable[RunningRequest]) -> list[RunningRequest]:
        """Put rows of one adapter beside each other, and else in the order of their slots."""
        return sorted(
            rows, key=lambda row: (row.request.adapter, row.request.adapter_scale, row.stored.slot)
        )

    def _use_adapters(
        self, rows: Sequence[RunningRequest], lengths: Sequence[int]
    ) -> AbstractContextManager[None]:
        if self.bank is None:
            return nullcontext()
        ranges: list[tuple[str, float, int]] = []
        for row, length in zip(rows, lengths, strict=True):
            ranges.append((row.request.adapter, row.request.adapter_scale, length))
        return self.bank.use_rows(ranges)

    def _publish_blocks(self, row: RunningRequest) -> None:
        """Let later rows find the blocks that this one has filled."""
        num_full = row.stored.length // BLOCK_TOKENS
        if self.can_share and num_full > row.num_published:
            row.extend_contents()
            for index in range(row.num_published, num_full):
                self.cache.pool.publish(row.stored.blocks[index], row.contents[index])
            row.num_published = num_full

    @torch.no_grad()
    def _add_next_tokens(self, hidden_BH: Tensor, rows: Sequence[RunningRequest]) -> None:
        """Choose the next token of each row, and drop the rows that end with it. A row without
        finite logits ends with an error."""
        logits_BV = self.head.compute_logits(hidden_BH)
        # tokens from there on could not be read again
        logits_BV[:, self.model.token_rows :] = -torch.inf
        is_finite_B = logits_BV.amax(dim=-1).isfinite()
        if not bool(is_finite_B.all()):
            for row, is_finite in zip(rows, is_finite_B.tolist(), strict=True):
                if not is_finite:
                    row.fail(GateError("the model's logits are NaN or infinite", fix=LOGITS_FIX))
            # a mask of the device would make a GPU wait for its sum
            logits_BV = logits_BV[[index for index, row in enumerate(rows) if row.error is None]]
        answered = [row for row in rows if row.error is None]
        if answered:
            self._sample_tokens(logits_BV, answered)
        for row in rows:
            if row.error is None:
                self._publish_blocks(row)
            if row.finish_reason:
                self._drop_row(row)

    def _sample_tokens(self, logits_BV: Tensor, rows: Sequence[RunningRequest]) -> None:
        """Choose the next token of each row from finite logits. A row whose grammar or bans leave
        no token ends with an error."""
        raw_BV = logits_BV.clone() if any(_has_logprobs(row) for row in rows) else logits_BV
        for logits_V, row in zip(logits_BV, rows, strict=True):
            try:
                _adjust_logits(logits_V, row)
            except InputError as error:
                row.fail(error)
        possible = [index for index, row in enumerate(rows) if row.error is None]
        if not possible:
            return
        if len(possible) < len(rows):
            rows = [rows[index] for index in possible]
            logits_BV = logits_BV[possible]
            raw_BV = raw_BV[possible]
        requests = [row.request for row in rows]
        tokens = sample_tokens(logits_BV, requests, [row.generator for row in rows])
        _add_logprobs(raw_BV, tokens, rows)
        for row, token in zip(rows, tokens, strict=True):
            row.add_token(token)

    def _drop_row(self, row: RunningRequest) -> None:
        self.rows.remove(row)
        self.cache.drop_row(row.stored)
        row.cache_row = None
        row.num_published = 0


def _needs_prompt(row: RunningRequest) -> bool:
    """Return whether more of a row is to be stored than the last token of its answer. The last one
    of a prompt is computed like the others: a step rounds otherwise."""
    return row.stored.length + bool(row.tokens) < row.num_tokens


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
    """Apply the penalties, the biases, the bans and the grammar of a row, in place. Raises
    InputError if they leave no token."""
    request = row.request
    if request.repetition_penalty != 1:
        penalize_repetition(logits_V, row.context, request.repetition_penalty)
    if row.tokens and (request.presence_penalty or request.frequency_penalty):
        penalize_answer_tokens(logits_V, row.tokens, request)
    for token, bias in request.logit_bias:
        logits_V[token] += bias
    banned_tokens = row.find_banned_tokens()
    if banned_tokens:
        logits_V[banned_tokens] = -torch.inf
    if row.grammar is not None:
        is_allowed_V = row.grammar.find_allowed(row.tokens).to(logits_V.device)
        logits_V.masked_fill_(~is_allowed_V, -torch.inf)
    is_masked = bool(banned_tokens) or row.grammar is not None
    if is_masked and not bool(logits_V.amax().isfinite()):
        raise InputError("the grammar and the banned tokens leave no next token", where="request")
