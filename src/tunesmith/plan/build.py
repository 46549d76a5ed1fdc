"""The plan: every value that a run obeys, by whom and why, and what the run will take.

In: the recipe and the facts (machine, model, data reports). Out: a Plan; nothing else may start a
run. Pure: nothing is read or loaded here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import (
    DataReport,
    Machine,
    ModelSpec,
    Plan,
    PlanValue,
    split_settings,
)
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
from tunesmith.plan.rules import RULES, RuleContext, SavedShareFn, assume_no_savings, rule_value
from tunesmith.plan.rules_cpt import CPT_RULES, SMALL_CORPUS_TOKENS
from tunesmith.recipe.fields import PairLoss
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
    fixed = fixed or {}
    epoch_report = scale_report(data["data"], fixed.get("mixture"))
    settings: dict[str, PlanValue] = {}
    context = RuleContext(
        machine=machine,
        model=model,
        data=epoch_report,
        settings=settings,
        has_schema=recipe_values["response_schema"] is not None,
        max_steps=recipe.max_steps,
        stage=recipe.stage,
        saved_share=saved_share,
        num_eval_prompts=_count_eval_prompts(recipe, data),
        has_evaluation=_has_evaluation(recipe, data),
    )
    _apply_rules(context, recipe_values, fixed)
    settings |= {key: plan_value for key, plan_value in fixed.items() if key not in RULES}
    settings |= decide_constraints(recipe.never, data["data"])
    settings |= decide_guard(recipe.guard, context)
    settings |= decide_rehearsal(recipe.rehearsal, context, data.get("rehearsal"))
    settings |= decide_new_rows(settings.get("add_tokens"), context)
    settings["gradient_checkpointing"] = _decide_activations(context, recipe_values["gradient_checkpointing"])
    settings |= _decide_without_rules(recipe, recipe_values, output_dir, now)
    _check_lengths(context)
    _check_libraries(context)
    config, reasons = split_settings(add_evidence(settings, context))
    return Plan(
        recipe=recipe.model_dump(mode="json"),
        config=config,
        reasons=reasons,
        machine=machine,
        model=model,
        data=dict(data),
        steps=context.steps,
        tokens_per_epoch=epoch_report.tokens,
        memory_bytes=_estimate_step_memory(context),
        warnings=tuple(_collect_warnings(context, data)),
        disk_bytes=_estimate_disk(recipe, context, data),
        phase_bytes=_estimate_phases(context),
        prefix_savings=context.prefix_savings if context["share_prefixes"] else 0.0,
    )


def _apply_rules(
    context: RuleContext, recipe_values: Mapping[str, Any], fixed: Mapping[str, PlanValue]
) -> None:
    """Add a setting for each rule of the stage to `context.settings`, in the order of the rules."""
    settings = context.settings
    rules = CPT_RULES if context.stage == "cpt" else RULES
    for key, apply_rule in rules.items():
        if key in ADAPTER_KEYS and context["method"] == "full":
            continue
        if key in PREFERENCE_KEYS and context.stage != "preference":
            continue
        # settings that only change speed are not keys of the recipe
        recipe_value = recipe_values.get(key, "auto")
        if key in fixed:
            settings[key] = _check_fixed_value(key, recipe_value, fixed[key])
        elif recipe_value == "auto":
            settings[key] = apply_rule(context)
        else:
            settings[key] = PlanValue(recipe_value, "user", "set in the recipe")
        if key in BATCH_SETTINGS and (extended := context.extend_epochs()):
            settings["num_train_epochs"] = extended


def _collect_recipe_values(recipe: Recipe) -> dict[str, Any]:
    """By the keys of the plan: those of the recipe, and of its `loss` each by itself."""
    recipe_values = {key: getattr(recipe, key) for key in KEYS}
    return recipe_values | {
        key: getattr(recipe.loss, name) for key, name in PREFERENCE_KEYS.items()
    }


def _decide_without_rules(
    recipe: Recipe, recipe_values: Mapping[str, Any], output_dir: Path, now: str
) -> dict[str, PlanValue]:
    """What no rule decides."""
    settings = {
        key: _stringify_path(recipe_values[key])
        for key in ("chat_template", "on_overlong", "seed", "stage")
    }
    plan_values = {
        key: PlanValue(value, "user" if _is_set(recipe, key) else "rule", _REASONS[key])
        for key, value in (settings | {"output_dir": str(output_dir)}).items()
    }
    return plan_values | {
        "now": PlanValue(now, "rule", "dates in chat templates are frozen at this moment")
    }


_REASONS = {
    "output_dir": "the run folder",
    "chat_template": "the model's own chat template, unless the recipe names one",
    "on_overlong": "what happens to documents over max_length; always counted",
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


def _check_lengths(context: RuleContext) -> None:
    max_length, pack_length = context["max_length"], context["pack_length"]
    if max_length > context.model.context_length:
        raise InputError(
            f"max_length {max_length:,} exceeds the model's context of "
            f"{context.model.context_length:,} tokens",
            where="max_length",
            fix="lower it, or leave it at auto",
        )
    if pack_length < max_length:
        raise InputError(
            f"pack_length {pack_length:,} is below max_length {max_length:,}",
            where="pack_length",
            fix="raise pack_length or lower max_length: a document must fit in a pack",
        )
    if context.stage == "cpt" and context["batch_tokens"] < max_length:
        raise InputError(
            f"batch_tokens {context['batch_tokens']:,} is below max_length {max_length:,}",
            where="batch_tokens",
            fix="raise batch_tokens or lower max_length: a step takes at least one window",
        )


def _check_libraries(context: RuleContext) -> None:
    if "bitsandbytes" in context.machine.versions:
        return
    for key, value, feature, alternative in BITSANDBYTES_SETTINGS:
        if context[key] == value:
            raise InputError(
                f"{feature} need bitsandbytes, which is not installed",
                where=f"{key}: {value}",
                fix=f"pip install 'tunesmith[qlora]', or use {key}: {alternative}",
            )


@dataclass(frozen=True)
class _PackSizes:
    """Tokens of the largest pack of a step, tokens of the longest row, and packs of the run."""

    step: int
    longest_row: int
    packs: int


def _estimate_packs(context: RuleContext) -> _PackSizes:
    pack_length = context["pack_length"]
    # the two documents of a pair are always in the same pack
    documents_per_row = 2 if context.stage == "preference" else 1
    longest = documents_per_row * context.data.length_percentiles.get("max", 1)
    if context.stage == "cpt":
        step_tokens = context["batch_tokens"]
    else:
        row_tokens = documents_per_row * context.data.length_percentiles.get("p90", 1)
        step_tokens = context["batch_size"] * row_tokens
    if context["share_prefixes"]:
        step_tokens = int(step_tokens * (1 - context.prefix_savings))
    if "rehearsal_length" in context:  # a step has one chunk of rehearsal text, or several
        longest = max(longest, context["rehearsal_length"])
        ratio = MAX_RATIO if "rehearsal_margin" in context else context["rehearsal_ratio"]
        step_tokens = int(step_tokens / (1 - ratio)) + longest
    max_tokens = documents_per_row * pack_length
    return _PackSizes(
        step=min(max(min(pack_length, step_tokens), longest), max_tokens),
        longest_row=min(longest, max_tokens),
        packs=context.steps * math.ceil(step_tokens / pack_length),
    )


def _count_eval_prompts(recipe: Recipe, data: Mapping[str, DataReport]) -> int:
    """Return the number of prompts answered before and after training."""
    return data["test_data"].rows if "test_data" in data and recipe.stage != "cpt" else 0


def _has_evaluation(recipe: Recipe, data: Mapping[str, DataReport]) -> bool:
    return "eval_data" in data or "test_data" in data or recipe.retention_data is not None


def _estimate_step_memory(context: RuleContext) -> dict[str, int]:
    sizes = _estimate_packs(context)
    return _estimate_pack_memory(context, sizes.step, sizes.packs)


def _estimate_pack_memory(context: RuleContext, pack_tokens: int, packs: int) -> dict[str, int]:
    return estimate_memory(
        context.model,
        context.machine,
        has_evaluation=context.has_evaluation,
        pack_tokens=pack_tokens,
        packs=packs,
        layouts=2 if context["weight_layout"] == "blocked" else 1,
        cache_tokens=_estimate_answer_tokens(context),
        **_collect_footprint(context),
    )


def _estimate_answer_tokens(context: RuleContext) -> int:
    return estimate_cache_tokens(
        context.model,
        context.machine,
        num_prompts=context.num_eval_prompts,
        longest=context.data.length_percentiles.get("max", 1),
        answer_share=context.data.supervised_tokens / max(1, context.data.tokens),
        dtype=context["dtype"],
    )


def _estimate_phases(context: RuleContext) -> dict[str, int]:
    sizes = _estimate_packs(context)
    return estimate_phase_bytes(
        _estimate_pack_memory(context, sizes.step, sizes.packs),
        _estimate_pack_memory(context, sizes.longest_row, sizes.packs),
        context.model,
        cache_tokens=_estimate_answer_tokens(context),
        dtype=context["dtype"],
    )


ACTIVATION_POLICIES = {
    "none": "nothing is computed twice",
    "selective": "all of them do not fit: those of the MLP are recomputed in the backward pass",
    "full": "little memory: every layer is recomputed in the backward pass",
}


def _decide_activations(context: RuleContext, recipe_value: str) -> PlanValue:
    """Choose the first policy that fits: whatever is recomputed costs time."""
    if recipe_value != "auto":
        return PlanValue(recipe_value, "user", "set in the recipe")
    free = context.machine.available_bytes
    for policy, reason in ACTIVATION_POLICIES.items():
        context.settings["gradient_checkpointing"] = rule_value(policy, reason)
        needed_bytes = _estimate_step_memory(context)["peak"] * MEMORY_MARGIN
        if needed_bytes <= free or policy == "full":
            memory = f"{needed_bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
            return rule_value(policy, f"{reason}; the run then needs {memory}")
    raise AssertionError("the last policy is always taken")


def _estimate_disk(recipe: Recipe, context: RuleContext, data: Mapping[str, DataReport]) -> int:
    has_selection = "eval_data" in data or "rehearsal_margin" in context
    checkpoints = count_max_checkpoints(
        steps=context.steps,
        save_steps=context["save_steps"],
        eval_steps=context["eval_steps"] if has_selection else None,
    )
    cached_tokens = 0
    # without a base to switch back to, what it computed is kept in a file
    if context["method"] == "full" or "adapter_sha256" in context:
        if recipe.retention_data is not None:
            cached_tokens += GENERAL_TEXT_TOKENS
        if "test_data" in data and context.stage != "cpt":
            cached_tokens += data["test_data"].supervised_tokens
    return estimate_disk_bytes(
        context.model,
        checkpoints=checkpoints,
        cached_tokens=cached_tokens,
        **_collect_footprint(context),
    )


def _collect_footprint(context: RuleContext) -> dict[str, Any]:
    """Return the settings that decide how much memory the weights and their optimizer take."""
    is_full = context["method"] == "full"
    return {
        "method": context["method"],
        "dtype": context["dtype"],
        "optim": context["optim"],
        "gradient_checkpointing": context["gradient_checkpointing"],
        "step_in_backward": context["step_in_backward"],
        "rank": 0 if is_full else context["lora_r"],
        "dora": False if is_full else context["use_dora"],
        "new_rows": count_trained_rows(context.settings),
    }


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
            where=plan.config.output_dir,
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
