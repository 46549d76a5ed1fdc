"""A batch that requests join and leave: each row is answered, fails and ends on its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import GenerationRequest
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import DecodeBatch, generate
from tunesmith.model.generation.running_request import RunningRequest
from tunesmith.model.paged_cache import CacheRow, PagedKVCache

Spell = Callable[[Sequence[int]], str]
Prompts = list[tuple[int, ...]]


def make_batch(model: PackedCausalLM, spell: Spell, **settings: Any) -> DecodeBatch:
    settings = {"slots": 4, "end_ids": (), "cache_bytes": 2**24} | settings
    return DecodeBatch(model, decode=spell, **settings)


def finish(batch: DecodeBatch) -> None:
    while batch.has_work:
        batch.step()


def answer(model: PackedCausalLM, spell: Spell, request: GenerationRequest) -> RunningRequest:
    batch = make_batch(model, spell)
    row = batch.submit(request)
    finish(batch)
    return row


def test_requests_join_at_any_time(model: PackedCausalLM, prompts: Prompts, spell: Spell) -> None:
    requests = [GenerationRequest(prompt, 9, temperature=0.7, seed=3) for prompt in prompts]
    alone = [answer(model, spell, request).tokens for request in requests]
    batch = make_batch(model, spell)
    rows: list[RunningRequest] = []
    for request in requests:
        rows.append(batch.submit(request))
        batch.step()
    finish(batch)
    assert [row.tokens for row in rows] == alone


def test_a_step_tells_which_rows_advanced(
    model: PackedCausalLM, prompts: Prompts, spell: Spell
) -> None:
    batch = make_batch(model, spell)
    rows = [batch.submit(GenerationRequest(prompt, 3)) for prompt in prompts]
    text = dict.fromkeys(rows, "")
    tokens = dict.fromkeys(rows, 0)
    while batch.has_work:
        for row in batch.step():
            text[row] += row.new_text
            tokens[row] += 1
            assert len(row.tokens) == tokens[row]
    assert [text[row] for row in rows] == [row.text for row in rows]
    assert {row.finish_reason for row in rows} == {"length"}
    assert batch.step() == []


def test_a_cancelled_row_leaves_and_the_others_stay(
    model: PackedCausalLM, prompts: Prompts, spell: Spell
) -> None:
    batch = make_batch(model, spell, slots=3)
    rows = [batch.submit(GenerationRequest(prompt, 9)) for prompt in prompts[:6]]
    for _ in range(3):
        batch.step()
    for row in (rows[0], rows[5], rows[5]):
        batch.cancel(row)
    finish(batch)
    batch.cancel(rows[1])
    assert [row.finish_reason for row in rows] == [
        "cancelled",
        *["length"] * 4,
        "cancelled",
    ]
    for row in rows[1:5]:
        assert row.tokens == answer(model, spell, row.request).tokens


class PoisonedRow:
    """A head whose logits are NaN for the row that starts with one token."""

    def __init__(self, model: PackedCausalLM, token: int) -> None:
        self.prefill, self.token = model.prefill, token
        model.prefill = self.poisoned_prefill  # type: ignore[method-assign]

    def poisoned_prefill(
        self, rows: Sequence[CacheRow], prompts: Sequence[Sequence[int]], *args: Any
    ) -> torch.Tensor:
        hidden_BH = self.prefill(rows, prompts, *args)
        for row, prompt in enumerate(prompts):
            if prompt[0] == self.token:
                hidden_BH[row] = torch.nan
        return hidden_BH


def test_a_row_without_finite_logits_ends_alone(
    model: PackedCausalLM, prompts: Prompts, spell: Spell
) -> None:
    requests = [GenerationRequest(prompt, 6) for prompt in prompts[:4]]
    requests[2] = replace(requests[2], tokens=(1, *requests[2].tokens))
    alone = [answer(model, spell, request).tokens for request in requests]
    batch = make_batch(model, spell)
    PoisonedRow(model, token=1)
    rows = [batch.submit(request) for request in requests]
    finish(batch)
    assert isinstance(rows[2].error, GateError)
    assert (rows[2].finish_reason, rows[2].tokens) == ("error", [])
    for index in (0, 1, 3):
        assert (rows[index].error, rows[index].tokens) == (None, alone[index])
    with pytest.raises(GateError, match="NaN or infinite"):
        list(generate(model, requests, decode=spell, end_ids=()))


def test_a_request_has_its_own_end_tokens(
    model: PackedCausalLM, prompts: Prompts, spell: Spell
) -> None:
    free = answer(model, spell, GenerationRequest(prompts[1], 12))
    end = free.tokens[4]
    batch = make_batch(model, spell, end_ids=(free.tokens[7],))
    first = batch.submit(GenerationRequest(prompts[1], 12, end_ids=(end,)))
    second = batch.submit(GenerationRequest(prompts[1], 12))
    finish(batch)
    assert first.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert second.tokens == free.tokens[: free.tokens.index(free.tokens[7]) + 1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest((5,) * 256), "fills the context of 256"),
        (GenerationRequest((5,) * 100, 40), "140 tokens, more than the cache has room for"),
        (GenerationRequest((5,), logit_bias=((10**6, 1.0),)), "logit_bias: token 1000000"),
        (GenerationRequest((5,), adapter="missing"), "no adapter 'missing'"),
    ],
)
def test_what_cannot_be_answered_is_refused_when_it_is_submitted(
    model: PackedCausalLM, spell: Spell, request_: GenerationRequest, message: str
) -> None:
    batch = make_batch(model, spell, cache_bytes=128 * model.cache_bytes_per_token)
    with pytest.raises(InputError, match=message):
        batch.submit(request_)
    assert not batch.has_work


# ---------------------------------------------------------------- logits


def compute_logits(model: PackedCausalLM, tokens: Sequence[int]) -> torch.Tensor:
    """Return the logits [V] after `tokens`."""
    cache = PagedKVCache(slots=1, num_blocks=4)
    hidden = model.prefill([cache.add_row()], [tokens], cache)
    return model.head.compute_logits(hidden)[0].double()


def test_log_probabilities_are_those_of_the_model(
    model: PackedCausalLM, prompts: Prompts, spell: Spell
) -> None:
    """Before temperature, penalties and biases."""
    plain = GenerationRequest(prompts[1], 5, logit_bias=((7, 3.0),), frequency_penalty=1.0)
    batch = make_batch(model, spell)
    rows = [
        batch.submit(replace(plain, num_logprobs=count, temperature=1.5 * (count == 3)))
        for count in (-1, 0, 3)
    ]
    finish(batch)
    assert rows[0].logprobs == []
    assert rows[0].tokens == rows[1].tokens != rows[2].tokens
    for row in rows[1:]:
        for index, entry in enumerate(row.logprobs):
            logits = compute_logits(model, row.context[: len(prompts[1]) + index])
            expected = logits.log_softmax(-1)
            assert entry.token == row.tokens[index]
            assert entry.logprob == pytest.approx(float(expected[entry.token]), abs=1e-5)
            top = expected.topk(row.request.num_logprobs)
            assert [token for token, _ in entry.top] == top.indices.tolist()
            assert [p for _, p in entry.top] == pytest.approx(top.values.tolist(), abs=1e-5)
        assert len(row.logprobs) == 5
    assert rows[2].finish_reason == "length"
    assert len(dict(generate(model, [rows[2].request], decode=spell, end_ids=()))[0].logprobs) == 5


def test_biases_and_penalties_change_the_logits_as_defined(
    model: PackedCausalLM, prompts: Prompts, spell: Spell
) -> None:
    request = GenerationRequest(
        prompts[1],
        8,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((9, 0.5), (3, -100.0)),
        repetition_penalty=1.1,
    )
    row = answer(model, spell, request)
    assert row.tokens != answer(model, spell, GenerationRequest(prompts[1], 8)).tokens
    for index, token in enumerate(row.tokens):
        before = row.tokens[:index]
        logits = compute_logits(model, row.context[: len(prompts[1]) + index])
        for seen in {*prompts[1], *before}:
            logits[seen] *= 1.1 if logits[seen] < 0 else 1 / 1.1
        for seen in set(before):
            logits[seen] -= 0.3 + 0.2 * before.count(seen)
        logits[9] += 0.5
        logits[3] -= 100
        assert token == int(logits.argmax())
