"""Rows of different adapters in one batch: each answers as alone, and none reads the keys and
values of another."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tiny_models import LORA, make_tiny_model, make_tiny_network
from tunesmith.core.errors import InputError
from tunesmith.core.types import GenerationRequest
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import DecodeBatch, generate
from tunesmith.model.generation.running_request import RunningRequest
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.paged_cache import BLOCK_TOKENS
from tunesmith.model.save import save_adapter

Spell = Callable[[Sequence[int]], str]
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {},
    "second": {"lora_r": 8, "lora_alpha": 20, "seed": 4},
}
VARIANTS = [("", 1.0), ("first", 1.0), ("second", 1.0), ("first", 0.5)]


@pytest.fixture(scope="module")
def bank_and_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[AdapterBank, PackedCausalLM]:
    folder = tmp_path_factory.mktemp("adapters")
    make_tiny_network("llama").save_pretrained(folder / "base")
    model = make_tiny_model("llama", method=None)
    model.network.eval()
    bank = AdapterBank(model)
    for key, settings in ADAPTERS.items():
        adapted = make_tiny_model("llama", **settings)
        save_adapter(adapted.network, folder / key, LORA | settings, folder / "base")
        bank.load(key, read_adapter(folder / key, folder / "base"))
    return bank, model


def make_batch(bank: AdapterBank, model: PackedCausalLM, spell: Spell) -> DecodeBatch:
    cache_bytes = 40 * BLOCK_TOKENS * model.cache_bytes_per_token
    return DecodeBatch(model, slots=5, decode=spell, end_ids=(), cache_bytes=cache_bytes, bank=bank)


def make_requests(prompts: Sequence[tuple[int, ...]]) -> list[GenerationRequest]:
    requests: list[GenerationRequest] = []
    for key, scale in VARIANTS:
        for prompt in prompts:
            requests.append(GenerationRequest(prompt, 5, adapter=key, adapter_scale=scale))
    return requests


def answer(batch: DecodeBatch, requests: Sequence[GenerationRequest]) -> list[RunningRequest]:
    rows = [batch.submit(request) for request in requests]
    while batch.has_work:
        batch.step()
    return rows


def test_one_prompt_has_the_answers_of_its_adapters_in_a_warm_cache(
    bank_and_model: tuple[AdapterBank, PackedCausalLM], spell: Spell
) -> None:
    bank, model = bank_and_model
    prompt = tuple(2 + i % 40 for i in range(2 * BLOCK_TOKENS + 3))
    requests = make_requests([prompt])
    fresh = [answer(make_batch(bank, model, spell), [request])[0].tokens for request in requests]
    assert len({tuple(tokens) for tokens in fresh}) == len(VARIANTS), "the adapters do nothing"
    batch = make_batch(bank, model, spell)
    for _ in range(2):
        for request, expected in zip(requests, fresh, strict=True):
            (row,) = answer(batch, [request])
            assert row.tokens == expected
    assert row.cached_tokens == 2 * BLOCK_TOKENS
    assert [row.tokens for row in answer(batch, requests)] == fresh


def test_rows_of_all_adapters_at_once_answer_as_alone(
    bank_and_model: tuple[AdapterBank, PackedCausalLM],
    spell: Spell,
    prompts: list[tuple[int, ...]],
) -> None:
    bank, model = bank_and_model
    requests = make_requests(prompts)
    alone = [answer(make_batch(bank, model, spell), [request])[0].tokens for request in requests]
    mixed = requests[::2] + requests[1::2]
    expected = alone[::2] + alone[1::2]
    assert [row.tokens for row in answer(make_batch(bank, model, spell), mixed)] == expected
    outputs = dict(generate(model, mixed, decode=spell, end_ids=(), bank=bank))
    assert [list(outputs[index].tokens) for index in range(len(mixed))] == expected


def test_rows_of_an_adapter_that_leaves_end_alone(
    tmp_path: Path, spell: Spell, prompts: list[tuple[int, ...]]
) -> None:
    make_tiny_network("llama").save_pretrained(tmp_path / "base")
    save_adapter(make_tiny_model().network, tmp_path / "gone", LORA, tmp_path / "base")
    model = make_tiny_model("llama", method=None)
    bank = AdapterBank(model)
    bank.load("gone", read_adapter(tmp_path / "gone", tmp_path / "base"))
    batch = make_batch(bank, model, spell)
    rows = [
        batch.submit(GenerationRequest(prompts[n], 6, adapter="gone" if n % 2 else ""))
        for n in range(7)
    ]
    batch.step()
    bank.remove("gone")
    while batch.has_work:
        batch.step()
    reasons = ["error" if n % 2 else "length" for n in range(7)]
    assert [row.finish_reason for row in rows] == reasons
    assert isinstance(rows[1].error, InputError)
    with pytest.raises(InputError, match="no adapter 'gone'"):
        batch.submit(GenerationRequest(prompts[0], adapter="gone"))
