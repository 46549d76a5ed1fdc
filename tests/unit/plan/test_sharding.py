"""Which plans may shard frozen weights, and what follows from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_sizes import LLAMA_8B, LLAMA_70B
from tiny_runs import build_sum_rows, make_tiny_recipe, plan_recipe, write_rows
from tunesmith import api
from tunesmith.core.errors import InputError
from tunesmith.core.mesh import Mesh
from tunesmith.core.types import Plan
from tunesmith.plan.rules import RuleContext
from tunesmith.plan.sharding import decide_shard
from tunesmith.train.stages import load_stage_inputs, make_staged_plan

Planner = Callable[..., Plan]


def test_a_target_is_sharded_where_nothing_else_fits_and_its_command_says_so(
    plan: Planner,
) -> None:
    made = plan(LLAMA_70B, "8xh100", method="lora")
    assert made.mesh is not None
    size = made.mesh.mesh.shard
    assert size > 1
    assert made.config.dp_shard_size == size
    assert made.mesh.missing == ""
    assert made.mesh.command.endswith(f"train recipe.yaml --dp-shard-size {size}")


def test_the_recipe_says_how_many_gpus_hold_the_weights(plan: Planner) -> None:
    made = plan(LLAMA_8B, "8xh100", dp_shard_size=4)
    assert made.mesh is not None
    assert made.mesh.mesh == Mesh(8, 1, shard=4)
    assert made.reasons["dp_shard_size"].decided_by == "user"
    complete = plan(LLAMA_8B, "8xh100")
    assert made.memory_bytes["weights"] < complete.memory_bytes["weights"] / 2
    assert complete.config.dp_shard_size == 1


@pytest.mark.parametrize(
    ("wishes", "problem"),
    [
        ({"method": "full", "optim": "adamw_8bit"}, "optim: adamw_8bit cannot be used with"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save cannot"),
        (
            {"modules_to_save": ["lm_head"], "rehearsal": {"data": "self-generated"}},
            "modules_to_save and rehearsal rows that the model generates cannot",
        ),
        ({"rehearsal": {"data": "self-generated"}}, "rows that the model generates cannot"),
        ({"dp_shard_size": 3}, "has 8 GPUs, which groups of 3 do not divide"),
        ({"target": "h100"}, "has 1 GPU, which groups of 2 do not divide"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(
    plan: Planner, wishes: dict[str, Any], problem: str
) -> None:
    wishes = {"target": "8xh100", "dp_shard_size": 2} | wishes
    with pytest.raises(InputError, match=problem) as refusal:
        plan(LLAMA_8B, wishes.pop("target"), **wishes)
    assert refusal.value.where == f"dp_shard_size: {wishes['dp_shard_size']}"


def test_adapters_with_magnitudes_and_shared_documents_are_sharded(plan: Planner) -> None:
    made = plan(LLAMA_8B, "8xh100", dp_shard_size=4, context_parallel_size=2, use_dora=True)
    assert made.mesh is not None
    assert made.mesh.mesh == Mesh(8, 1, shard=4, context=2)
    assert made.mesh.missing == ""
    assert made.mesh.command.endswith("--dp-shard-size 4 --context-parallel-size 2")


def test_ranks_that_train_all_weights_together_keep_moments_in_fp32(plan: Planner) -> None:
    alone = plan(LLAMA_8B, "h100", method="full")
    assert alone.config.optim == "adamw_8bit"
    together = plan(LLAMA_8B, "8xh100", method="full")
    assert together.config.optim == "adamw"
    assert together.config.dp_shard_size > 1
    assert together.mesh is not None
    assert together.mesh.missing == ""


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"packed_parameters": 8}, "experts that the files hold in 4 bits cannot"),
        ({"adapter_sha256": "0"}, "adapter_from cannot"),
    ],
)
def test_models_and_adapters_that_cannot_be_sharded_are_refused(
    make_context: Callable[..., RuleContext], facts: dict[str, Any], problem: str
) -> None:
    dense = {"modules_to_save": ()}
    assert decide_shard(make_context(num_experts=8, **dense), 2).value == 2
    with pytest.raises(InputError, match=problem):
        decide_shard(make_context(**dense, **facts), 2)


def test_sharded_weights_have_one_layout(tiny_folder: Path, tmp_path: Path) -> None:
    wishes = {"dtype": "bf16", "dp_shard_size": 2}
    made = plan_recipe(make_tiny_recipe(tiny_folder, tmp_path, **wishes))
    assert made.config.weight_layout == "plain"
    assert made.config.dp_shard_size == 2


def test_several_stages_are_not_sharded(tiny_folder: Path, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", build_sum_rows(1, 6)))
    stage = {"sft": {"data": rows, "batch_size": 2}}
    output_dir = str(tmp_path / "run")
    both = {"model": str(tiny_folder), "dp_shard_size": 2, "stage": [stage, stage]}
    stage_inputs = load_stage_inputs(api.read_recipe(both | {"output_dir": output_dir}))
    with pytest.raises(InputError, match="several stages cannot be used with sharded weights"):
        make_staged_plan(stage_inputs)
