"""The reference of preflight is checked too, and what FP8 weights lose is said."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_kernel_packages
import preflight_models
import rotary_configs
import tiny_models
from preflight_models import get_refusal, prepare_model
from tiny_models import make_tiny_document, make_tiny_network
from tunesmith.core.errors import GateError
from tunesmith.model.causal_lm import compute_stock_logits
from tunesmith.session.preflight_probe import (
    NO_ORACLE,
    ORACLE_TOKENS,
    Subject,
    compute_oracle_logits,
)
from tunesmith.train.preflight import run_preflight
from tunesmith.train.preflight_forward import (
    ORACLE_KIND,
    ORACLE_TOLERANCE,
    break_oracle,
    check_oracle,
    compare_logits,
    explain_unbreakable,
)


def forget_a_layer_without_cache(family: str, dtype: torch.dtype) -> Any:
    """Return a network whose last layer does nothing unless there is a cache."""
    network: Any = make_tiny_network(family, dtype)
    layer = network.model.layers[-1]
    compute = layer.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        return hidden_states if cache is None else compute(hidden_states, *args, **kwargs)

    layer.forward = forward
    return network


def test_a_reference_that_is_wrong_without_a_cache_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our forward uses the same modules without a cache, so it agrees: nothing else notices."""
    monkeypatch.setattr(preflight_models, "make_tiny_network", forget_a_layer_without_cache)
    model, samples = prepare_model("olmo2")
    assert "with and without its KV cache differ by" in get_refusal(model, samples)
    unchecked = run_preflight(model, dataclasses.replace(samples, oracle="left out"))
    assert not [result for result in unchecked if result.level == "error"]
    monkeypatch.undo()
    assert run_preflight(*prepare_model("olmo2"))


@pytest.mark.parametrize("dtype", ORACLE_TOLERANCE, ids=str)
def test_a_lost_token_is_noticed(dtype: torch.dtype) -> None:
    subject = Subject(*prepare_model("llama-64", dtype))
    assert check_oracle(subject).level == "ok"
    assert explain_unbreakable(subject) == ""
    with pytest.raises(GateError, match="with and without its KV cache differ by"):
        check_oracle(break_oracle(subject))
    oracle = subject.samples.oracle
    assert not isinstance(oracle, str)
    broken = dataclasses.replace(oracle, cached_PV=oracle.cached_PV * float("nan"))
    with pytest.raises(GateError, match="nan"):
        check_oracle(subject.with_samples(oracle=broken))


def test_a_base_that_computes_nan_is_no_fault_of_transformers() -> None:
    """As with a rope_theta of NaN in config.json, which transformers loads."""
    subject = Subject(*prepare_model("llama-64"))
    oracle = subject.samples.oracle
    assert not isinstance(oracle, str)
    not_a_number = oracle.plain_PV * float("nan")
    broken = dataclasses.replace(oracle, plain_PV=not_a_number, cached_PV=not_a_number)
    with pytest.raises(GateError, match="base model computes NaN") as caught:
        check_oracle(subject.with_samples(oracle=broken))
    assert "config.json" in caught.value.fix


def test_equal_logits_cannot_be_told_apart() -> None:
    subject = Subject(*prepare_model())
    oracle = subject.samples.oracle
    assert not isinstance(oracle, str)
    first = oracle.plain_PV[:1].expand(2, -1)
    alike = dataclasses.replace(oracle, plain_PV=first, cached_PV=first)
    assert "similar logits" in explain_unbreakable(subject.with_samples(oracle=alike))


def test_the_shortest_document_of_two_tokens_is_compared_up_to_a_limit() -> None:
    network = make_tiny_network("llama")
    documents = [make_tiny_document(1), make_tiny_document(1, 1), make_tiny_document(90)]
    oracle = compute_oracle_logits(network, documents)
    assert not isinstance(oracle, str)
    assert (oracle.document_id, oracle.num_tokens) == (documents[2].id, ORACLE_TOKENS)
    assert compare_logits(oracle.cached_PV, oracle.plain_PV) < 1e-5
    assert oracle.plain_PV.shape == oracle.cached_PV.shape == (2, 97)
    assert compute_oracle_logits(network, documents[:2]) == NO_ORACLE


def test_keys_in_the_cache_have_the_rotation_of_the_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From 32 tokens on, dynamic scaling rotates each length otherwise, so a cache has other keys
    by design; a longer document before leaves its frequencies behind."""
    config = rotary_configs.CONFIGS["llama-dynamic"]
    monkeypatch.setitem(tiny_models.CONFIGS, "llama-dynamic", config)
    network = make_tiny_network("llama-dynamic")
    compute_stock_logits(network, make_tiny_document(90).tokens_L.tolist(), [0])
    oracle = compute_oracle_logits(network, [make_tiny_document(90)])
    assert not isinstance(oracle, str)
    assert oracle.num_tokens == rotary_configs.LIMIT - 1
    assert compare_logits(oracle.cached_PV, oracle.plain_PV) < 1e-5


WITHOUT_ATTENTION = {
    "lfm2": "conv",
    "nemotron_h": "linear_attention",
    "granitemoehybrid": "linear_attention",
    "qwen3_5": "linear_attention",
    "qwen3_next": "linear_attention",
}


@pytest.mark.parametrize("family", WITHOUT_ATTENTION)
def test_a_model_without_attention_is_not_compared(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' cache cannot count its tokens without an attention layer."""
    config = copy.deepcopy(tiny_models.CONFIGS[family])
    config.layer_types = [WITHOUT_ATTENTION[family]] * config.num_hidden_layers
    monkeypatch.setitem(tiny_models.CONFIGS, family, config)
    model, samples = prepare_model(family)
    results = run_preflight(model, samples)
    (oracle,) = [result for result in results if result.kind == ORACLE_KIND]
    assert (oracle.level, oracle.num_checked) == ("warn", 0)
    assert "needs an attention layer" in oracle.evidence
    assert "not injected: cache that loses a token" in results[-1].evidence


@pytest.mark.slow
def test_the_reference_calls_no_kernels_of_other_packages() -> None:
    """transformers calls those of flash-linear-attention and others wherever they are installed, on
    a CPU too."""
    families = ("qwen3_5", "falcon_h1", "lfm2")
    command = [sys.executable, str(Path(fake_kernel_packages.__file__)), *families]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(families)
