"""View of a plan for several GPUs: memory by part, and whether they pay."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.cli.views import make_table
from tunesmith.core.formatting import format_bytes, format_duration_range
from tunesmith.core.mesh import MeshOption, MeshPlan
from tunesmith.core.types import Plan
from tunesmith.plan.mesh import build_command

PART_LABELS = {
    "context": "CUDA",
    "widened": "dequantized",
    "trained": "trained weights, gradients and moments",
    "head": "logits",
    "fragments": "fragmentation",
}
ACTIVATIONS = {"none": "kept", "selective": "MLPs recomputed", "full": "recomputed"}


def render_mesh(plan: Plan, mesh_plan: MeshPlan) -> RenderableType:
    """Show one GPU of the target beside all, the memory of a GPU by part, and the command."""
    headings = ("GPUs", "activations", "memory of a GPU", "", "time of training")
    table = make_table("One GPU and all", *headings)
    for option in mesh_plan.options:
        table.add_row(*_format_option(option))
    where = " on each node" if mesh_plan.mesh.num_nodes > 1 else ""
    return Group(
        table,
        f"memory of a GPU: {_format_parts(plan.memory_bytes)}",
        f"start{where}: {build_command(mesh_plan.mesh)}",
    )


def _format_parts(memory_bytes: dict[str, int]) -> str:
    """Format the components, the largest first."""
    parts = {name: num_bytes for name, num_bytes in memory_bytes.items() if name != "peak"}
    names = sorted((name for name in parts if parts[name]), key=lambda name: -parts[name])
    return ", ".join(f"{PART_LABELS.get(name, name)} {format_bytes(parts[name])}" for name in names)


def _format_option(option: MeshOption) -> tuple[str | Text, ...]:
    fits = option.has_enough_memory
    return (
        option.target,
        ACTIVATIONS[option.gradient_checkpointing],
        format_bytes(option.peak_bytes),
        "fits" if fits else Text("does not fit", "red"),
        format_duration_range(option.seconds) if fits and option.seconds else "-",
    )
