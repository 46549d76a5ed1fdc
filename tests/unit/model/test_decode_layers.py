"""layers.c against the decoder's own forward: the same bits, token after token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import tiny_models
from tiny_models import LORA, MIXED, SIZES, WINDOW, make_tiny_model, make_tiny_network
from tunesmith.core.types import GenerationRequest
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.decode_layers import DecodeLayers, build_decode_layers
from tunesmith.model.generation.engine import DecodeBatch
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.kernels import matmul
from tunesmith.model.paged_cache import PagedKVCache
from tunesmith.model.save import save_adapter

needs_kernel = pytest.mark.skipif(
    not matmul.is_available(), reason="needs AVX512-BF16, no AMX and a C compiler"
)
HEADS: dict[str, Any] = SIZES | {"head_dim": 64}  # what decode.c takes
DECODERS = {
    "llama": LlamaConfig(**HEADS, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**HEADS, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**HEADS, **MIXED, use_sliding_window=True),
    "qwen3": Qwen3Config(**HEADS, tie_word_embeddings=True),
    "long": LlamaConfig(
        **HEADS, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
}
PROMPTS = [(5, 6, 7), (8, 9), tuple(range(20, 60)), (5, 6, 7, 8), *[(i, 3) for i in range(60, 65)]]


@pytest.fixture(autouse=True)
def decoders(monkeypatch):
    for name, config in DECODERS.items():
        monkeypatch.setitem(tiny_models.CONFIGS, name, config)


def make_model(family: str, **settings: Any) -> PackedCausalLM:
    model = make_tiny_model(family, torch.bfloat16, **settings)
    model.network.eval()
    return model


def compare_steps(model: PackedCausalLM, prompts=PROMPTS, steps: int = 12) -> None:
    """Assert that both ways give the same hidden states, each in a cache of its own."""
    caches = [PagedKVCache(len(prompts), 4 * len(prompts)) for _ in range(2)]
    rows = [[cache.add_row() for _ in prompts] for cache in caches]
    for cache, cache_rows in zip(caches, rows, strict=True):
        model.prefill(cache_rows, prompts, cache)
    layers = build_decode_layers(model, caches[1])
    assert layers is not None
    calls = count_calls(layers)
    for step in range(steps):
        tokens = [(7 * step + row) % 90 + 3 for row in range(len(prompts))]
        expected = model.decode_step(rows[0], tokens, caches[0])
        hidden = model.decode_step(rows[1], tokens, caches[1], layers.run)
        assert torch.equal(hidden, expected)
    assert calls == [True] * steps


def count_calls(layers: DecodeLayers) -> list[bool]:
    """Let a DecodeLayers note for each call whether it has computed the step."""
    calls: list[bool] = []
    run = layers.run

    def note(tokens_B: torch.Tensor) -> torch.Tensor | None:
        hidden_BH = run(tokens_B)
        calls.append(hidden_BH is not None)
        return hidden_BH

    layers.run = note
    return calls


@needs_kernel
@pytest.mark.parametrize("blocked", [False, True], ids=["plain", "blocked"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_step_has_the_bits_of_the_decoder(family, blocked):
    model = make_model(family, blocked=blocked)
    compare_steps(model)
    with scaled_adapter(model.network, 0.0):
        compare_steps(model, steps=2)
    with scaled_adapter(model.network, 0.5):
        compare_steps(model, steps=2)


@needs_kernel
@pytest.mark.parametrize(
    "settings", [{"lora_r": 40}, {"lora_target_modules": "attention"}], ids=str
)
def test_ranks_over_a_vector_and_layers_without_adapters(settings):
    compare_steps(make_model("llama", **settings))


@needs_kernel
def test_a_model_without_adapters_and_a_single_row():
    compare_steps(make_model("llama", method=None), [(5, 6, 7)])


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare_steps(make_model("qwen3"), steps=3)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_a_row_that_crosses_into_other_blocks():
    compare_steps(make_model("mistral"), [tuple(range(3, 63)), (4, 5)], steps=70)


@needs_kernel
def test_rows_of_a_bank_have_their_adapters(tmp_path: Path):
    make_tiny_network("llama").save_pretrained(tmp_path / "base")
    model = make_model("llama", method=None)
    bank = AdapterBank(model)
    for key, settings in {"first": {}, "dora": {"use_dora": True, "seed": 4}}.items():
        adapted = make_tiny_model("llama", **settings)
        save_adapter(adapted.network, tmp_path / key, LORA | settings, tmp_path / "base")
        bank.load(key, read_adapter(tmp_path / key, tmp_path / "base"))
    variants = [("first", 1.0, 1), ("", 1.0, 1), ("dora", 1.0, 1), ("first", 0.5, 1)]
    compare_steps(model, steps=2)
    caches = [PagedKVCache(4, 8) for _ in range(2)]
    rows = [[cache.add_row() for _ in range(4)] for cache in caches]
    layers = build_decode_layers(model, caches[1])
    assert layers is not None
    calls = count_calls(layers)
    with bank.use_rows([(key, scale, 2) for key, scale, _ in variants]):
        for cache, cache_rows in zip(caches, rows, strict=True):
            model.prefill(cache_rows, [(5, 6)] * 4, cache)
    with bank.use_rows(variants):
        expected = model.decode_step(rows[0], [7] * 4, caches[0])
        hidden = model.decode_step(rows[1], [7] * 4, caches[1], layers.run)
    assert torch.equal(hidden, expected)
    assert len({tuple(row.tolist()) for row in hidden}) == 4  # each has an effect
    assert calls == [True]


@needs_kernel
def test_generation_uses_them():
    model = make_model("llama")
    cache_bytes = 40 * 64 * model.cache_bytes_per_token
    batch = DecodeBatch(model, slots=4, decode=str, end_ids=(), cache_bytes=cache_bytes)
    assert batch.layers is not None
    calls = count_calls(batch.layers)
    rows = [batch.submit(GenerationRequest(prompt, 6)) for prompt in PROMPTS]
    while batch.has_work:
        batch.step()
    assert all(calls)
    assert len(calls) >= 5
    assert all(len(row.tokens) == 6 for row in rows)


@needs_kernel
@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("llama", torch.float32, {}),
        ("llama", torch.bfloat16, {"use_dora": True}),
        ("llama", torch.bfloat16, {"method": "full"}),
        ("llama", torch.bfloat16, {"backend": "sdpa"}),
        ("llama-tied", torch.bfloat16, {}),
        ("granite", torch.bfloat16, {}),
        ("gemma3", torch.bfloat16, {}),
        ("phi3", torch.bfloat16, {}),
    ],
    ids=["fp32", "DoRA", "full", "sdpa", "heads of 12", "multipliers", "offset norms", "stock"],
)
def test_other_models_run_as_before(family, dtype, settings):
    model = make_tiny_model(family, dtype, **settings)
    model.network.eval()
    assert build_decode_layers(model, PagedKVCache(1, 1)) is None


@needs_kernel
def test_a_model_in_training_runs_as_before():
    model = make_model("llama")
    model.network.train()
    assert build_decode_layers(model, PagedKVCache(1, 1)) is None
