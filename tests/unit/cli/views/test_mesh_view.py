"""A plan for several GPUs on the screen."""

import dataclasses

from tunesmith.cli.views.plan import render_plan
from tunesmith.core.mesh import BatchAdvice, Mesh, MeshChoice, MeshOption, MeshPlan, MeshStep
from view_samples import PLAN, render_text

STEP = MeshStep(
    tokens=1200,
    gpu_tokens=300,
    compute_seconds=(0.175, 0.278),
    gather_seconds=0.585,
    exchange_seconds=0.0,
    reduce_seconds=0.0041,
    seconds=(0.6, 0.8),
    busy_share=0.13,
)
SHARDED = MeshPlan(
    mesh=Mesh(8, 1, shard=4),
    choices=(MeshChoice("dp_shard_size", 4, "a step [does] not fit on one GPU"),),
    step=STEP,
    batch=BatchAdvice(32, 2.8e-4, 9, 0.95, "by the rule"),
    missing="weights that are sharded over GPUs",
    command="torchrun sharded",
    options=(
        MeshOption("h100", "lora", "full", Mesh(), 154 * 10**9, False, (700.0, 1100.0), ""),
        MeshOption("8xh100", "qlora", "none", Mesh(8), 55 * 10**9, True, (2634.0, 3512.0), ""),
        MeshOption("4xh100", "lora", "none", Mesh(4, 1, 4), 58 * 10**9, True, (9.0, 9.0), "shards"),
    ),
)
REPLICATED = dataclasses.replace(SHARDED, mesh=Mesh(8), batch=None, missing="", options=())


def render(mesh_plan: MeshPlan | None, width: int = 200) -> str:
    memory_bytes = {"weights": 38 * 10**9, "NCCL": 10**9, "KV cache": 0, "peak": 39 * 10**9}
    plan = dataclasses.replace(PLAN, memory_bytes=memory_bytes, mesh=mesh_plan)
    return render_text(render_plan(plan), width=width)


def test_a_mesh_is_shown_with_reasons_memory_by_part_and_the_time_of_a_step() -> None:
    text = render(REPLICATED)
    assert "a step [does] not fit on one GPU" in text
    assert "memory of a GPU: weights 38.0 GB, NCCL 1.0 GB\n" in text
    assert (
        "a step of 1,200 tokens: 600 ms to 800 ms (computing 175 ms to 278 ms, gathering 585 ms, "
        "summing gradients 4.1 ms)"
    ) in text
    assert "1,500 to 2,000 tokens per second, 190 to 250 per GPU" in text
    assert "start: torchrun sharded" in text
    assert "do not pay" not in text
    assert "not in this version" not in text


def test_what_does_not_run_has_no_command_and_few_rows_a_warning() -> None:
    text = " ".join(render(SHARDED, width=90).split())
    assert "torchrun sharded" not in text
    assert "`train` refuses this plan" in text
    assert "8 GPUs do not pay with 1,200 tokens per step: they compute 13% of the time" in text
    assert "32 rows per step keep them busy (95%)" in text
    assert "with learning_rate 0.00028 (by the rule) and 9 steps" in text
    assert "9 steps, which are few: use fewer GPUs" in text


def test_other_ways_are_rows_with_what_fits_and_what_runs() -> None:
    lines = [line.split() for line in render(SHARDED).splitlines()]
    assert ["h100", "lora", "1", "recomputed", "154.0", "GB", "-", "does", "not", "fit"] in lines
    assert ["8xh100", "qlora", "1", "kept", "55.0", "GB", "2,600", "to", "3,500", "runs"] in lines
    assert ["4xh100", "lora", "4", "kept", "58.0", "GB", "9", "no:", "shards"] in lines


def test_a_target_of_one_gpu_is_shown_as_before() -> None:
    assert render(dataclasses.replace(SHARDED, mesh=Mesh())) == render(None)
