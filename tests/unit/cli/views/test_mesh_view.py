"""A plan for several GPUs on the screen."""

import dataclasses

from tunesmith.cli.views.plan import render_plan
from tunesmith.core.mesh import Mesh, MeshOption, MeshPlan
from view_samples import PLAN, render_text

MESH_PLAN = MeshPlan(
    mesh=Mesh(8, 1, shard=4),
    options=(
        MeshOption("h100", "full", 154 * 10**9, False, (700.0, 1100.0)),
        MeshOption("8xh100", "none", 39 * 10**9, True, (100.0, 160.0)),
    ),
)


def render(mesh_plan: MeshPlan | None) -> str:
    memory_bytes = {"weights": 38 * 10**9, "NCCL": 10**9, "KV cache": 0, "peak": 39 * 10**9}
    plan = dataclasses.replace(PLAN, memory_bytes=memory_bytes, mesh=mesh_plan)
    return render_text(render_plan(plan), width=200)


def test_one_gpu_and_all_are_shown_with_memory_and_time() -> None:
    text = render(MESH_PLAN)
    lines = [line.split() for line in text.splitlines()]
    assert ["h100", "recomputed", "154.0", "GB", "does", "not", "fit", "-"] in lines
    time = "1 min 40 s to 2 min 40 s"
    assert ["8xh100", "kept", "39.0", "GB", "fits", *time.split()] in lines
    assert "memory of a GPU: weights 38.0 GB, NCCL 1.0 GB\n" in text
    assert "--dp-shard-size 4" in text


def test_a_target_of_one_gpu_is_shown_as_before() -> None:
    assert render(MeshPlan(Mesh())) == render(None)
