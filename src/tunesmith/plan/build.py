"""The plan: every value that a run obeys, by whom and why, and what the run will take.

In: the recipe and the facts (machine, model, data reports). Out: a Plan; nothing else may start a
run. Pure: nothing is read or loaded here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import DataReport, Machine, ModelSpec, Plan, PlanValue
from tunesmith.plan.confidence import add_evidence
from tunesmith.plan.constraints import decide_constraints
from tunesmith.plan.disk import GENERAL_TEXT_TOKENS, count_max_checkpoints, estimate_disk_bytes
from tunesmith.plan.guard import decide_guard
from tunesmith.plan.memory_budget import (
    estimate_cache_tokens,
    estimate_memory,
    estimate_phase_bytes,
)
from tunesmith.plan.mixture import scale_report
from tunesmith.plan.new_tokens import count_trained_rows, decide_new_rows
from tunesmith.plan.rehearsal import MAX_RATIO, decide_rehearsal
from tunesmith.plan.rules import RULES, RuleContext, SavedShareFn, assume_no_savings
from tunesmith.plan.rules_cpt import CPT_RULES, SMALL_CORPUS_TOKENS
from tunesmith.recipe.mappings import PairLoss
from tunesmith.recipe.schema import KEYS, Recipe

PREFERENCE_KEYS = {
    "loss": "name",
    **{key: key for key in PairLoss.model_fields if key != "name"},
}  # of the plan -> of `loss`
ADAPTER_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "use_rslora",
    "use_dora",
)
BITSANDBYTES_SETTINGS = (
    ("method", "qlora", "4-bit weights", "lora"),
    ("optim", "adamw_8bit", "8-bit moments", "adamw"),
)
MEMORY_MARGIN = 1.15  # a prediction counts as fitting when this much of it is free
BATCH_SETTINGS = (
    "batch_size",
    "batch_tokens",
)  # what a step holds: from then on the steps of a run are known


def build_plan(
    recipe: Recipe,
    *,
    machine: Machine,
    model: ModelSpec,
    data: Mapping[str, DataReport],
    output_dir: Path,
    now: str,
    fixed: Mapping[str, PlanValue] | None = None,
    saved_share: SavedShareFn = assume_no_savings,
) -> Plan:
    """`fixed`: what an adapter to go on with, a mixture or the tokenizer has decided already.
    `saved_share`: of the tokens, when documents share prefixes, by batch_size and pack_length.
    InputError: an impossible wish; MachineError: no room."""
    recipe_values = _collect_recipe_values(recipe)
    has_schema = recipe_values["schema"] is not None
    values: dict[str, Any] = {}
    plan_values: dict[str, PlanValue] = {}
    evaluation = _count_eval_prompts(recipe, data)
    fixed = fixed or {}
    epoch_report = scale_report(data["data"], fixed.get("mixture"))
    context = RuleContext(
        machine,
        model,
        epoch_report,
        values,
        has_schema,
        recipe.max_steps,
        recipe.stage,
        saved_share,
        *evaluation,
    )
    for key, apply_rule in (CPT_RULES if context.stage == "cpt" else RULES).items():
        if key in ADAPTER_KEYS and values.get("method") == "full":
            continue
        if key in PREFERENCE_KEYS and context.stage != "preference":
            continue
        recipe_value = recipe_values.get(key, "auto")  # what changes speed alone is no recipe key
        if key in fixed:
            plan_values[key] = _check_fixed_value(key, recipe_value, fixed[key])
        else:
            plan_values[key] = (
                apply_rule(context)
                if recipe_value == "auto"
                else PlanValue(recipe_value, "you", "the recipe says so")
            )
        values[key] = plan_values[key].value
        if key in BATCH_SETTINGS and (extended := context.extend_epochs()):
            plan_values["num_train_epochs"], values["num_train_epochs"] = extended, extended.value
    plan_values |= {key: plan_value for key, plan_value in fixed.items() if key not in RULES}
    plan_values |= decide_constraints(recipe.never, data["data"]) | decide_guard(
        recipe.guard, context
    )
    values["forgetting_margin"] = plan_values["forgetting_margin"].value
    plan_values |= decide_rehearsal(recipe.rehearsal, context, data.get("rehearsal"))
    plan_values |= decide_new_rows(plan_values.get("add_tokens"), context)
    values["new_rows"] = count_trained_rows(plan_values)
    plan_values["activations"] = _decide_activations(
        context, model, plan_values, recipe_values["activations"]
    )
    values["activations"] = plan_values["activations"].value
    plan_values |= _decide_without_rules(recipe, recipe_values, output_dir, now)
    _check_lengths(values, model)
    _check_libraries(values, machine)
    return Plan(
        recipe=recipe.model_dump(mode="json", by_alias=True),
        choices=add_evidence(plan_values, context),
        machine=machine,
        model=model,
        data=dict(data),
        steps=context.steps,
        tokens_per_epoch=epoch_report.tokens,
        memory_bytes=_estimate_step_memory(context, model, plan_values),
        warnings=tuple(_collect_warnings(context, data)),
        disk_bytes=_estimate_disk(recipe, context, data, plan_values),
        phase_bytes=_estimate_phases(context, model, plan_values),
        prefix_savings=context.prefix_savings if values["share_prefixes"] else 0.0,
    )


def _collect_recipe_values(recipe: Recipe) -> dict[str, Any]:
    """By the keys of the plan: those of the recipe, and of its `loss` each by itself."""
    recipe_values = {KEYS[name]: getattr(recipe, name) for name in KEYS}
    return recipe_values | {
        key: getattr(recipe.loss, name) for key, name in PREFERENCE_KEYS.items()
    }


def _decide_without_rules(
    recipe: Recipe, recipe_values: Mapping[str, Any], output_dir: Path, now: str
) -> dict[str, PlanValue]:
    """What no rule decides."""
    settings = {
        key: _stringify_path(recipe_values[key])
        for key in ("template", "overlong", "seed", "stage")
    }
    plan_values = {
        key: PlanValue(value, "you" if _is_set(recipe, key) else "rule", _REASONS[key])
        for key, value in (settings | {"output_dir": str(output_dir)}).items()
    }
    return plan_values | {
        "now": PlanValue(now, "rule", "dates in chat templates are frozen at this moment")
    }


_REASONS = {
    "output_dir": "the run folder",
    "template": "the model's own chat template, unless the recipe names one",
    "overlong": "what happens to documents over max_length; always counted",
    "seed": "order of rows, start of the adapter, samples",
    "stage": "sft trains on answers, cpt on every token of texts, preference on the difference between two answers",
}


def _check_fixed_value(key: str, recipe_value: Any, fixed: PlanValue) -> PlanValue:
    """What is fixed, unless the recipe wishes for something else."""
    if not is_compatible(recipe_value, fixed.value):
        message = f"{key} is {normalize(recipe_value)} in the recipe, but {normalize(fixed.value)} in the adapter to go on with"
        raise InputError(
            message,
            where=key,
            fix=f"leave {key} out, or leave adapter_from out to start a new adapter",
        )
    return fixed


def is_compatible(recipe_value: Any, value: Any) -> bool:
    """A wish of the recipe, and what is decided already."""
    return recipe_value == "auto" or normalize(recipe_value) == normalize(value)


def normalize(value: Any) -> str:
    """Names in order; 16 and 16.0 are the same."""
    if isinstance(value, tuple):
        return ", ".join(sorted(cast("tuple[str, ...]", value)))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_set(recipe: Recipe, key: str) -> bool:
    return key in recipe.model_fields_set


def _stringify_path(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _check_lengths(values: dict[str, Any], model: ModelSpec) -> None:
    if values["max_length"] > model.context_length:
        raise InputError(
            f"max_length {values['max_length']:,} is over the model's context of {model.context_length:,} tokens",
            where="max_length",
            fix="lower it, or leave it at auto",
        )
    if values["pack_length"] < values["max_length"]:
        raise InputError(
            f"pack_length {values['pack_length']:,} is below max_length {values['max_length']:,}",
            where="pack_length",
            fix="a document must fit in a pack: raise pack_length or lower max_length",
        )

    if values.get("batch_tokens", values["max_length"]) < values["max_length"]:
        raise InputError(
            f"batch_tokens {values['batch_tokens']:,} is below max_length {values['max_length']:,}",
            where="batch_tokens",
            fix="a step takes at least one window: raise batch_tokens or lower max_length",
        )


def _check_libraries(values: dict[str, Any], machine: Machine) -> None:
    if "bitsandbytes" in machine.versions:
        return
    for key, value, feature, alternative in BITSANDBYTES_SETTINGS:
        if values[key] == value:
            fix = f"pip install 'tunesmith[qlora]', or use {key}: {alternative}"
            raise InputError(
                f"{feature} need bitsandbytes, which is not installed",
                where=f"{key}: {value}",
                fix=fix,
            )


def _estimate_packs(
    context: RuleContext, plan_values: Mapping[str, PlanValue]
) -> tuple[int, int, int]:
    """Tokens of the largest pack of a step, and of the longest row; and how many packs there are in
    all."""
    documents_per_row = (
        2 if context.stage == "preference" else 1
    )  # documents of a row, together in a pack
    longest = documents_per_row * context.data.length_percentiles.get("max", 1)
    if context.stage == "cpt":
        step_tokens = context["batch_tokens"]
    else:
        step_tokens = (
            context["batch_size"]
            * documents_per_row
            * context.data.length_percentiles.get("p90", 1)
        )
    if context["share_prefixes"]:
        step_tokens = int(step_tokens * (1 - context.prefix_savings))
    if "rehearsal_length" in plan_values:  # a step may have a piece of a text, or several
        longest = max(longest, plan_values["rehearsal_length"].value)
        ratio = (
            plan_values["rehearsal_ratio"].value
            if "rehearsal_margin" not in plan_values
            else MAX_RATIO
        )
        step_tokens = int(step_tokens / (1 - ratio)) + longest
    max_tokens = documents_per_row * context["pack_length"]
    packs = context.steps * math.ceil(step_tokens / context["pack_length"])
    return (
        min(max(min(context["pack_length"], step_tokens), longest), max_tokens),
        min(longest, max_tokens),
        packs,
    )


def _estimate_step_memory(
    context: RuleContext, model: ModelSpec, plan_values: Mapping[str, PlanValue]
) -> dict[str, int]:
    step, _, packs = _estimate_packs(context, plan_values)
    return _estimate_pack_memory(context, model, step, packs)


def _count_eval_prompts(recipe: Recipe, data: Mapping[str, DataReport]) -> tuple[int, bool]:
    """How many questions are asked before and after, and whether anything is measured then."""
    num_prompts = data["test_data"].rows if "test_data" in data and recipe.stage != "cpt" else 0
    return num_prompts, bool(
        {"eval_data", "test_data"} & data.keys()
    ) or recipe.retention_data is not None


def _estimate_pack_memory(
    context: RuleContext, model: ModelSpec, pack_tokens: int, packs: int
) -> dict[str, int]:
    layouts = 2 if context["weight_layout"] == "blocked" else 1
    sizes = {
        "pack_tokens": pack_tokens,
        "packs": packs,
        "layouts": layouts,
        "cache_tokens": _estimate_answer_tokens(context),
    }
    return estimate_memory(
        model,
        context.machine,
        has_evaluation=context.has_evaluation,
        **sizes,
        **_collect_footprint(context.values),
    )


def _estimate_answer_tokens(context: RuleContext) -> int:
    longest = context.data.length_percentiles.get("max", 1)
    answer_share = context.data.supervised_tokens / max(1, context.data.tokens)
    return estimate_cache_tokens(
        context.model,
        context.machine,
        num_prompts=context.num_eval_prompts,
        longest=longest,
        answer_share=answer_share,
        dtype=context["dtype"],
    )


def _estimate_phases(
    context: RuleContext, model: ModelSpec, plan_values: Mapping[str, PlanValue]
) -> dict[str, int]:
    *tokens, packs = _estimate_packs(context, plan_values)
    step, longest = (
        _estimate_pack_memory(context, model, pack_tokens, packs) for pack_tokens in tokens
    )
    return estimate_phase_bytes(
        step, longest, model, cache_tokens=_estimate_answer_tokens(context), dtype=context["dtype"]
    )


def _decide_activations(
    context: RuleContext, model: ModelSpec, plan_values: Mapping[str, PlanValue], recipe_value: str
) -> PlanValue:
    """All that fit are kept: what is computed anew costs time."""
    if recipe_value != "auto":
        return PlanValue(recipe_value, "you", "the recipe says so")
    free = context.machine.available_bytes
    for policy, reason in ACTIVATION_POLICIES.items():
        context.values["activations"] = policy
        needed_bytes = _estimate_step_memory(context, model, plan_values)["peak"] * MEMORY_MARGIN
        if needed_bytes <= free or policy == "recompute":
            return PlanValue(
                policy,
                "rule",
                f"{reason}; with that, {needed_bytes / 1e9:.1f} GB of {free / 1e9:.1f} free",
            )
    raise AssertionError("the last policy is always taken")


ACTIVATION_POLICIES = {
    "keep": "nothing is computed twice",
    "selective": "all of them do not fit: the MLP's are computed again in the backward",
    "recompute": "little room: layer by layer, all are computed again in the backward",
}


def _estimate_disk(
    recipe: Recipe,
    context: RuleContext,
    data: Mapping[str, DataReport],
    plan_values: Mapping[str, PlanValue],
) -> int:
    has_selection = "eval_data" in data or "rehearsal_margin" in plan_values
    eval_steps = context["eval_steps"] if has_selection else None
    checkpoints = count_max_checkpoints(
        steps=context.steps, save_steps=context["save_steps"], eval_steps=eval_steps
    )
    cached_tokens = 0
    if (
        context["method"] == "full" or "adapter_sha256" in plan_values
    ):  # no switch brings the base back
        cached_tokens += GENERAL_TEXT_TOKENS if recipe.retention_data is not None else 0
        cached_tokens += (
            data["test_data"].supervised_tokens
            if "test_data" in data and context.stage != "cpt"
            else 0
        )
    return estimate_disk_bytes(
        context.model,
        checkpoints=checkpoints,
        cached_tokens=cached_tokens,
        **_collect_footprint(context.values),
    )


SIZE_KEYS = ("method", "dtype", "optim", "activations", "step_in_backward")


def _collect_footprint(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights take."""
    adapter = {"rank": values.get("lora_r", 0), "dora": values.get("use_dora", False)}
    adapter |= {"new_rows": values.get("new_rows", 0)}
    return {key: values[key] for key in SIZE_KEYS} | adapter


def has_enough_memory(plan: Plan) -> bool:
    """Its machine has the memory, and some to spare."""
    return plan.memory_bytes["peak"] * MEMORY_MARGIN <= plan.machine.available_bytes


def refuse_if_too_large(plan: Plan) -> None:
    """Raises MachineError when memory or disk will not do: said before anything is loaded."""
    peak, free = plan.memory_bytes["peak"], plan.machine.available_bytes
    if not has_enough_memory(plan):
        raise MachineError(
            f"the run needs about {peak / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on this machine",
            where="plan",
            fix="lower pack_length or lora_r, use method: qlora, a smaller model, or a machine with more memory"
            + (f": {plan.fits_on} of the table would do" if plan.fits_on else ""),
        )
    if plan.disk_bytes > plan.machine.disk_free_bytes:
        raise MachineError(
            f"the run folder needs up to {plan.disk_bytes:,} bytes, {plan.machine.disk_free_bytes:,} are free",
            where=str(plan["output_dir"]),
            fix="free some room, or set output_dir to another disk",
        )


def _collect_warnings(context: RuleContext, data: Mapping[str, DataReport]) -> list[str]:
    """What the user should know before starting."""
    warnings: list[str] = []
    rate, is_small = context["learning_rate"], context.model.parameters < 1e9
    if is_small and context["method"] != "full":
        advice = (
            "compare two or three"
            if context.stage == "preference"
            else "`tunesmith tune lr` tries five"
        )
        warnings.append(
            f"learning rates below 1B parameters are extrapolations ({rate:g} here): {advice}"
        )
    if context["method"] == "qlora" and context["dtype"] == "fp32":
        warnings.append(
            "4-bit weights are widened to fp32 for products, and embeddings and head take 4 bytes a value"
        )
    if context.steps < 100:
        num_steps = "1 step" if context.steps == 1 else f"{context.steps} steps"
        warnings.append(
            f"only {num_steps}: results depend on the learning rate and the seed more than usual"
        )
    if context.stage == "cpt" and context.data.tokens < SMALL_CORPUS_TOKENS:
        warnings.append(
            f"{context.data.tokens:,} tokens of text: they teach a model how such texts are written, hardly what they say"
            " (EntiGraph 2024: 1.3M tokens made an 8B model's answers worse)"
        )
    if "test_data" not in data:
        warnings.append(
            "no held-out rows: nothing will show whether the run worked; give test_data or eval_split"
        )
    elif data["test_data"].rows < 20:
        warnings.append(
            f"{data['test_data'].rows} test rows: only very large changes can be told from chance"
        )
    for role, report in data.items():
        warnings += [
            f"{role}: {finding.message}" for finding in report.findings if finding.level != "info"
        ]
        num_dropped = sum(report.dropped.values())
        if num_dropped:
            warnings.append(
                f"{role}: {num_dropped:,} of {report.rows:,} rows lose all their documents and keep empty slots"
            )
    return list(dict.fromkeys(warnings))
