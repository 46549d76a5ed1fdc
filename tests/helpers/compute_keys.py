"""Cases of the keys that say how a run computes: changing one changes what a run does
(tests/unit/recipe/test_recipe_keys.py runs them)."""

import os

import pytest
import torch
from pydantic import ValidationError

from tiny_recipe_runs import Lab
from tiny_runs import make_tiny_recipe, plan_recipe, save_model_folder
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json
from tunesmith.session.reopen import load_trained_session


def dtype(lab: Lab) -> None:
    single, half = (lab.steps(dtype=name) for name in ("fp32", "bf16"))
    assert single[0].loss != half[0].loss
    assert single[0].loss == pytest.approx(half[0].loss, rel=0.02)


def attention(lab: Lab) -> None:
    expected = [step.loss for step in lab.steps(attention="reference")]
    losses = [step.loss for step in lab.steps(attention="dense_mask")]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert load_trained_session(lab.output).model.backend == "dense_mask"
    with pytest.raises(ValidationError, match="attention"):
        lab.events(attention="flash")


def gradient_checkpointing(lab: Lab) -> None:
    adapters: set[bytes] = set()
    planned: list[int] = []
    for policy in ("none", "selective", "full"):
        adapters.add(lab.adapter(gradient_checkpointing=policy, lora_dropout=0.5))
        planned.append(read_json(lab.output / "plan.json")["memory_bytes"]["activations"])
    assert len(adapters) == 1, "the same gradients, to the bit"
    assert planned == sorted(planned, reverse=True)
    assert len(set(planned)) == 3
    layers = load_trained_session(lab.output).model.decoder.layers
    assert [getattr(layer, "gradient_checkpointing", False) for layer in layers] == [True, False]
    assert lab.plan(gradient_checkpointing=True).config.gradient_checkpointing == "full"


def deterministic(lab: Lab) -> None:
    """On a CPU, where the bits are the same anyway, torch's mode is what changes."""
    expected = lab.baseline.adapter
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        assert lab.adapter(deterministic=True) == expected
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def dp_shard_size(lab: Lab) -> None:
    """What several processes do with it: tests/multi/test_rank_shards.py."""
    made = plan_recipe(
        make_tiny_recipe(lab.model, lab.folder / "sharded", dp_shard_size=2, dtype="bf16")
    )
    assert (made.config.dp_shard_size, made.config.weight_layout) == (2, "plain")
    with pytest.raises(InputError, match="dp_shard_size is 2, but the number of processes"):
        lab.events(dp_shard_size=2)


def context_parallel_size(lab: Lab) -> None:
    """What several processes do with it: tests/multi/test_rank_context.py."""
    lab.model = save_model_folder(lab.folder / "two-heads", num_kv_heads=2)
    alone, shared = (
        plan_recipe(make_tiny_recipe(lab.model, lab.folder / name, context_parallel_size=size))
        for name, size in (("alone", 1), ("shared", 2))
    )
    activations = [made.memory_bytes["activations"] for made in (alone, shared)]
    assert activations[1] == pytest.approx(activations[0] / 2, rel=0.1)
    with pytest.raises(InputError, match="context_parallel_size is 2, but the number of processes"):
        lab.events(context_parallel_size=2)
