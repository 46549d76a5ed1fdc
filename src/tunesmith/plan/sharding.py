"""Which processes hold the weights together, and what this version cannot shard.

In: the settings that are decided so far, with a mesh, and the recipe's `dp_shard_size`. Out: this
setting, the size of the groups of processes. A target is sharded where a step does not fit
otherwise (mesh.py); on this machine the recipe says so, since a plan does not depend on how many
processes will run it. Left out: gathering (model/weight_shards.py)."""

from __future__ import annotations

from typing import Literal

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import format_count
from tunesmith.core.types import PlanValue
from tunesmith.plan.rules import RuleContext, make_rule_value, make_user_value

SHARDED_WEIGHTS = "sharded weights"
FIX = "leave dp_shard_size at auto, or leave these settings out"


def decide_shard(context: RuleContext, recipe_value: int | Literal["auto"]) -> PlanValue:
    """Decide how many processes hold the weights once; their layout in memory follows. Raise
    InputError for what cannot be sharded, if the recipe asks for it."""
    size = context.mesh.shard
    if size > 1:
        context.settings.update(adapt_settings(context))
    if recipe_value != "auto":
        _refuse_shard(context, recipe_value)
        return make_user_value(recipe_value)
    reason = "each process holds all weights"
    if size > 1:
        reason = f"a step does not fit otherwise: {size} hold the weights once"
    return make_rule_value(size, reason)


def adapt_settings(context: RuleContext) -> dict[str, PlanValue]:
    """Return the settings that are others where processes hold the weights together."""
    changed = {"weight_layout": make_rule_value("plain", "parts of one buffer, as they are stored")}
    optim = context.settings["optim"]
    if optim.value == "adamw_8bit" and optim.decided_by == "rule":
        reason = "moments in fp32, of which each process has a part"
        changed["optim"] = make_rule_value("adamw", reason)
    return changed


def _refuse_shard(context: RuleContext, size: int) -> None:
    problem = find_shard_problem(context)
    if size > 1 and problem:
        message = f"{problem} cannot be used with {SHARDED_WEIGHTS}"
        raise InputError(message, where=f"dp_shard_size: {size}", fix=FIX)
    num_gpus = context.machine.num_gpus * context.machine.num_nodes
    if context.machine.num_nodes and num_gpus % size:
        gpus = format_count(num_gpus, "GPU")
        raise InputError(
            f"the target has {gpus}, which groups of {size} do not divide",
            where=f"dp_shard_size: {size}",
            fix="set dp_shard_size to a divisor, or leave it at auto",
        )


def find_shard_problem(context: RuleContext) -> str:
    """Return which settings of the plan cannot run with sharded weights; empty if all can."""
    settings = context.settings
    problems: list[str] = []
    if context["method"] == "full" and context["optim"] == "adamw_8bit":
        problems.append("optim: adamw_8bit")
    if context.model.packed_parameters:
        problems.append("experts that the files hold in 4 bits")
    if "modules_to_save" in settings and context["modules_to_save"]:
        problems.append("modules_to_save")
    if "adapter_sha256" in settings:
        problems.append("adapter_from")
    if "rehearsal_tokens" in settings:
        problems.append("rehearsal rows that the model generates")
    return " and ".join(problems)
