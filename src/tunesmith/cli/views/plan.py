"""Views of `plan` and `doctor`: settings, their reasons, methods, GPUs, the machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.cli.output import escape_markup, format_single_line
from tunesmith.cli.views import make_table
from tunesmith.core.errors import InputError
from tunesmith.core.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_duration_range,
    format_value,
    suggest_name,
)
from tunesmith.core.mesh import MeshOption, MeshPlan
from tunesmith.core.types import ModelSpec, Plan, PlanValue
from tunesmith.evaluate.run_verdict import VERDICT_LIMITS
from tunesmith.plan.hardware_presets import match_preset
from tunesmith.plan.memory import USUAL_MULTIPLES, compute_multiple
from tunesmith.plan.mesh import build_command
from tunesmith.plan.stages import StagedPlan
from tunesmith.recipe.fields import NO_DATA
from tunesmith.recipe.schema import ALIASES

if TYPE_CHECKING:
    from tunesmith.plan.method_comparison import MethodEstimate
    from tunesmith.session.doctor import Diagnosis, MachineCheck

SOURCE_STYLES = {"user": "bold", "rule": "cyan", "checkpoint": "magenta"}
MAIN_SETTINGS = (
    *("method", "learning_rate", "num_train_epochs", "batch_size"),
    *("max_length", "lora_r", "beta", "rehearsal_ratio"),
)
USUAL_USER_SETTINGS = ("output_dir", "seed", "stage")  # shown with --all only
MAX_LINES = 12  # of a plan, without --all, warnings and the GPUs of a target
MAX_VALUE_CHARS = 24
SOURCE_LABELS = {"user": "user", "rule": "rule", "checkpoint": "the model's files"}

PART_LABELS = {
    "context": "CUDA",
    "widened": "dequantized",
    "trained": "trained weights, gradients and moments",
    "head": "logits",
    "fragments": "fragmentation",
}
ACTIVATIONS = {"none": "kept", "selective": "MLPs recomputed", "full": "recomputed"}


def render_plan(plan: Plan | StagedPlan, *, show_all: bool = False) -> RenderableType:
    """Show the settings that matter, then steps, time, memory and warnings, per stage: without
    warnings in MAX_LINES; with `show_all` every setting, with its reason in full."""
    if isinstance(plan, StagedPlan):
        parts: list[RenderableType] = []
        for number, stage_plan in enumerate(plan.plans, start=1):
            parts.append(f"stage {number} of {len(plan.plans)}: {stage_plan.config.stage}")
            parts.append(render_plan(stage_plan, show_all=show_all))
        return Group(*parts)
    lines = _list_facts(plan, show_all=show_all)
    settings = plan.settings
    if not show_all:
        settings = select_main_settings(plan, MAX_LINES - len(lines) - 2)  # header and last line
    table = _build_table(settings) if show_all else _build_brief_table(settings)
    lines += [f"[yellow]warning[/] {escape_markup(warning)}" for warning in plan.warnings]
    if hidden := plan.settings.keys() - settings.keys():
        set_by_user = hidden & set(_list_user_settings(plan))
        note = f", {len(set_by_user)} set by you" if set_by_user else ""
        lines.append(
            f"[dim]{len(hidden)} more settings{note}: --all; the reason of one: --why KEY[/]"
        )
    if plan.mesh is not None and plan.mesh.mesh.num_gpus > 1:
        return Group(table, *lines, render_mesh(plan, plan.mesh))
    return Group(table, *lines)


def _list_facts(plan: Plan, *, show_all: bool) -> list[str]:
    """Return lines with the steps, the time and the memory."""
    rows = plan.data["data"].rows if "data" in plan.data else 0
    steps = format_count(plan.steps, "step")
    lines = [
        f"{steps} over {format_count(rows, 'row')}, {plan.tokens_per_epoch:,} tokens per epoch"
    ]
    if plan.disk_bytes:
        lines[0] += f"; run folder up to {format_bytes(plan.disk_bytes)}"
    if plan.seconds:
        lines.append(_format_time(plan, show_all=show_all))
    if "peak" in plan.memory_bytes:
        lines += _format_memory(plan, show_all=show_all)
    if plan.model.omitted_bytes:
        lines.append(describe_text_part(plan.model))
    if "test_data" in plan.data:
        lines.append(f"[dim]ready needs[/] {escape_markup(_describe_ready(plan))}")
    return lines


def _describe_ready(plan: Plan) -> str:
    """Say what the verdict of the run will compare, and with which values."""
    rows = format_count(plan.data["test_data"].rows, "test row")
    share, low = (VERDICT_LIMITS[f"ready: {name}"] for name in ("right answers", "lower end"))
    goal = f"{share:.0%} of {rows} right (95% CI from {low:.0%})"
    if plan.config.stage == "cpt":
        goal = f"fewer bits per byte on {rows}, by more than general text loses"
    elif plan.config.stage == "preference":
        goal = f"{rows} ordered better, also at equal length, over half of them (95% CI)"
    if gates := plan.recipe.get("gates"):
        goal = f"your gates on {rows}: {', '.join(f'{key} {gates[key]}' for key in gates)}"
    margin = f"general text within {plan.config.forgetting_margin:g} bits per byte"
    if plan.recipe.get("retention_data") in (None, NO_DATA):
        margin = "retention_data, which is none"
    return f"{goal}; {margin}; nothing worse"


def describe_text_part(model: ModelSpec) -> str:
    """Say how much of a multimodal checkpoint is not loaded."""
    return f"text part only: {format_bytes(model.omitted_bytes)} of other weights are not loaded"


def _build_table(settings: Mapping[str, PlanValue]) -> Table:
    table = make_table("Plan", "setting", "value", "source", "reason")
    for key, setting in settings.items():
        citation = f" ({setting.source})" if setting.source else ""
        table.add_row(
            key,
            format_single_line(format_value(setting.value)),
            Text(setting.decided_by, SOURCE_STYLES[setting.decided_by]),
            escape_markup(setting.reason + citation),
        )
    return table


def _build_brief_table(settings: Mapping[str, PlanValue]) -> Table:
    """Tabulate settings with one line each; a reason that does not fit is cut."""
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True, min_width=max(map(len, settings), default=0))
    table.add_column("value", no_wrap=True)
    table.add_column("reason")  # the only one that gives way; its texts do not wrap
    for key, setting in settings.items():
        value = format_single_line(format_value(setting.value), MAX_VALUE_CHARS)
        style = SOURCE_STYLES[setting.decided_by]
        table.add_row(key, value, Text(setting.reason, style, overflow="ellipsis", no_wrap=True))
    return table


def select_main_settings(plan: Plan, max_settings: int) -> dict[str, PlanValue]:
    """Return the settings that decide what a run is, then those that the user has set."""
    main = {key: plan.settings[key] for key in MAIN_SETTINGS if key in plan.settings}
    main |= {key: plan.settings[key] for key in _list_user_settings(plan)}
    return dict(itertools.islice(main.items(), max_settings))


def _list_user_settings(plan: Plan) -> list[str]:
    return [
        key
        for key, setting in plan.settings.items()
        if setting.decided_by == "user" and key not in USUAL_USER_SETTINGS
    ]


def _format_time(plan: Plan, *, show_all: bool) -> str:
    """Format the time and what it is known from; in brief without what is in brackets there."""
    text = f"about {format_duration_range(plan.seconds)} of training"
    if plan.total_seconds:
        total = format_duration(plan.total_seconds)
        text += f" ({total} with start, preflight and evaluation)"
    source = plan.seconds_source if show_all else plan.seconds_source.partition(" (")[0]
    return f"{text}, {escape_markup(source)}"


def _format_memory(plan: Plan, *, show_all: bool) -> list[str]:
    """Format the peak memory and the smallest GPU that fits; with `show_all` also the parts and
    the rule of thumb."""
    peak = plan.memory_bytes["peak"]
    method = plan.config.method or "lora"
    text = f"peak memory {format_bytes(peak)} of {format_bytes(plan.machine.available_bytes)} free"
    if match_preset(plan.machine) is not None:
        text += f" on {plan.machine.device_name}"
    parts = [f"{name} {format_bytes(num_bytes)}" for name, num_bytes in plan.phase_bytes.items()]
    if parts and show_all:
        text += f": {', '.join(parts)}"
    elif parts:
        text += f" (in the {max(plan.phase_bytes, key=lambda name: plan.phase_bytes[name])})"
    lines = [text]
    if parts and show_all:
        multiple = compute_multiple(plan.model, peak)
        usual = USUAL_MULTIPLES[method]
        lines.append(
            f"{multiple:.1f}x the 16-bit weights (rule of thumb for {method}: {usual}, "
            "without activations)"
        )
    if plan.fits_on:
        lines.append(f"[bold red]does not fit[/]: the smallest GPU that fits is {plan.fits_on}")
    return lines


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


def render_setting(plan: Plan | StagedPlan, key: str) -> RenderableType:
    """Explain one setting, per stage. Raises InputError for a key that the plan does not have."""
    if isinstance(plan, StagedPlan):
        return Group(*(render_setting(stage_plan, key) for stage_plan in plan.plans))
    key = key.replace("-", "_")
    key = ALIASES.get(key, key)
    setting = plan.settings.get(key)
    if setting is None:
        names = [*plan.settings, *ALIASES]
        fix = suggest_name(key, names, "see all settings with `tunesmith plan --all`")
        raise InputError(f"the plan has no setting {key!r:.80}", where="--why", fix=fix)
    table = make_table(f"{key}: {format_value(setting.value)}")
    no_confidence = "n/a: set by you, measured, or a convention"
    for name, text in (
        ("source", SOURCE_LABELS[setting.decided_by]),
        ("reason", setting.reason),
        ("reference", setting.source or "-"),
        ("common advice", setting.common_advice or "-"),
        ("confidence", setting.confidence or no_confidence),
    ):
        table.add_row(Text(name, "dim"), escape_markup(text))
    return table


def render_method_estimates(estimates: Sequence[MethodEstimate]) -> RenderableType:
    """Show a column per method."""
    methods = [estimate.method for estimate in estimates]
    table = make_table("Methods (common advice in brackets)", "", *methods)
    for name, format_cell in ESTIMATE_ROWS.items():
        cells = [escape_markup(format_cell(estimate)) for estimate in estimates]
        table.add_row(Text(name, "dim"), *cells)
    return table


def _format_fit(estimate: MethodEstimate) -> str:
    if estimate.has_enough_memory:
        return "fits"
    return f"does not fit; the smallest GPU that fits: {estimate.fits_on}"


def _format_seconds(estimate: MethodEstimate) -> str:
    if not estimate.seconds or not estimate.has_enough_memory:
        return "-"
    text = f"{format_duration_range(estimate.seconds)} of training"
    if estimate.total_seconds:
        text += f", {format_duration(estimate.total_seconds)} in all"
    return text


ESTIMATE_ROWS: dict[str, Callable[[MethodEstimate], str]] = {
    "memory": lambda e: f"{format_bytes(e.peak_bytes)} of {format_bytes(e.free_bytes)} free",
    "": _format_fit,
    "x weights": lambda e: f"x{e.multiple:.2g} ({e.usual_multiple})",
    "learning rate": lambda e: f"{e.learning_rate:g}",
    "trained": lambda e: f"{e.trained_parameters / 1e6:,.1f}M parameters",
    "compute": lambda e: f"{e.flops / 1e12:,.0f} TFLOP",
    "time": _format_seconds,
    "speed": lambda e: f"{e.speed} ({e.usual_speed})",
    "forgetting": lambda e: f"{e.risk} ({e.usual_risk})",
    "deployment": lambda e: f"{e.deployment} ({e.usual_deployment})",
    "result": lambda e: format_bytes(e.result_bytes),
    "run folder": lambda e: f"up to {format_bytes(e.disk_bytes)}",
}


def render_diagnosis(diagnosis: Diagnosis) -> RenderableType:
    """Show the machine and what was checked on it."""
    machine = diagnosis.machine
    memory = f"{format_bytes(machine.available_bytes)} of {format_bytes(machine.memory_bytes)}"
    cores = format_count(machine.cores, "core")
    head = (
        f"{machine.device} {machine.device_name}: {cores}, {memory} memory free, "
        f"{format_bytes(machine.disk_free_bytes)} disk free"
    )
    table = make_table("")
    for check in diagnosis.checks:
        fix = "" if check.is_ok or not check.fix else f"\n{check.fix}"
        table.add_row(_format_mark(check), check.name, escape_markup(f"{check.value}{fix}"))
    return Group(escape_markup(head), table)


def _format_mark(check: MachineCheck) -> Text:
    if check.is_ok:
        return Text("ok", "green")
    return Text("missing", "bold red" if check.is_required else "yellow")
