"""Which GPUs hold the weights, which share a document, and whether several GPUs pay.

In: the settings that are decided so far, for a target of several GPUs. Out: a Mesh, and a MeshPlan
with its reasons, its time, and the batch that would fill the GPUs. The rule: every GPU holds all
weights if a step fits; else the fastest shard group that fits; and a document is divided only if it
fits on no GPU otherwise. Left out: what this version cannot run; the plan only says so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import format_bytes, format_count
from tunesmith.core.mesh import (
    SINGLE_GPU,
    BatchAdvice,
    Mesh,
    MeshChoice,
    MeshOption,
    MeshPlan,
    MeshStep,
)
from tunesmith.core.types import Machine, Plan, PlanValue
from tunesmith.plan.hardware_presets import HardwarePreset, describe_target, match_preset
from tunesmith.plan.mesh_time import can_divide_documents, estimate_mesh_step
from tunesmith.plan.rules import (
    RULES,
    SMALLEST_SCALED_BATCH,
    RuleContext,
    compute_batch_factor,
    make_rule_value,
    make_user_value,
)
from tunesmith.plan.rules_cpt import CPT_RULES
from tunesmith.plan.sharding import SHARDED_WEIGHTS, adapt_settings, find_shard_problem
from tunesmith.plan.step_memory import (
    CHECKPOINTING_POLICIES,
    MARGIN_NOTE,
    estimate_needed_bytes,
    has_enough_memory,
)
from tunesmith.recipe.schema import Recipe

# what the code of a run lacks on several GPUs
MISSING_STEP = "updates in the backward pass (max_grad_norm: 0) on several GPUs"
MIN_BUSY_SHARE = 0.5  # of a step: below, more GPUs than this batch can use (ours)
FILLED_SHARE = 0.8  # of a step, with the batch that is advised instead
MAX_BATCH_FACTOR = 1024
MIN_STEPS = 100  # fewer make results depend on learning rate and seed


def count_gpus(machine: Machine) -> int:
    """Return the GPUs of a target in all its nodes, else 1."""
    return machine.num_gpus * machine.num_nodes if machine.num_nodes else 1


def choose_mesh(context: RuleContext, recipe: Recipe) -> Mesh:
    """Choose the mesh of a target's GPUs, with what the recipe says of it. Raise InputError for
    documents that cannot be shared so.

    On this machine, only processes that share documents or weights are planned for: others change
    nothing."""
    num_gpus = count_gpus(context.machine)
    preset = match_preset(context.machine)
    shard_size = recipe.dp_shard_size
    context_size = recipe.context_parallel_size
    if context_size != "auto":
        refuse_shared_documents(context, context_size)
    if not context.machine.num_nodes:
        group = 1 if context_size == "auto" else context_size
        shard = 1 if shard_size == "auto" else shard_size
        return Mesh(num_gpus=group * shard, shard=shard, context=group)
    if num_gpus == 1 or preset is None:
        return SINGLE_GPU
    num_nodes = context.machine.num_nodes
    shards = _list_shard_sizes(num_gpus, num_nodes) if shard_size == "auto" else [shard_size]
    groups = _list_context_sizes(context) if context_size == "auto" else [context_size]
    largest = Mesh(num_gpus, num_nodes, max(shards), groups[0])
    for group in groups:
        rates: dict[Mesh, float] = {}
        for shard in shards:
            mesh = Mesh(num_gpus, num_nodes, shard, group)
            candidate = dataclasses.replace(context, mesh=mesh)
            if shard > 1:
                settings = context.settings | adapt_settings(context)
                candidate = dataclasses.replace(candidate, settings=settings)
            if not _set_policy(candidate, recipe.gradient_checkpointing):
                continue
            if shard == 1:
                return mesh
            rates[mesh] = estimate_mesh_step(candidate, preset).tokens_per_second[1]
        if rates:
            return max(rates, key=lambda mesh: (rates[mesh], -mesh.shard))
    return largest


def refuse_shared_documents(context: RuleContext, size: int) -> None:
    """Raise InputError if `size` GPUs cannot share a document."""
    problem = _find_context_problem(context, size)
    gpus_per_node = context.machine.num_gpus
    if context.machine.num_nodes and gpus_per_node % size:
        gpus = format_count(gpus_per_node, "GPU")
        problem = f"a node of the target has {gpus}, which groups of {size} do not divide"
    if problem:
        fix = "set context_parallel_size: 1, or leave it at auto"
        raise InputError(problem, where=f"context_parallel_size: {size}", fix=fix)


def _find_context_problem(context: RuleContext, size: int) -> str:
    """Return why `size` ranks cannot share a document; empty if they can."""
    model = context.model
    if size == 1:
        return ""
    if context.stage == "preference":
        return "the loss of an answer is one number of all its tokens, which one process needs"
    if not can_divide_documents(model):
        mixers = ", ".join(sorted(set(model.layer_mixers) - {"attention"}))
        return f"{model.architecture} has layers of {mixers}, which read tokens in their order"
    if model.num_heads % size or model.num_kv_heads % size:
        heads = format_count(model.num_kv_heads, "KV head")
        return f"{model.architecture} has {model.num_heads} query heads and {heads}: not divisible"
    return ""


def decide_context(context: RuleContext, recipe_value: int | Literal["auto"]) -> PlanValue:
    """Decide how many processes share each document: as many as the mesh has."""
    if recipe_value != "auto":
        return make_user_value(recipe_value)
    size = context.mesh.context
    if size == 1:
        return make_rule_value(1, "each process computes its documents alone")
    return make_rule_value(size, f"the longest document fits on no GPU: {size} share each")


def _list_shard_sizes(num_gpus: int, num_nodes: int) -> list[int]:
    """Return the numbers of GPUs that may hold the weights: parts of a node, then nodes."""
    gpus_per_node = num_gpus // num_nodes
    sizes = [size for size in range(1, gpus_per_node + 1) if gpus_per_node % size == 0]
    nodes = [count for count in range(2, num_nodes + 1) if num_nodes % count == 0]
    return sizes + [count * gpus_per_node for count in nodes]


def _list_context_sizes(context: RuleContext) -> list[int]:
    """Return the numbers of GPUs of a node that may share a document, each with some heads."""
    gpus_per_node = context.machine.num_gpus
    sizes = [size for size in range(1, gpus_per_node + 1) if gpus_per_node % size == 0]
    return [size for size in sizes if not _find_context_problem(context, size)]


def _set_policy(context: RuleContext, policy: str) -> bool:
    """Set the first policy with which a step fits; return whether there is one."""
    policies = CHECKPOINTING_POLICIES if policy == "auto" else (policy,)
    for name in policies:
        reason = CHECKPOINTING_POLICIES[name]
        context.settings["gradient_checkpointing"] = make_rule_value(name, reason)
        if estimate_needed_bytes(context) <= context.machine.available_bytes:
            return True
    return False


# ---------------------------------------------------------------- what the plan says of it


def describe_mesh(context: RuleContext) -> MeshPlan | None:
    """Return the mesh with its reasons and its time; None for this machine."""
    preset = match_preset(context.machine)
    if preset is None or not context.machine.num_nodes:
        return None
    mesh = context.mesh
    step = estimate_mesh_step(context, preset)
    return MeshPlan(
        mesh=mesh,
        choices=tuple(_iter_choices(context, step)),
        step=step,
        batch=_advise_batch(context, preset, step),
        missing=find_missing_parts(context),
        command=build_command(mesh),
    )


def find_missing_parts(context: RuleContext) -> str:
    """Return what this version lacks to run on the mesh; empty if it runs."""
    mesh = context.mesh
    missing: list[str] = []
    if mesh.num_gpus > 1 and context["step_in_backward"]:
        missing.append(MISSING_STEP)
    if mesh.shard > 1 and (problem := find_shard_problem(context)):
        missing.append(f"{problem} with {SHARDED_WEIGHTS}")
    return " and ".join(missing)


def _iter_choices(context: RuleContext, step: MeshStep) -> Iterator[MeshChoice]:
    mesh = context.mesh
    target = describe_target(context.machine)
    yield MeshChoice("gpus", mesh.num_gpus, f"--target {target}")
    yield MeshChoice("dp_shard_size", mesh.shard, _explain_shard(context, step))
    copies = "each copy computes its own documents of a step"
    if mesh.replicate == 1:
        copies = "no GPU is left for a second copy"
    elif step.reduce_seconds:
        copies += f"; gradients are summed in {format_seconds(step.reduce_seconds)}"
    yield MeshChoice("replicate", mesh.replicate, copies)
    yield MeshChoice("context_parallel_size", mesh.context, _explain_context(context, step))


def _explain_shard(context: RuleContext, step: MeshStep) -> str:
    mesh = context.mesh
    needed_bytes = estimate_needed_bytes(context)
    free_bytes = context.machine.available_bytes
    memory = f"{format_bytes(needed_bytes)} of {format_bytes(free_bytes)}"
    if needed_bytes > free_bytes:
        return f"even shared by all GPUs, a step needs {memory} on each, {MARGIN_NOTE}"
    if mesh.shard == 1:
        return f"a step fits on one GPU ({memory}, {MARGIN_NOTE}): each holds all weights"
    gather = format_seconds(step.gather_seconds)
    compute = format_seconds(step.compute_seconds[0])
    return (
        f"a step does not fit on one GPU: {mesh.shard} hold the weights once ({memory} each, "
        f"{MARGIN_NOTE}), gathered in {gather} before they compute for {compute}"
    )


def _explain_context(context: RuleContext, step: MeshStep) -> str:
    longest = format_count(context.longest_row, "token")
    size = context.mesh.context
    if size == 1:
        return f"the longest row, {longest}, is not divided"
    heads = context.model.num_kv_heads // size
    why = f"the longest row, {longest}, fits on no GPU"
    if context.settings["context_parallel_size"].decided_by == "user":
        why = "set in the recipe"
    return (
        f"{why}: {size} share each, {format_count(heads, 'KV head')} per GPU; exchanged in "
        f"{format_seconds(step.exchange_seconds)}"
    )


def format_seconds(seconds: float) -> str:
    """Format the time of a part of a step: 1.2 s, 350 ms, 4.1 ms."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    milliseconds = 1000 * seconds
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"


def explain_batch(mesh_plan: MeshPlan, *, unit: str) -> str:
    """Say that the GPUs wait with the batch of the plan, and which batch would fill them; empty if
    they do not. `unit` is that of the batch: rows, or tokens."""
    batch = mesh_plan.batch
    if batch is None:
        return ""
    step = mesh_plan.step
    text = (
        f"{mesh_plan.mesh.num_gpus} GPUs do not pay with {step.tokens:,} tokens per step: they "
        f"compute {step.busy_share:.0%} of the time"
    )
    if not batch.batch_size:
        return f"{text}, but no batch of this data fills them: use fewer GPUs"
    text += (
        f"; {batch.batch_size:,} {unit} per step keep them busy ({batch.busy_share:.0%}), with "
        f"learning_rate {batch.learning_rate:g} ({batch.rate_reason}) and "
        f"{format_count(batch.steps, 'step')}"
    )
    if batch.steps >= MIN_STEPS:
        return text
    return text + (", which are few: use fewer GPUs" if mesh_plan.mesh.replicate > 1 else "")


def _advise_batch(
    context: RuleContext, preset: HardwarePreset, step: MeshStep
) -> BatchAdvice | None:
    """Return the smallest batch, in powers of two of the plan's, that keeps the GPUs busy."""
    if context.mesh.num_gpus == 1 or step.busy_share >= MIN_BUSY_SHARE:
        return None
    key = "batch_tokens" if context.stage == "cpt" else "batch_size"
    limit = context.data.tokens if context.stage == "cpt" else context.data.rows
    factor = 2
    while factor <= MAX_BATCH_FACTOR and factor * context[key] <= limit:
        size = dataclasses.replace(context.settings[key], value=factor * context[key])
        larger = dataclasses.replace(context, settings=context.settings | {key: size})
        busy_share = estimate_mesh_step(larger, preset).busy_share
        if busy_share >= FILLED_SHARE:
            rate, reason = _adapt_rate(context, larger)
            return BatchAdvice(size.value, rate, larger.steps, busy_share, reason)
        factor *= 2
    return BatchAdvice(0, context["learning_rate"], 0, step.busy_share)


def _adapt_rate(context: RuleContext, larger: RuleContext) -> tuple[float, str]:
    """Return the learning rate for a larger batch, and its reason: that of the rule, which the plan
    for that batch has too, or that of the recipe, which grows as the rule does."""
    is_cpt = context.stage == "cpt"
    if context.settings["learning_rate"].decided_by != "user":
        rules = CPT_RULES if is_cpt else RULES
        return rules["learning_rate"](larger).value, "by the rule, for that batch"
    reason = "yours, grown with the square root of the batch"
    if is_cpt:
        growth = math.sqrt(larger["batch_tokens"] / context["batch_tokens"])
    else:
        reason += f" from {SMALLEST_SCALED_BATCH} rows on"
        growth = compute_batch_factor(larger["batch_size"])
        growth /= compute_batch_factor(context["batch_size"])
    return float(f"{context['learning_rate'] * growth:.2g}"), reason


def build_command(mesh: Mesh) -> str:
    """Return the command that starts a run on the mesh, on each of its nodes."""
    if mesh.num_gpus == 1:
        return "tunesmith train recipe.yaml"
    where = "--standalone"
    if mesh.num_nodes > 1:
        where = f"--nnodes {mesh.num_nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    gpus = f"--nproc-per-node {mesh.gpus_per_node}"
    command = f"torchrun {where} {gpus} -m tunesmith train recipe.yaml"
    if mesh.shard > 1:
        command += f" --dp-shard-size {mesh.shard}"
    return command + (f" --context-parallel-size {mesh.context}" if mesh.context > 1 else "")


def list_fewer_gpus(machine: Machine) -> list[Machine]:
    """Return the target with fewer GPUs: 1, 2, 4, ... of a node, then 1, 2, 4, ... nodes."""
    fewer: list[Machine] = []
    for num_gpus in _list_powers(machine.num_gpus):
        fewer.append(dataclasses.replace(machine, num_gpus=num_gpus, num_nodes=1))
    for num_nodes in _list_powers(machine.num_nodes):
        fewer.append(dataclasses.replace(machine, num_nodes=num_nodes))
    return fewer


def _list_powers(limit: int) -> list[int]:
    """Return the powers of two below a number."""
    return [2**power for power in range(limit.bit_length()) if 2**power < limit]


def make_option(plan: Plan) -> MeshOption:
    """Return the line of a plan for a target in the list of what else there is."""
    mesh_plan = plan.mesh
    assert mesh_plan is not None
    return MeshOption(
        target=describe_target(plan.machine),
        method=plan.config.method,
        gradient_checkpointing=plan.config.gradient_checkpointing,
        mesh=mesh_plan.mesh,
        peak_bytes=plan.memory_bytes["peak"],
        has_enough_memory=has_enough_memory(plan),
        tokens_per_second=mesh_plan.step.tokens_per_second,
        missing=mesh_plan.missing,
    )
