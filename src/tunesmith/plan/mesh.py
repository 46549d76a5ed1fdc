"""Which processes hold the weights together, and which share a document.

In: the settings that are decided so far, and `dp_shard_size` and `context_parallel_size` of the
recipe. Out: a Mesh, and the settings that follow. Nothing is searched: each GPU of a target holds
all weights and computes its own documents, unless the recipe says otherwise. Left out: gathering
(model/weight_shards.py), the time (gpu_time.py)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import format_count
from tunesmith.core.mesh import Mesh, MeshOption, MeshPlan
from tunesmith.core.types import Machine, Plan, PlanValue
from tunesmith.plan.hardware_presets import describe_target, match_preset
from tunesmith.plan.rules import RuleContext, make_rule_value, make_user_value
from tunesmith.plan.step_memory import has_enough_memory
from tunesmith.recipe.schema import Recipe

SHARDED_WEIGHTS = "sharded weights"
MIN_STEPS = 100  # fewer make results depend on learning rate and seed


def count_gpus(machine: Machine) -> int:
    """Return the GPUs of a target in all its nodes, else 1."""
    return machine.num_gpus * machine.num_nodes if machine.num_nodes else 1


def choose_mesh(context: RuleContext, recipe: Recipe) -> Mesh:
    """Return the mesh that the recipe asks for on a target's GPUs. Raise InputError for what they
    cannot share or run.

    On this machine, only processes that share documents or weights are planned for: others change
    nothing."""
    shard = 1 if recipe.dp_shard_size == "auto" else recipe.dp_shard_size
    group = 1 if recipe.context_parallel_size == "auto" else recipe.context_parallel_size
    refuse_shared_documents(context, group)
    refuse_shard(context, shard)
    num_gpus = count_gpus(context.machine)
    if not context.machine.num_nodes:
        return Mesh(num_gpus=group * shard, shard=shard, context=group)
    if num_gpus > 1 and context["step_in_backward"]:
        raise InputError(
            "the plan updates each weight in the backward pass, before several GPUs could sum its "
            "gradients",
            where="max_grad_norm: 0",
            fix="set max_grad_norm: 1, which keeps all gradients, or plan for one GPU",
        )
    return Mesh(num_gpus, context.machine.num_nodes, shard, group)


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
    """Return why `size` ranks cannot share a document; empty if they can. Around attention they
    change tokens for heads; recurrent layers read tokens in their order."""
    model = context.model
    if size == 1:
        return ""
    if context.stage == "preference":
        return "the loss of an answer is one number of all its tokens, which one process needs"
    if others := set(model.layer_mixers) - {"attention"}:
        mixers = ", ".join(sorted(others))
        return f"{model.architecture} has layers of {mixers}, which read tokens in their order"
    if model.num_heads % size or model.num_kv_heads % size:
        heads = format_count(model.num_kv_heads, "KV head")
        return f"{model.architecture} has {model.num_heads} query heads and {heads}: not divisible"
    return ""


def refuse_shard(context: RuleContext, size: int) -> None:
    """Raise InputError if `size` GPUs cannot hold the weights together."""
    problem = _find_shard_problem(context)
    if size > 1 and problem:
        raise InputError(
            f"{problem} cannot be used with {SHARDED_WEIGHTS}",
            where=f"dp_shard_size: {size}",
            fix="leave dp_shard_size at auto, or leave these settings out",
        )
    num_gpus = count_gpus(context.machine)
    if context.machine.num_nodes and num_gpus % size:
        raise InputError(
            f"the target has {format_count(num_gpus, 'GPU')}, which groups of {size} do not divide",
            where=f"dp_shard_size: {size}",
            fix="set dp_shard_size to a divisor, or leave it at auto",
        )


def _find_shard_problem(context: RuleContext) -> str:
    """Return which settings of the plan cannot run with sharded weights; empty if all can."""
    problems: list[str] = []
    optim = context.settings["optim"]
    is_fixed = optim.value == "adamw_8bit" and optim.decided_by != "rule"
    if context["method"] == "full" and is_fixed:
        problems.append("optim: adamw_8bit")
    if context.model.packed_parameters:
        problems.append("experts that the files hold in 4 bits")
    # full fine-tuning has no such setting
    if (modules := context.settings.get("modules_to_save")) is not None and modules.value:
        problems.append("modules_to_save")
    if "adapter_sha256" in context:
        problems.append("adapter_from")
    if "rehearsal_tokens" in context:
        problems.append("rehearsal rows that the model generates")
    return " and ".join(problems)


def decide_sharing(context: RuleContext, recipe: Recipe) -> dict[str, PlanValue]:
    """Return the settings of the mesh, and those that are others where processes hold the weights
    together."""
    settings = {
        "context_parallel_size": _decide_size(
            recipe.context_parallel_size, "each process computes its documents alone"
        ),
        "dp_shard_size": _decide_size(recipe.dp_shard_size, "each process holds all weights"),
    }
    if context.mesh.shard > 1:
        reason = "parts of one buffer, as they are stored"
        settings["weight_layout"] = make_rule_value("plain", reason)
        if context["optim"] == "adamw_8bit":
            reason = "moments in fp32, of which each process has a part"
            settings["optim"] = make_rule_value("adamw", reason)
    return settings


def _decide_size(recipe_value: int | Literal["auto"], reason: str) -> PlanValue:
    return make_rule_value(1, reason) if recipe_value == "auto" else make_user_value(recipe_value)


# ---------------------------------------------------------------- what the plan says of it


def describe_mesh(context: RuleContext) -> MeshPlan | None:
    """Return the mesh of a target; None for this machine."""
    is_target = match_preset(context.machine) is not None and context.machine.num_nodes
    return MeshPlan(context.mesh) if is_target else None


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


def select_single_gpu(machine: Machine) -> Machine:
    """Return a target with one GPU in place of all."""
    return dataclasses.replace(machine, num_gpus=1, num_nodes=1)


def make_option(plan: Plan) -> MeshOption:
    """Return the line of a plan in the comparison of one GPU with all."""
    return MeshOption(
        target=describe_target(plan.machine),
        gradient_checkpointing=plan.config.gradient_checkpointing,
        peak_bytes=plan.memory_bytes["peak"],
        has_enough_memory=has_enough_memory(plan),
        seconds=plan.seconds,
    )
