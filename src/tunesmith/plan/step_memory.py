"""The memory of a step, of the run's phases, and what is recomputed in the backward pass.

In: the settings that are decided so far (RuleContext), and the mesh of GPUs. Out: bytes by
component, of one device. Left out: the components themselves (memory.py) and disk
(build.py)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from tunesmith.core.types import Plan, PlanValue
from tunesmith.plan.hardware_presets import find_missing_for_triton
from tunesmith.plan.memory import (
    CacheSize,
    Footprint,
    MemoryParts,
    estimate_cache,
    estimate_gpu_memory,
    estimate_peak_memory,
    estimate_phase_bytes,
    needs_complete_answers,
)
from tunesmith.plan.new_tokens import count_trained_rows
from tunesmith.plan.rehearsal import MAX_RATIO
from tunesmith.plan.rules import RuleContext, make_rule_value, make_user_value

MEMORY_MARGIN = 1.15  # a run fits if this much of its predicted memory is free
MARGIN_NOTE = f"{MEMORY_MARGIN - 1:.0%} margin included"  # beside what must be free, not the peak


@dataclass(frozen=True)
class PackSizes:
    """Tokens of the largest pack of a step, tokens of the longest row, and packs of the run; on
    several GPUs those of one."""

    step: int
    longest_row: int
    packs: int


def estimate_packs(context: RuleContext) -> PackSizes:
    pack_length = context["pack_length"]
    documents_per_row = context.documents_per_row
    longest = context.longest_row
    step_tokens = estimate_step_tokens(context)
    if "rehearsal_length" in context:  # a step has one chunk of rehearsal text, or several
        longest = max(longest, context["rehearsal_length"])
    step_tokens = math.ceil(step_tokens / context.mesh.document_groups)
    # the two documents of a pair are always in the same pack
    max_tokens = documents_per_row * pack_length
    step = min(max(min(pack_length, step_tokens), longest), max_tokens)
    return PackSizes(
        step=math.ceil(step / context.mesh.context),
        longest_row=math.ceil(min(longest, max_tokens) / context.mesh.context),
        packs=context.steps * math.ceil(step_tokens / pack_length),
    )


def estimate_step_tokens(context: RuleContext) -> int:
    """Return the tokens of a step with long rows, on all GPUs together."""
    if context.stage == "cpt":
        step_tokens = context["batch_tokens"]
    else:
        row_tokens = context.documents_per_row * context.data.length_percentiles.get("p90", 1)
        step_tokens = context["batch_size"] * row_tokens
    step_tokens = int(step_tokens * (1 - estimate_savings(context)))
    if "rehearsal_length" in context:
        longest = max(context.longest_row, context["rehearsal_length"])
        ratio = MAX_RATIO if "rehearsal_margin" in context else context["rehearsal_ratio"]
        step_tokens = int(step_tokens / (1 - ratio)) + longest
    return step_tokens


def estimate_savings(context: RuleContext) -> float:
    """Return the share of tokens that prefix sharing saves: each group of GPUs has fewer rows to
    share with."""
    if not context["share_prefixes"]:
        return 0.0
    rows = max(1, context["batch_size"] // context.mesh.document_groups)
    return context.measures.saved_share(rows, context["pack_length"])


def estimate_step_memory(context: RuleContext) -> MemoryParts:
    sizes = estimate_packs(context)
    return _estimate_pack_memory(context, sizes.step, sizes.packs)


def _estimate_pack_memory(context: RuleContext, pack_tokens: int, packs: int) -> MemoryParts:
    cache = _estimate_answer_cache(context)
    run = collect_footprint(context)
    machine = context.machine
    if machine.device == "cuda":
        return estimate_gpu_memory(
            context.model,
            run,
            pack_tokens=pack_tokens,
            cache=cache,
            has_triton=not find_missing_for_triton(machine),
            mesh=context.mesh,
        )
    return estimate_peak_memory(
        context.model,
        run,
        pack_tokens=pack_tokens,
        packs=packs,
        layouts=2 if context["weight_layout"] == "blocked" else 1,
        has_evaluation=context.has_evaluation,
        cache=cache,
    )


def _estimate_answer_cache(context: RuleContext) -> CacheSize:
    return estimate_cache(
        context.model,
        context.machine,
        num_prompts=context.num_eval_prompts,
        longest=context.data.length_percentiles.get("max", 1),
        answer_share=context.data.supervised_tokens / max(1, context.data.tokens),
        needs_end=needs_complete_answers(
            context["metrics"], has_constraints=context.has_constraints
        ),
        dtype=context["dtype"],
    )


def estimate_phases(context: RuleContext) -> dict[str, int]:
    sizes = estimate_packs(context)
    return estimate_phase_bytes(
        _estimate_pack_memory(context, sizes.step, sizes.packs),
        _estimate_pack_memory(context, sizes.longest_row, sizes.packs),
        context.model,
        cache=_estimate_answer_cache(context),
        dtype=context["dtype"],
    )


CHECKPOINTING_POLICIES = {
    "none": "all activations fit, nothing is recomputed",
    "selective": "not all activations fit: those of the MLPs are recomputed in the backward pass",
    "full": "little memory: every layer is recomputed in the backward pass",
}


def decide_checkpointing(context: RuleContext, recipe_value: str) -> PlanValue:
    """Choose the first policy that fits, since recomputing costs time."""
    if recipe_value != "auto":
        return make_user_value(recipe_value)
    free = context.machine.available_bytes
    for policy, reason in CHECKPOINTING_POLICIES.items():
        decision = {"gradient_checkpointing": make_rule_value(policy, reason)}
        needed_bytes = estimate_step_memory(context.with_settings(decision)).peak * MEMORY_MARGIN
        if needed_bytes <= free or policy == "full":
            memory = f"{needed_bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
            where = " on each GPU" if context.mesh.num_gpus > 1 else ""
            text = f"{reason}; the run then needs {memory}{where}, {MARGIN_NOTE}"
            return make_rule_value(policy, text)
    raise AssertionError("the last policy is always taken")


def has_enough_memory(plan: Plan) -> bool:
    """Return whether the run fits in the free memory of its machine, with a margin."""
    return plan.memory_bytes["peak"] * MEMORY_MARGIN <= plan.machine.available_bytes


def collect_footprint(context: RuleContext) -> Footprint:
    """Return the settings that decide how much memory the weights and their optimizer take."""
    run = Footprint(
        method=context["method"],
        dtype=context["dtype"],
        optim=context["optim"],
        gradient_checkpointing=context["gradient_checkpointing"],
        step_in_backward=context["step_in_backward"],
        new_rows=count_trained_rows(context.settings),
    )
    if run.method == "full":
        return run
    return dataclasses.replace(
        run,
        rank=context["lora_r"],
        targets=context["lora_target_modules"],
        use_dora=context["use_dora"],
        module_parameters=context.measures.count_parameters(context["modules_to_save"]),
    )
