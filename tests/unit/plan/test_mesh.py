"""Which GPUs of a target share weights and documents, and how long they take."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_sizes import LLAMA_8B, LLAMA_70B
from tiny_runs import build_sum_rows, make_tiny_recipe, plan_recipe, write_rows
from tunesmith import api
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.json_io import parse_as, to_jsonable
from tunesmith.core.mesh import Mesh
from tunesmith.core.types import Plan
from tunesmith.plan.build import refuse_if_too_large
from tunesmith.plan.gpu_time import estimate_gpu_time
from tunesmith.plan.hardware_presets import HARDWARE_PRESETS
from tunesmith.plan.mesh import build_command, make_option, refuse_shard, refuse_shared_documents
from tunesmith.plan.rules import RuleContext
from tunesmith.train.stages import load_stage_inputs, make_staged_plan

Planner = Callable[..., Plan]


def get_mesh(plan: Plan) -> Mesh:
    assert plan.mesh is not None
    return plan.mesh.mesh


def measure_step(plan: Plan, name: str = "h100") -> float:
    """Return the least seconds of a step."""
    return estimate_gpu_time(plan, HARDWARE_PRESETS[name]).seconds[0] / plan.steps


def test_each_gpu_has_all_weights_and_a_part_of_the_rows(plan: Planner) -> None:
    made = plan(LLAMA_8B, "8xh100")
    assert get_mesh(made) == Mesh(8, 1)
    assert made.config.dp_shard_size == made.config.context_parallel_size == 1
    one = plan(LLAMA_8B, "h100").memory_bytes
    assert made.memory_bytes["weights"] == one["weights"]
    assert made.memory_bytes["activations"] < one["activations"] / 5
    assert made.memory_bytes.keys() - one.keys() == {"NCCL"}
    assert parse_as(Plan, to_jsonable(made)).mesh == made.mesh


def test_gpus_hold_a_shard_of_the_weights_if_the_recipe_says_so(plan: Planner) -> None:
    made = plan(LLAMA_70B, "8xh100", method="lora", dp_shard_size=4)
    assert get_mesh(made) == Mesh(8, 1, shard=4)
    assert made.reasons["dp_shard_size"].decided_by == "user"
    parts = made.memory_bytes
    block_bytes = 2 * made.model.block_parameters
    rest_bytes = 2 * (made.model.parameters - made.model.block_parameters)
    assert parts["weights"] == pytest.approx(rest_bytes + block_bytes / 4, rel=1e-6)
    assert parts["gathered"] == pytest.approx(2 * block_bytes / 80, rel=1e-6)
    assert parts["peak"] == sum(parts.values()) - parts["peak"]
    assert make_option(made).has_enough_memory
    assert not make_option(plan(LLAMA_70B, "8xh100", method="lora")).has_enough_memory


def test_full_fine_tuning_holds_a_shard_of_everything_and_moments_in_fp32(plan: Planner) -> None:
    alone = plan(LLAMA_8B, "h100", method="full")
    assert alone.config.optim == "adamw_8bit"
    made = plan(LLAMA_8B, "8xh100", method="full", dp_shard_size=8)
    assert made.config.optim == "adamw"
    parts = made.memory_bytes
    assert "weights" not in parts, "16-bit copies exist where they are gathered"
    assert parts["trained"] == pytest.approx(16 * made.model.parameters / 8, rel=1e-6)


def test_gpus_share_documents_and_weights(plan: Planner) -> None:
    wishes: dict[str, Any] = {"dp_shard_size": 4, "context_parallel_size": 2, "use_dora": True}
    made = plan(LLAMA_8B, "8xh100", longest=8000, **wishes)
    assert get_mesh(made) == Mesh(8, 1, shard=4, context=2)
    assert build_command(get_mesh(made)).endswith("--dp-shard-size 4 --context-parallel-size 2")
    whole = plan(LLAMA_8B, "8xh100", longest=8000, dp_shard_size=4, use_dora=True)
    ratio = made.memory_bytes["activations"] / whole.memory_bytes["activations"]
    assert ratio == pytest.approx(0.5, rel=0.05)


def test_more_gpus_are_a_way_out_of_too_little_memory_if_they_share_weights(plan: Planner) -> None:
    made = plan(LLAMA_70B, "h100", method="lora")
    with pytest.raises(MachineError) as refusal:
        refuse_if_too_large(made)
    assert "more GPUs" not in refusal.value.fix
    with pytest.raises(MachineError) as refusal:
        refuse_if_too_large(plan(LLAMA_70B, "8xh100", method="lora"))
    assert "--dp-shard-size" in refusal.value.fix


@pytest.mark.parametrize(
    ("target", "wishes", "where"),
    [
        ("8xh100", {"context_parallel_size": 2, "num_kv_heads": 1}, "context_parallel_size: 2"),
        ("8xh100", {"context_parallel_size": 2, "num_heads": 9}, "context_parallel_size: 2"),
        ("8xh100", {"context_parallel_size": 2, "stage": "preference"}, "context_parallel_size: 2"),
        ("4xh100", {"context_parallel_size": 8}, "context_parallel_size: 8"),
        ("8xh100", {"dp_shard_size": 2, "method": "full", "optim": "adamw_8bit"}, "optim"),
        ("8xh100", {"dp_shard_size": 2, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("8xh100", {"dp_shard_size": 2, "rehearsal": {"data": "self-generated"}}, "rehearsal"),
        ("8xh100", {"dp_shard_size": 3}, "dp_shard_size: 3"),
        ("h100", {"dp_shard_size": 2}, "dp_shard_size: 2"),
        ("2xh100", {"method": "full", "max_grad_norm": 0, "batch_size": 4}, "max_grad_norm: 0"),
    ],
)
def test_what_gpus_cannot_share_is_refused(
    plan: Planner, target: str, wishes: dict[str, Any], where: str
) -> None:
    sizes = {name: wishes[name] for name in ("num_heads", "num_kv_heads") if name in wishes}
    rest = {name: value for name, value in wishes.items() if name not in sizes}
    model = sizes if "max_grad_norm" in wishes else LLAMA_8B | sizes
    with pytest.raises(InputError) as refusal:
        plan(model, target, longest=500, **rest)
    assert where in f"{refusal.value.where} {refusal.value}"


@pytest.mark.parametrize("facts", [{"packed_parameters": 8}, {"adapter_sha256": "0"}])
def test_models_and_adapters_that_cannot_be_sharded_are_refused(
    make_context: Callable[..., RuleContext], facts: dict[str, Any]
) -> None:
    refuse_shard(make_context(num_experts=8), 2)
    with pytest.raises(InputError, match="cannot be used with sharded weights"):
        refuse_shard(make_context(**facts), 2)


def test_layers_that_carry_a_state_refuse_shared_documents(
    make_context: Callable[..., RuleContext],
) -> None:
    context = make_context(num_heads=8, num_kv_heads=8)
    hybrid = dataclasses.replace(context.model, layer_mixers=("delta", "attention"))
    refuse_shared_documents(context, 2)
    with pytest.raises(InputError, match="layers of delta"):
        refuse_shared_documents(dataclasses.replace(context, model=hybrid), 2)


def test_sharded_weights_of_this_machine_have_one_layout(tiny_folder: Path, tmp_path: Path) -> None:
    wishes = {"dtype": "bf16", "dp_shard_size": 2}
    made = plan_recipe(make_tiny_recipe(tiny_folder, tmp_path, **wishes))
    assert made.config.weight_layout == "plain"
    assert (made.config.dp_shard_size, made.mesh) == (2, None)


def test_several_stages_are_not_sharded(tiny_folder: Path, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", build_sum_rows(1, 6)))
    stage = {"sft": {"data": rows, "batch_size": 2}}
    output_dir = str(tmp_path / "run")
    both = {"model": str(tiny_folder), "dp_shard_size": 2, "stage": [stage, stage]}
    stage_inputs = load_stage_inputs(api.read_recipe(both | {"output_dir": output_dir}))
    with pytest.raises(InputError, match="several stages cannot be used with sharded weights"):
        make_staged_plan(stage_inputs)


# ---------------------------------------------------------------- time


def test_eight_gpus_pay_where_rows_are_many(plan: Planner) -> None:
    one, eight = (plan(LLAMA_8B, target, batch_size=256) for target in ("h100", "8xh100"))
    assert 7 < measure_step(one) / measure_step(eight) < 8


def test_a_row_is_not_divided_and_launches_are_as_many_on_each_gpu(plan: Planner) -> None:
    two, eight = (plan(LLAMA_8B, target, batch_size=2) for target in ("2xh100", "8xh100"))
    assert measure_step(eight) == pytest.approx(measure_step(two), rel=0.3)
    small = [measure_step(plan({}, target)) for target in ("h100", "8xh100")]
    assert small[1] > small[0] / 2, "the kernels of a small model are launched by each GPU"


def test_sharded_weights_are_gathered_in_each_pass(plan: Planner) -> None:
    wishes: dict[str, Any] = {"method": "lora", "gradient_checkpointing": "full"}
    kept, shared = (plan(LLAMA_70B, "8xh100", dp_shard_size=size, **wishes) for size in (1, 8))
    moved_bytes = 2 * 2 * kept.model.block_parameters * 7 / 8
    gathering = moved_bytes / HARDWARE_PRESETS["h100"].link
    assert measure_step(shared) - measure_step(kept) == pytest.approx(gathering, rel=0.01)


def test_shared_prefixes_save_less_on_each_of_many_gpus(plan: Planner) -> None:
    def save_half_of_a_full_step(batch_size: int, pack_length: int) -> float:
        del pack_length
        return 0.5 if batch_size >= 64 else 0.1

    how: dict[str, Any] = {"batch_size": 64, "saved_share": save_half_of_a_full_step}
    one, eight = (plan(LLAMA_8B, target, **how) for target in ("h100", "8xh100"))
    assert one.config.share_prefixes
    assert (one.prefix_savings, eight.prefix_savings) == (0.5, 0.1)


@pytest.mark.parametrize("stage", ["cpt", "preference"])
def test_every_stage_has_a_time(plan: Planner, stage: str) -> None:
    one, eight = (plan({}, target, stage=stage) for target in ("h100", "8xh100"))
    assert 0 < measure_step(eight) < 2 * measure_step(one)
