"""View of a plan for several GPUs: which hold the weights, memory by part, time, what else fits."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.cli.output import escape_markup
from tunesmith.cli.views import make_table
from tunesmith.core.formatting import format_bytes, format_count
from tunesmith.core.mesh import DryRun, MeshOption, MeshPlan, MeshStep, RankMessages
from tunesmith.core.types import Plan
from tunesmith.plan.mesh import explain_batch, format_seconds

PART_LABELS = {
    "context": "CUDA",
    "widened": "dequantized",
    "trained": "trained weights, gradients and moments",
    "head": "logits",
    "fragments": "fragmentation",
}
ACTIVATIONS = {"none": "kept", "selective": "MLPs recomputed", "full": "recomputed"}


def render_mesh(plan: Plan, mesh_plan: MeshPlan) -> RenderableType:
    """Show the mesh with its reasons, the memory and the time of a GPU, and other ways."""
    table = Table(title="GPUs", title_justify="left", box=None, pad_edge=False, show_header=False)
    for choice in mesh_plan.choices:
        table.add_row(choice.name, str(choice.value), escape_markup(choice.reason))
    parts: list[RenderableType] = [table, *_iter_lines(plan, mesh_plan)]
    if mesh_plan.options:
        parts.append(_build_option_table(mesh_plan))
    return Group(*parts)


def _iter_lines(plan: Plan, mesh_plan: MeshPlan) -> Iterator[str]:
    yield f"memory of a GPU: {_format_parts(plan.memory_bytes)}"
    yield from _iter_time_lines(mesh_plan.step, mesh_plan.mesh.num_gpus)
    unit = "tokens" if plan.config.stage == "cpt" else "rows"
    if text := explain_batch(mesh_plan, unit=unit):
        yield f"[yellow]warning[/] {text}"
    if mesh_plan.missing:
        yield f"[bold red]not in this version[/]: {mesh_plan.missing}; `train` refuses this plan"
    else:
        where = " on each node" if mesh_plan.mesh.num_nodes > 1 else ""
        yield f"start{where}: {mesh_plan.command}"


def _format_parts(memory_bytes: dict[str, int]) -> str:
    """Format the components, the largest first."""
    parts = {name: num_bytes for name, num_bytes in memory_bytes.items() if name != "peak"}
    names = sorted((name for name in parts if parts[name]), key=lambda name: -parts[name])
    return ", ".join(f"{PART_LABELS.get(name, name)} {format_bytes(parts[name])}" for name in names)


def _iter_time_lines(step: MeshStep, num_gpus: int) -> Iterator[str]:
    times = {
        "gathering": step.gather_seconds,
        "exchanging": step.exchange_seconds,
        "summing gradients": step.reduce_seconds,
    }
    parts = [f"computing {_format_range(step.compute_seconds)}"]
    parts += [f"{name} {format_seconds(seconds)}" for name, seconds in times.items() if seconds]
    yield f"a step of {step.tokens:,} tokens: {_format_range(step.seconds)} ({', '.join(parts)})"
    low, high = step.tokens_per_second
    per_gpu = _format_rates((low / num_gpus, high / num_gpus))
    yield f"{_format_rates((low, high))} tokens per second, {per_gpu} per GPU"


def _format_range(seconds: tuple[float, float]) -> str:
    return " to ".join(dict.fromkeys(map(format_seconds, seconds)))


def _format_rates(rates: tuple[float, float]) -> str:
    """Format a range of tokens per second with two digits: that is more than is known."""
    return " to ".join(dict.fromkeys(f"{float(f'{rate:.2g}'):,.0f}" for rate in rates))


def _build_option_table(mesh_plan: MeshPlan) -> Table:
    headings = (
        "GPUs",
        "method",
        "dp_shard_size",
        "activations",
        "memory of a GPU",
        "tokens/s",
        "in this version",
    )
    table = make_table("Other GPUs and methods", *headings)
    for option in mesh_plan.options:
        table.add_row(*_format_option(option))
    return table


def _format_option(option: MeshOption) -> tuple[str | Text, ...]:
    if not option.has_enough_memory:
        verdict = Text("does not fit", "red")
    else:
        verdict = Text(f"no: {option.missing}" if option.missing else "runs")
    return (
        option.target,
        option.method,
        str(option.mesh.shard),
        ACTIVATIONS[option.gradient_checkpointing],
        format_bytes(option.peak_bytes),
        _format_rates(option.tokens_per_second) if option.has_enough_memory else "-",
        verdict,
    )


# ---------------------------------------------------------------- a step without its memory


def render_dry_run(dry_run: DryRun) -> RenderableType:
    """Show what rank 0 sends and holds, counted and predicted."""
    title = f"One step of rank 0 of {dry_run.num_ranks}"
    table = make_table(title, "", "counted", "planned", numbers=("counted", "planned"))
    planned = {message.operation: message for message in dry_run.planned_messages}
    for message in dry_run.messages:
        prediction = planned.get(message.operation)
        expected = "-" if prediction is None else _format_messages(prediction)
        table.add_row(message.operation, _format_messages(message), expected)
    sizes = {
        "weights": (dry_run.weight_bytes, dry_run.planned_weight_bytes),
        "peak": (dry_run.peak_bytes, dry_run.planned_peak_bytes),
    }
    for name, pair in sizes.items():
        table.add_row(name, *map(format_bytes, pair))
    tokens = (dry_run.rank_tokens, dry_run.planned_rank_tokens)
    table.add_row("tokens of this rank", *(f"{count:,}" for count in tokens))
    return Group(table, _explain_dry_run(dry_run))


def _format_messages(messages: RankMessages) -> str:
    return f"{format_count(messages.calls, 'call')}, {format_bytes(messages.num_bytes)}"


def _explain_dry_run(dry_run: DryRun) -> str:
    groups = f" {dry_run.context} ranks share each document." if dry_run.context > 1 else ""
    return (
        f"The step has {dry_run.step_tokens:,} tokens; the plan is for steps of long rows.{groups} "
        "Nothing was computed or sent: tensors have sizes and no values, and operations are those "
        "of plain torch, which keeps more than our kernels. Neither column has the process, CUDA, "
        "NCCL or fragmentation."
    )
