"""The memory of a GPU by component; tests/fakecuda compares its peak with one that is counted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from layer_shapes import describe_layers
from llama_sizes import LLAMA_8B
from tunesmith.core.types import ModelSpec
from tunesmith.plan.memory import CacheSize, compute_cache_bytes, estimate_peak_memory
from tunesmith.plan.memory_gpu import estimate_gpu_memory
from tunesmith.plan.rules import RuleContext


@pytest.fixture
def spec_of(make_context: Callable[..., RuleContext]) -> Callable[[dict[str, Any]], ModelSpec]:
    return lambda sizes: describe_layers(dataclasses.replace(make_context().model, **sizes))


SETTINGS: dict[str, Any] = {"method": "lora", "dtype": "bf16", "rank": 16, "pack_tokens": 8192}


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_components_add_up_and_nothing_of_a_cpu_is_in_them(
    method: str, spec_of: Callable[..., ModelSpec]
) -> None:
    parts = estimate_gpu_memory(spec_of(LLAMA_8B), **(SETTINGS | {"method": method}))
    assert not {"process", "evaluation"} & parts.keys()
    assert parts["context"] == 2**29
    assert parts.pop("peak") == sum(parts.values())
    on_cpu = estimate_peak_memory(spec_of(LLAMA_8B), **(SETTINGS | {"method": method}))
    assert {name: on_cpu[name] for name in ("weights", "trained")} == {
        n: parts[n] for n in ("weights", "trained")
    }


def test_answers_count_only_where_they_take_more_than_a_step(
    spec_of: Callable[..., ModelSpec],
) -> None:
    spec = spec_of(LLAMA_8B)
    assert compute_cache_bytes(spec, CacheSize(1, 1), 2) == 2 * 32 * 1024 * 2
    few, many = (
        estimate_gpu_memory(
            spec, **(SETTINGS | {"gradient_checkpointing": "full"}), cache=CacheSize(1, n)
        )
        for n in (1000, 200_000)
    )
    assert few["KV cache"] == 0
    step = sum(few[name] for name in ("activations", "head", "fragments"))
    assert (
        many["peak"] - few["peak"]
        == many["KV cache"]
        == compute_cache_bytes(spec, CacheSize(1, 200_000), 2) - step
    )


def test_policies_keep_less_and_less(spec_of: Callable[..., ModelSpec]) -> None:
    peaks = [
        estimate_gpu_memory(spec_of(LLAMA_8B), **SETTINGS, gradient_checkpointing=policy)["peak"]
        for policy in ("none", "selective", "full")
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3
