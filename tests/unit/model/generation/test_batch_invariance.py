"""In bf16 on a CPU with matmul.c, an answer of a server has the same bits alone and among others:
its tokens and their log-probabilities, whatever adapters, chunks of prompts and beginnings the
others have."""

import random

import pytest
import torch

from tiny_models import LORA, make_tiny_model, make_tiny_network
from tunesmith.core.types import GenerationRequest
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import DecodeBatch
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.kernels import matmul
from tunesmith.model.save import save_adapter

pytestmark = pytest.mark.skipif(
    not matmul.is_available(), reason="needs AVX512-BF16, no AMX and a C compiler"
)
NEW_TOKENS = 8


Served = tuple[PackedCausalLM, AdapterBank]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("adapters")
    make_tiny_network("llama-64").save_pretrained(folder / "base")
    model = make_tiny_model("llama-64", torch.bfloat16, method=None)
    model.network.eval()
    bank = AdapterBank(model)
    for key, settings in {"first": {}, "dora": {"use_dora": True, "seed": 4}}.items():
        adapted = make_tiny_model("llama-64", **settings)
        save_adapter(adapted.network, folder / key, LORA | settings, folder / "base")
        bank.load(key, read_adapter(folder / key, folder / "base"))
    return model, bank


def answer(served: Served, requests: list[GenerationRequest], chunk_tokens: int):
    model, bank = served
    batch = DecodeBatch(
        model,
        slots=5,
        decode=str,
        end_ids=(),
        cache_bytes=60 * 64 * model.cache_bytes_per_token,
        bank=bank,
        chunk_tokens=chunk_tokens,
    )
    rows = [batch.submit(request) for request in requests]
    while batch.has_work:
        batch.step()
    return [(row.tokens, row.logprobs) for row in rows]


def make_requests(seed: int) -> list[GenerationRequest]:
    """Return requests of prompts of 1 to 150 tokens, of which some begin alike."""
    rng = random.Random(seed)
    beginning = tuple(rng.randrange(3, 97) for _ in range(90))
    requests: list[GenerationRequest] = []
    for index in range(9):
        prompt = tuple(rng.randrange(3, 97) for _ in range(rng.choice((1, 2, 7, 30, 60))))
        if index % 3 == 0:
            prompt = beginning + prompt
        adapter = ("", "first", "dora")[index % 4 % 3]
        requests.append(
            GenerationRequest(prompt, NEW_TOKENS, adapter=adapter, num_logprobs=0, seed=index)
        )
    return requests


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("chunk_tokens", [1, 16, 128])
def test_an_answer_does_not_depend_on_the_others(served, chunk_tokens, seed):
    requests = make_requests(seed)
    alone = [answer(served, [request], 128)[0] for request in requests]
    assert answer(served, requests, chunk_tokens) == alone
    shuffled = random.Random(seed).sample(range(len(requests)), len(requests))
    together = answer(served, [requests[i] for i in shuffled], chunk_tokens)
    assert [together[shuffled.index(i)] for i in range(len(requests))] == alone


@pytest.mark.parametrize("num_tokens", [64, 65, 66, 100, 128, 129, 150])
def test_an_answer_does_not_depend_on_stored_blocks(served, num_tokens):
    rng = random.Random(num_tokens)
    prompt = tuple(rng.randrange(3, 97) for _ in range(num_tokens))
    request = GenerationRequest(prompt, NEW_TOKENS, adapter="first", num_logprobs=0)
    first, second = answer(served, [request, request], 128)
    assert second == first


def test_the_comparison_notices_another_rounding(served, monkeypatch):
    model, _ = served
    request = make_requests(0)[0]
    (alone,) = answer(served, [request], 128)
    weight = model.network.get_input_embeddings().weight
    changed = weight.detach().clone()
    changed[request.tokens[-1], 0] *= 1 + 2**-6  # two units in the last place
    monkeypatch.setattr(weight, "data", changed)
    (other,) = answer(served, [request], 128)
    assert other[1] != alone[1]
