"""The memory of a GPU: published peaks of other trainers, each counted with what that trainer
keeps; our own parts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from layer_shapes import describe_layers
from llama_sizes import LLAMA_8B, LLAMA_70B, LLAMA_405B
from tunesmith.core.mesh import Mesh
from tunesmith.core.types import ModelSpec
from tunesmith.plan.memory import CacheSize, compute_cache_bytes, estimate_peak_memory
from tunesmith.plan.memory_gpu import (
    GpuSoftware,
    count_saved_elements,
    estimate_gpu_memory,
)
from tunesmith.plan.rules import RuleContext

GIB = 2**30
LLAMA_3B = LLAMA_8B | {
    "num_layers": 28,
    "hidden_size": 3072,
    "num_heads": 24,
    "intermediate_size": 8192,
    "tie_word_embeddings": True,
    "parameters": 3_212_749_824,
}
LLAMA2_7B = LLAMA_8B | {
    "num_kv_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "parameters": 6_738_415_616,
}

# All in bf16, adapters too. The published rows do not say how activations are kept: what is assumed
# stands here.
TORCHTUNE = GpuSoftware(
    adapter_bytes=8,
    trained_bytes=8,
    saved_share=0.58,
    logit_tokens=512,
    context_bytes=0,
    fragmentation_share=0,
)
PAGED = dataclasses.replace(
    TORCHTUNE, trained_bytes=2 + 2 * 128256 * 4096 / 8.03e9
)  # a gradient at a time
RESIDENT = dataclasses.replace(TORCHTUNE, trained_bytes=4 + 2 * 128256 * 4096 / 8.03e9)
EAGER = dataclasses.replace(TORCHTUNE, saved_share=1, logit_tokens=8192)
COMPILED = dataclasses.replace(TORCHTUNE, logit_tokens=8192)
CHUNKED = dataclasses.replace(TORCHTUNE, logit_tokens=1024)
NOTHING_ELSE = dataclasses.replace(TORCHTUNE, logit_tokens=0)
QLORA_PAPER = dataclasses.replace(NOTHING_ELSE, quantized_bytes=0.5 + 4 / 64, rest_bytes=4)
README, TUTORIAL = "torchtune README", "torchtune LoRA tutorial"
PUBLISHED: dict[str, tuple[str, dict[str, Any], GpuSoftware, str, int, str, float]] = {
    # what: (where, model, stack, method, tokens, activations, GiB)
    "8B LoRA r8, 2x2048, 4090": (README, LLAMA_8B, TORCHTUNE, "lora", 4096, "full", 16.2),
    "8B QLoRA r8, 2x2048, 4090": (README, LLAMA_8B, TORCHTUNE, "qlora", 4096, "full", 7.4),
    "8B full, paged 8-bit, 4090": (README, LLAMA_8B, PAGED, "full", 4096, "full", 18.9),
    "8B full, 8-bit, A6000": (README, LLAMA_8B, RESIDENT, "full", 4096, "full", 37.4),
    "8B LoRA r8, A6000": (README, LLAMA_8B, TORCHTUNE, "lora", 4096, "none", 30.3),
    "3B full, packed 2x4096": (README, LLAMA_3B, EAGER, "full", 8192, "none", 60.0),
    "and compiled": (README, LLAMA_3B, COMPILED, "full", 8192, "none", 51.0),
    "and chunked loss": (README, LLAMA_3B, CHUNKED, "full", 8192, "none", 42.9),
    "and checkpoints": (README, LLAMA_3B, CHUNKED, "full", 8192, "full", 24.9),
    "3B LoRA": (README, LLAMA_3B, CHUNKED, "lora", 8192, "full", 8.5),
    "3B QLoRA": (README, LLAMA_3B, CHUNKED, "qlora", 8192, "full", 4.6),
    "7B LoRA loaded": (TUTORIAL, LLAMA2_7B, NOTHING_ELSE, "lora", 0, "none", 13.98e9 / GIB),
    "7B in 4 bits": (
        "Dettmers 2023, figure 6",
        LLAMA2_7B,
        QLORA_PAPER,
        "qlora",
        0,
        "none",
        5048e6 / GIB,
    ),
}

# Peaks of one of several GPUs, on which other trainers shard all they have (FSDP2). NCCL's memory
# is not in what torch reports. torchtitan and torchao save every second product of a layer: the
# share of .45 is read off their two sizes of a batch, the peaks are not. Compiled, a tenth less.
SHARDED_TUNE = dataclasses.replace(TORCHTUNE, nccl_bytes=0)
SHARDED_FULL = GpuSoftware(
    saved_share=0.45,
    logit_tokens=10**9,
    context_bytes=0,
    fragmentation_share=0,
    nccl_bytes=0,
)
SHARDED_COMPILED = dataclasses.replace(SHARDED_FULL, saved_share=0.405)
TITAN = "torchtitan, Llama 3.1 on H100, December 2024"
# Memory that torch has reserved, with fragments. Adapters of rank 64 in bf16; the loss of that time
# holds all logits in bf16, in fp32, shifted, as probabilities and as gradients: 18 bytes each.
FSDP_QLORA = GpuSoftware(
    adapter_bytes=8, logit_tokens=10**9, logit_bytes=18, context_bytes=0, nccl_bytes=0
)
ANSWER = "Answer.AI, fsdp_qlora, two RTX 3090, March 2024"
YI_34B = {
    "num_layers": 60,
    "hidden_size": 7168,
    "num_heads": 56,
    "num_kv_heads": 8,
    "head_dim": 128,
    "intermediate_size": 20480,
    "vocab_size": 64000,
    "tie_word_embeddings": False,
    "parameters": 34_388_917_248,
}
PUBLISHED_SHARDED: dict[str, tuple[str, dict[str, Any], GpuSoftware, str, int, str, int, float]] = {
    # what: (where, model, stack, method, tokens of a GPU, activations, shard, GiB)
    "70B LoRA, 8xA100": (README, LLAMA_70B, SHARDED_TUNE, "lora", 4096, "full", 8, 27.6),
    "405B QLoRA, 8xA100": (README, LLAMA_405B, SHARDED_TUNE, "qlora", 4096, "full", 8, 44.8),
    "8B full, 8xH100, 8k": ("torchao", LLAMA_8B, SHARDED_FULL, "full", 8192, "none", 8, 47.65),
    "8B full, 8xH100": (TITAN, LLAMA_8B, SHARDED_FULL, "full", 16384, "none", 8, 82.4),
    "8B full, 128xH100": (TITAN, LLAMA_8B, SHARDED_FULL, "full", 16384, "none", 128, 67.0),
    "8B, 8 compiled": (TITAN, LLAMA_8B, SHARDED_COMPILED, "full", 16384, "none", 8, 77.0),
    "8B, 128 compiled": (TITAN, LLAMA_8B, SHARDED_COMPILED, "full", 16384, "none", 128, 62.0),
    "7B LoRA, 4 rows": (ANSWER, LLAMA2_7B, FSDP_QLORA, "lora", 8192, "full", 2, 16.14),
    "7B LoRA, 6 rows": (ANSWER, LLAMA2_7B, FSDP_QLORA, "lora", 12288, "full", 2, 21.35),
    "7B QLoRA, 4 rows": (ANSWER, LLAMA2_7B, FSDP_QLORA, "qlora", 8192, "full", 2, 11.22),
    "7B QLoRA, 10 rows": (ANSWER, LLAMA2_7B, FSDP_QLORA, "qlora", 20480, "full", 2, 20.97),
    "34B QLoRA, 2 rows": (ANSWER, YI_34B, FSDP_QLORA, "qlora", 4096, "full", 2, 23.05),
    "7B LoRA copies, 4 rows": (ANSWER, LLAMA2_7B, FSDP_QLORA, "lora", 8192, "full", 1, 22.04),
    "7B QLoRA copies, 8 rows": (ANSWER, LLAMA2_7B, FSDP_QLORA, "qlora", 16384, "full", 1, 20.94),
}


@pytest.fixture
def spec_of(make_context: Callable[..., RuleContext]) -> Callable[[dict[str, Any]], ModelSpec]:
    return lambda sizes: describe_layers(dataclasses.replace(make_context().model, **sizes))


@pytest.mark.parametrize("what", PUBLISHED)
def test_a_published_peak_is_met_within_15_percent(
    what: str, spec_of: Callable[..., ModelSpec]
) -> None:
    _, sizes, stack, method, tokens, activations, published = PUBLISHED[what]
    how: dict[str, Any] = {
        "method": method,
        "dtype": "bf16",
        "rank": 8,
        "gradient_checkpointing": activations,
    }
    peak = estimate_gpu_memory(spec_of(sizes), pack_tokens=tokens, software=stack, **how)["peak"]
    assert peak / GIB == pytest.approx(published, rel=0.15)


def estimate_sharded_peak(what: str, spec_of: Callable[..., ModelSpec]) -> float:
    _, sizes, stack, method, tokens, activations, shard, _ = PUBLISHED_SHARDED[what]
    rank = 64 if stack is FSDP_QLORA else 8
    how: dict[str, Any] = {"method": method, "dtype": "bf16", "rank": rank}
    num_gpus = max(shard, 2)
    mesh = Mesh(num_gpus, max(1, num_gpus // 8), shard)
    how |= {"gradient_checkpointing": activations, "mesh": mesh}
    return (
        estimate_gpu_memory(spec_of(sizes), pack_tokens=tokens, software=stack, **how)["peak"] / GIB
    )


@pytest.mark.parametrize("what", PUBLISHED_SHARDED)
def test_a_published_peak_of_one_of_several_gpus_is_met_within_15_percent(
    what: str, spec_of: Callable[..., ModelSpec]
) -> None:
    published = PUBLISHED_SHARDED[what][-1]
    assert estimate_sharded_peak(what, spec_of) == pytest.approx(published, rel=0.15)


def test_from_8_to_128_gpus_a_peak_falls_by_the_published_shard(
    spec_of: Callable[..., ModelSpec],
) -> None:
    """Whatever the activations are: 82.4 - 67.0 GiB."""
    few, many = (
        estimate_sharded_peak(what, spec_of) for what in ("8B full, 8xH100", "8B full, 128xH100")
    )
    assert few - many == pytest.approx(82.4 - 67.0, rel=0.15)


def test_rank_64_costs_what_is_published(spec_of: Callable[..., ModelSpec]) -> None:
    """torchtune's tutorial, Llama 2 7B, all layers: rank 8 to 64 takes 1.17 GB more."""
    how: dict[str, Any] = {
        "method": "lora",
        "dtype": "bf16",
        "pack_tokens": 0,
        "software": TORCHTUNE,
    }
    low, high = (
        estimate_gpu_memory(spec_of(LLAMA2_7B), rank=rank, **how)["peak"] for rank in (8, 64)
    )
    assert high - low == pytest.approx(1.17e9, rel=0.15)


def test_a_trainer_in_wide_numbers_keeps_more_than_its_stack_says(
    spec_of: Callable[..., ModelSpec],
) -> None:
    """LongLoRA 2023: 7B, 8k tokens, ZeRO-2: 25.7 GB. Its fp32 upcasts and buckets are no part of
    the model: the error is stated, not hidden."""
    how: dict[str, Any] = {
        "method": "lora",
        "dtype": "bf16",
        "rank": 8,
        "gradient_checkpointing": "full",
    }
    stack = dataclasses.replace(TORCHTUNE, logit_tokens=1024)
    assert (
        estimate_gpu_memory(spec_of(LLAMA2_7B), pack_tokens=8192, software=stack, **how)["peak"]
        < 0.75 * 25.7e9
    )


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
    assert count_saved_elements(spec) == 32 * 105_472, (
        "199 KB a token and layer in bf16 for a model of this width"
    )
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
