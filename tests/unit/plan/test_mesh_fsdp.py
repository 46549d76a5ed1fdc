"""What the plan counts for one of eight GPUs is what torch's own tracker finds in FSDP2."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fsdp_memory
from layer_shapes import describe_layers
from tunesmith.core.mesh import Mesh
from tunesmith.plan.memory_gpu import estimate_gpu_memory
from tunesmith.plan.rules import RuleContext


@pytest.fixture(scope="module")
def tracked() -> dict[str, dict[str, int]]:
    """Run the steps in a process of their own, which has a fake process group."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(fsdp_memory.__file__))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    kinds_by_method: dict[str, dict[str, int]] = json.loads(done.stdout)
    return kinds_by_method


def estimate(context: RuleContext, method: str) -> dict[str, int]:
    """Return the plan's components for the same network, which has no embeddings and no head."""
    layer = 4 * fsdp_memory.HIDDEN_SIZE**2 + 3 * fsdp_memory.HIDDEN_SIZE * fsdp_memory.MLP_SIZE
    sizes: dict[str, Any] = {
        "num_layers": fsdp_memory.NUM_LAYERS,
        "hidden_size": fsdp_memory.HIDDEN_SIZE,
        "intermediate_size": fsdp_memory.MLP_SIZE,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 8,
        "parameters": layer * fsdp_memory.NUM_LAYERS,
    }
    spec = describe_layers(dataclasses.replace(context.model, **sizes))
    assert spec.block_parameters == spec.parameters
    return estimate_gpu_memory(
        spec,
        pack_tokens=fsdp_memory.NUM_TOKENS,
        mesh=Mesh(fsdp_memory.NUM_RANKS, 1, shard=fsdp_memory.NUM_RANKS),
        method=method,
        dtype="bf16",
        rank=fsdp_memory.RANK,
        gradient_checkpointing="full",
    )


def test_frozen_weights_take_a_shard_and_three_layers(
    tracked: dict[str, dict[str, int]], make_context: Callable[..., RuleContext]
) -> None:
    kinds = tracked["lora"]
    parts = estimate(make_context(), "lora")
    assert parts["weights"] == kinds["SHARDED_PARAM"]
    assert parts["gathered"] == kinds["UNSHARDED_PARAM"] + kinds["ALL_GATHER"]
    assert kinds["REDUCE_SCATTER"] == 0, "frozen weights have no gradients"


def test_full_fine_tuning_is_within_10_percent_of_the_tracked_peak(
    tracked: dict[str, dict[str, int]], make_context: Callable[..., RuleContext]
) -> None:
    """At the peak, the gradients of the first layers are still to come: the plan counts them."""
    kinds = tracked["full"]
    parts = estimate(make_context(), "full")
    activations = kinds["ACT"] + kinds["INP"]
    tracked_bytes = kinds["Total"] - activations
    assert 1 <= (parts["trained"] + parts["gathered"]) / tracked_bytes <= 1.1
    moving = sum(kinds[name] for name in ("UNSHARDED_PARAM", "ALL_GATHER", "REDUCE_SCATTER"))
    assert abs(parts["gathered"] / (moving + kinds["TEMP"]) - 1) < 0.02
