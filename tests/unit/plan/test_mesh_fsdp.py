"""What the plan counts for one of eight GPUs under FSDP2, as other trainers use it, is what torch's
own tracker finds. Our own shards are counted by dry runs (tests/unit/train/test_dry_run.py)."""

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
from tunesmith.plan.memory_gpu import GpuSoftware, estimate_gpu_memory
from tunesmith.plan.rules import RuleContext


@pytest.fixture(scope="module")
def tracked() -> dict[str, int]:
    """Run the step in a process of its own, which has a fake process group."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(fsdp_memory.__file__))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def estimate(context: RuleContext) -> dict[str, int]:
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
        software=GpuSoftware(),
        mesh=Mesh(fsdp_memory.NUM_RANKS, 1, shard=fsdp_memory.NUM_RANKS),
        method="lora",
        dtype="bf16",
        rank=fsdp_memory.RANK,
        gradient_checkpointing="full",
    )


def test_frozen_weights_take_a_shard_and_three_layers(
    tracked: dict[str, int], make_context: Callable[..., RuleContext]
) -> None:
    parts = estimate(make_context())
    assert parts["weights"] == tracked["SHARDED_PARAM"]
    assert parts["gathered"] == tracked["UNSHARDED_PARAM"] + tracked["ALL_GATHER"]
    assert tracked["REDUCE_SCATTER"] == 0, "frozen weights have no gradients"
