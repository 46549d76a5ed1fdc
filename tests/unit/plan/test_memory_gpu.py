"""The memory of a GPU by component; tests/fakecuda compares its peak with one that is counted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from llama_sizes import LLAMA_8B
from tunesmith.core.types import ModelSpec
from tunesmith.plan.memory import (
    CacheSize,
    Footprint,
    compute_cache_bytes,
    estimate_gpu_memory,
    estimate_peak_memory,
)

RUN = Footprint("lora", "bf16", rank=16)


@pytest.fixture
def spec(make_spec: Callable[[dict[str, Any]], ModelSpec]) -> ModelSpec:
    return make_spec(LLAMA_8B)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_weights_are_those_of_a_cpu_beside_the_context(method: Any, spec: ModelSpec) -> None:
    run = dataclasses.replace(RUN, method=method)
    parts = estimate_gpu_memory(spec, run, pack_tokens=8192)
    assert (parts.process, parts.evaluation, parts.context) == (0, 0, 2**29)
    on_cpu = estimate_peak_memory(spec, run, pack_tokens=8192)
    assert (parts.weights, parts.trained) == (on_cpu.weights, on_cpu.trained)


def test_answers_count_only_where_they_take_more_than_a_step(spec: ModelSpec) -> None:
    run = dataclasses.replace(RUN, gradient_checkpointing="full")
    few, many = (
        estimate_gpu_memory(spec, run, pack_tokens=8192, cache=CacheSize(1, tokens))
        for tokens in (1000, 200_000)
    )
    assert few.cache == 0
    cache_bytes = compute_cache_bytes(spec, CacheSize(1, 200_000), 2)
    assert cache_bytes == 200_000 * 2 * 32 * 1024 * 2
    assert many.peak - few.peak == many.cache == cache_bytes - few.step


def test_policies_keep_less_and_less(spec: ModelSpec) -> None:
    peaks: list[int] = []
    for policy in ("none", "selective", "full"):
        run = dataclasses.replace(RUN, gradient_checkpointing=policy)
        peaks.append(estimate_gpu_memory(spec, run, pack_tokens=8192).peak)
    assert peaks == sorted(set(peaks), reverse=True)
