"""Requests that come and go in any order, in a cache that is too small for all of them: no block is
lost, and each answer is the one that it has alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tiny_models import VOCABULARY, make_tiny_model
from tunesmith.core.types import GenerationRequest
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import CHUNK_TOKENS, DecodeBatch
from tunesmith.model.generation.running_request import RunningRequest
from tunesmith.model.paged_cache import BLOCK_TOKENS

NUM_BLOCKS = 5
SLOTS = 3
MODEL = make_tiny_model(method=None)
# beginnings that prompts have in common: none, one block, a block and a part of the next
STARTS = [
    (),
    tuple(range(2, 2 + BLOCK_TOKENS)),
    tuple(2 + i % 40 for i in range(BLOCK_TOKENS + 29)),
]


def spell(tokens: Sequence[int]) -> str:
    return "".join(chr(33 + token) for token in tokens)


def make_batch(
    model: PackedCausalLM,
    *,
    num_blocks: int = NUM_BLOCKS,
    slots: int = SLOTS,
    chunk_tokens: int | None = CHUNK_TOKENS,
) -> DecodeBatch:
    cache_bytes = num_blocks * BLOCK_TOKENS * model.cache_bytes_per_token
    return DecodeBatch(
        model,
        slots=slots,
        decode=spell,
        end_ids=(7,),
        cache_bytes=cache_bytes,
        chunk_tokens=chunk_tokens,
    )


def finish(batch: DecodeBatch) -> None:
    while batch.has_work:
        batch.step()


SOLO: dict[GenerationRequest, tuple[tuple[int, ...], str, str]] = {}


def answer_alone(request: GenerationRequest) -> tuple[tuple[int, ...], str, str]:
    if request not in SOLO:
        batch = make_batch(MODEL)
        row = batch.submit(request)
        finish(batch)
        SOLO[request] = (tuple(row.tokens), row.text, row.finish_reason)
    return SOLO[request]


def make_request(start: int, tail: int, new: int, seed: int) -> GenerationRequest:
    generator = torch.Generator().manual_seed(1000 * start + tail)
    tokens = torch.randint(2, VOCABULARY, (tail,), generator=generator).tolist()
    prompt = (*STARTS[start], *tokens)
    salt = "other" if tail % 5 == 0 else ""
    return GenerationRequest(prompt, new, temperature=float(seed > 0), seed=seed, cache_salt=salt)


class BatchMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.batch = make_batch(MODEL)
        self.rows: list[RunningRequest] = []
        self.streamed: dict[RunningRequest, str] = {}

    @rule(
        start=some.integers(0, 2),
        tail=some.integers(1, 70),
        new=some.integers(1, 60),
        seed=some.integers(0, 2),
    )
    def submit(self, start: int, tail: int, new: int, seed: int) -> None:
        row = self.batch.submit(make_request(start, tail, new, seed))
        self.rows.append(row)
        self.streamed[row] = ""

    @rule(count=some.integers(1, 40))
    def step(self, count: int) -> None:
        for _ in range(count):
            for row in self.batch.step():
                self.streamed[row] += row.new_text

    @precondition(lambda self: self.rows)
    @rule(index=some.integers(0, 30))
    def cancel(self, index: int) -> None:
        self.batch.cancel(self.rows[index % len(self.rows)])

    @invariant()
    def check_blocks(self) -> None:
        pool = self.batch.cache.pool
        held = {block for row in self.batch.rows for block in row.stored.blocks}
        assert pool.num_available == NUM_BLOCKS - len(held)
        assert len(self.batch.cache.rows) == len(self.batch.rows) <= SLOTS
        assert sum(len(row.stored.blocks) for row in self.batch.rows) >= len(held)

    @invariant()
    def check_answers(self) -> None:
        for row in self.rows:
            tokens, text, reason = answer_alone(row.request)
            assert tokens[: len(row.tokens)] == tuple(row.tokens)
            assert text.startswith(row.text)
            assert self.streamed[row] == row.text
            assert row.error is None
            if row.finish_reason not in ("", "cancelled"):
                assert (tuple(row.tokens), row.text, row.finish_reason) == (tokens, text, reason)

    def teardown(self) -> None:
        self.step(1)
        while self.batch.has_work:
            self.step(1)
        self.check_answers()
        assert all(row.finish_reason for row in self.rows)
        assert self.batch.cache.pool.num_available == NUM_BLOCKS


TestBatchMachine = BatchMachine.TestCase
TestBatchMachine.settings = settings(
    max_examples=6,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# ---------------------------------------------------------------- what the machine must meet


def test_rows_that_are_put_back_go_on_where_they_were() -> None:
    """Three rows grow until their blocks are not enough; the youngest waits and loses nothing."""
    batch = make_batch(MODEL, num_blocks=4)
    requests = [make_request(0, tail, 60, seed) for tail, seed in ((50, 0), (51, 1), (55, 2))]
    rows = [batch.submit(request) for request in requests]
    put_back = 0
    while batch.has_work:
        batch.step()
        put_back += sum(bool(row.tokens) for row in batch.waiting)
    assert put_back > 0, "nothing was tested"
    for row in rows:
        assert (tuple(row.tokens), row.text, row.finish_reason) == answer_alone(row.request)


@pytest.mark.parametrize("salts", [("", ""), ("", "key")], ids=["one key", "two keys"])
def test_a_prompt_is_computed_from_the_first_block_that_nobody_has(
    salts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = tuple(2 + i % 40 for i in range(2 * BLOCK_TOKENS))
    counts: list[list[int]] = []
    prefill = MODEL.prefill

    def count_tokens(rows: Sequence[object], prompts: Sequence[Sequence[int]], *others: object):
        counts.append([len(prompt) for prompt in prompts])
        return prefill(rows, prompts, *others)

    monkeypatch.setattr(MODEL, "prefill", count_tokens)
    batch = make_batch(MODEL)
    for salt, tail in zip((*salts, *salts), ((), (5,), (6, 7), (8,)), strict=True):
        row = batch.submit(GenerationRequest((*begin, *tail), 1, cache_salt=salt))
        finish(batch)
        cached = row.cached_tokens
    second = 1 if salts[0] == salts[1] else 129
    assert counts == [[128], [second], [2], [1]]
    assert cached == 2 * BLOCK_TOKENS


def test_prompts_that_arrive_together_compute_their_beginning_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[list[int]] = []
    prefill = MODEL.prefill

    def count_tokens(rows: Sequence[object], prompts: Sequence[Sequence[int]], *others: object):
        counts.append([len(prompt) for prompt in prompts])
        return prefill(rows, prompts, *others)

    monkeypatch.setattr(MODEL, "prefill", count_tokens)
    batch = make_batch(MODEL)
    rows = [batch.submit(GenerationRequest((*STARTS[1], n, n, n), 4)) for n in (5, 6, 9)]
    finish(batch)
    assert counts == [[67], [3, 3]]
    assert [row.cached_tokens for row in rows] == [0, BLOCK_TOKENS, BLOCK_TOKENS]
    counts.clear()
    batch = make_batch(MODEL, num_blocks=12, chunk_tokens=None)
    start = STARTS[2]
    rows = [batch.submit(GenerationRequest((*start, *(n,) * 40), 4)) for n in (5, 6, 9)]
    finish(batch)
    assert counts == [[len(start) + 40], [40, 40]], "a part of a block is copied"
    assert [row.cached_tokens for row in rows] == [0, len(start), len(start)]
    for row in rows:
        assert (tuple(row.tokens), row.text, row.finish_reason) == answer_alone(row.request)


def test_a_long_prompt_is_computed_between_tokens_of_others() -> None:
    batch = make_batch(MODEL, num_blocks=20)
    batch.chunk_tokens = 30
    first = batch.submit(GenerationRequest((5, 6, 9), 40))
    batch.step()
    second = batch.submit(make_request(2, 90, 3, seed=0))
    progress: list[int] = []
    while not second.tokens:
        batch.step()
        progress.append(len(first.tokens))
    assert progress == [2, 3, 4, 5, 6, 7, 8], (
        "183 tokens in chunks of 30, a token of the other each"
    )
    finish(batch)
    for row in (first, second):
        assert (tuple(row.tokens), row.text, row.finish_reason) == answer_alone(row.request)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_the_same_beside_fifteen_others(temperature: float) -> None:
    requests: list[GenerationRequest] = []
    for n in range(16):
        prompt = make_request(n % 3, 5 + 3 * n, 1, 0).tokens
        requests.append(GenerationRequest(prompt, 20, temperature=temperature, seed=n))
    batch = make_batch(MODEL, num_blocks=64, slots=16)
    rows = [batch.submit(request) for request in requests]
    finish(batch)
    assert len({row.text for row in rows}) > 8, "the answers are all alike"
    for row in rows:
        assert (tuple(row.tokens), row.text, row.finish_reason) == answer_alone(row.request)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "falcon_h1", "gpt_oss", "deepseek_v3"])
def test_chunks_and_slots_change_no_answer_of_other_families(family: str) -> None:
    """Rows with states, which share no blocks, windows with sinks, and latent attention."""
    model = make_tiny_model(family, method=None)
    requests = [make_request(n % 3, 5 + 7 * n, 6, seed=n % 2) for n in range(6)]
    answers: list[tuple[int, ...]] = []
    for request in requests:
        batch = make_batch(model)
        batch.chunk_tokens = 10**6
        row = batch.submit(request)
        finish(batch)
        answers.append(tuple(row.tokens))
    batch = make_batch(model, num_blocks=6)
    batch.chunk_tokens = 17
    rows = [batch.submit(request) for request in requests]
    finish(batch)
    assert [tuple(row.tokens) for row in rows] == answers
    has_state = model.state_bytes_per_row > 0
    assert any(row.cached_tokens for row in rows) != has_state
