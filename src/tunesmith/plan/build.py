"""Build the plan: every setting of a run with its reason, and what the run will take.

In: the recipe and the facts (machine, model, data reports). Out: a Plan, without which no run
starts. Left out: reading and loading anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tunesmith.core.errors import DiskError, InputError, MachineError
from tunesmith.core.formatting import format_count
from tunesmith.core.types import (
    DataReport,
    Machine,
    ModelSpec,
    Plan,
    PlanValue,
    split_settings,
)
from tunesmith.plan.confidence import add_evidence
from tunesmith.plan.guard import decide_guard
from tunesmith.plan.hardware_presets import (
    MIN_GPU_TORCH,
    find_missing_for_triton,
    find_old_torch,
)
from tunesmith.plan.memory import (
    GENERAL_TEXT_TOKENS,
    count_max_checkpoints,
    estimate_disk_bytes,
)
from tunesmith.plan.mesh import MIN_STEPS, choose_mesh, decide_sharing, describe_mesh
from tunesmith.plan.mixture import scale_report
from tunesmith.plan.new_tokens import decide_new_rows
from tunesmith.plan.objective import (
    decide_objective,
    decide_scheduler_kwargs,
    refuse_single_answers,
)
from tunesmith.plan.rehearsal import decide_rehearsal
from tunesmith.plan.rules import (
    NO_MEASURES,
    RULES,
    Measures,
    RuleContext,
    make_rule_value,
    make_user_value,
)
from tunesmith.plan.rules_cpt import CPT_RULES, SMALL_CORPUS_TOKENS
from tunesmith.plan.step_memory import (
    MEMORY_MARGIN,
    collect_footprint,
    decide_checkpointing,
    estimate_phases,
    estimate_savings,
    estimate_step_memory,
    has_enough_memory,
)
from tunesmith.plan.unusual import list_unusual
from tunesmith.recipe.fields import Constraint
from tunesmith.recipe.metric_limits import refuse_useless_limits
from tunesmith.recipe.schema import KEYS, Recipe

# key of the plan -> field of `loss` in the recipe
PREFERENCE_KEYS = {
    "loss": "name",
    "beta": "beta",
    "gamma": "gamma",
    "nll_coefficient": "nll_coefficient",
    "desirable_weight": "desirable_weight",
    "undesirable_weight": "undesirable_weight",
}
KTO_KEYS = ("desirable_weight", "undesirable_weight")
ADAPTER_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "use_rslora",
    "use_dora",
    "modules_to_save",
)
BITSANDBYTES_SETTINGS = (
    ("method", "qlora", "4-bit weights", "lora"),
    ("optim", "adamw_8bit", "8-bit moments", "adamw"),
)
BATCH_SETTINGS = ("batch_size", "batch_tokens")  # they fix the steps of a run
BAN_COEFFICIENT = 1.0  # Welleck 2019 weighs unlikelihood as much as cross-entropy
MIN_TEST_ROWS = 20


def build_plan(
    recipe: Recipe,
    *,
    machine: Machine,
    model: ModelSpec,
    data: Mapping[str, DataReport],
    output_dir: Path,
    now: str,
    fixed: Mapping[str, PlanValue] | None = None,
    measures: Measures = NO_MEASURES,
) -> Plan:
    """Build the plan of a recipe.

    `fixed` are settings that a given adapter, a mixture or the tokenizer has already decided.
    `measures` looks at the rows and the model. Raises InputError for settings that contradict each
    other or the model."""
    recipe_values = _collect_recipe_values(recipe)
    fixed = fixed or {}
    epoch_report = scale_report(data["data"], fixed.get("mixture"))
    has_answers = "test_data" in data and recipe.stage != "cpt"  # before and after training
    context = RuleContext(
        machine=machine,
        model=model,
        data=epoch_report,
        settings={},
        max_steps=recipe.max_steps,
        stage=recipe.stage,
        measures=measures,
        num_eval_prompts=data["test_data"].rows if has_answers else 0,
        has_evaluation=bool({"eval_data", "test_data"} & data.keys() or recipe.general_texts),
        has_constraints=bool(recipe.never),
    )
    context = context.with_settings(decide_objective(recipe, context))
    context = _apply_rules(context, recipe_values, fixed)
    _check_gates(context, recipe)
    context = context.with_settings({key: fixed[key] for key in fixed if key not in RULES})
    context = _apply_features(context, recipe, data)
    context = _fit_memory(context, recipe)
    context = context.with_settings(_decide_without_rules(recipe, recipe_values, output_dir, now))
    _check_lengths(context)
    _check_libraries(context)
    config, reasons = split_settings(add_evidence(context.settings, context))
    return Plan(
        recipe=recipe.model_dump(mode="json"),
        config=config,
        reasons=reasons,
        machine=machine,
        model=model,
        data=dict(data),
        steps=context.steps,
        tokens_per_epoch=epoch_report.tokens,
        memory_bytes=estimate_step_memory(context).to_dict(),
        warnings=tuple(_collect_warnings(context, data)),
        disk_bytes=_estimate_disk(recipe, context, data),
        phase_bytes=estimate_phases(context),
        prefix_savings=estimate_savings(context),
        mesh=describe_mesh(context),
    )


def _apply_rules(
    context: RuleContext, recipe_values: Mapping[str, Any], fixed: Mapping[str, PlanValue]
) -> RuleContext:
    """Return the context with a setting for each rule of the stage, in the order of the rules."""
    rules = CPT_RULES if context.stage == "cpt" else RULES
    for key, apply_rule in rules.items():
        if key in ADAPTER_KEYS and context["method"] == "full":
            continue
        if key in PREFERENCE_KEYS and context.stage != "preference":
            continue
        if key in KTO_KEYS and context["loss"] != "kto":
            continue
        # settings that only change speed are not keys of the recipe
        recipe_value = recipe_values.get(key, "auto")
        if key in fixed:
            setting = _check_fixed_value(key, recipe_value, fixed[key])
        elif recipe_value == "auto":
            setting = apply_rule(context)
        else:
            setting = make_user_value(recipe_value)
        context = context.with_settings({key: setting})
        if key in BATCH_SETTINGS and (extended := context.extend_epochs()):
            context = context.with_settings({"num_train_epochs": extended})
    return context.with_settings({"num_train_epochs": context.explain_max_steps()})


def _apply_features(
    context: RuleContext, recipe: Recipe, data: Mapping[str, DataReport]
) -> RuleContext:
    """Return the context with the settings of features that a recipe may ask for, which read those
    of the rules."""
    context = context.with_settings(_decide_constraints(recipe.never, data["data"]))
    scheduler_kwargs = decide_scheduler_kwargs(recipe.lr_scheduler_kwargs, context)
    context = context.with_settings(scheduler_kwargs)
    context = context.with_settings(decide_guard(recipe.guard, context))
    rehearsal = decide_rehearsal(recipe.rehearsal, context, data.get("rehearsal"))
    context = context.with_settings(rehearsal)
    return context.with_settings(decide_new_rows(context.settings.get("add_tokens"), context))


def _fit_memory(context: RuleContext, recipe: Recipe) -> RuleContext:
    """Decide what is recomputed on the GPUs that share weights and documents; return the context
    with that mesh."""
    context = dataclasses.replace(context, mesh=choose_mesh(context, recipe))
    context = context.with_settings(decide_sharing(context, recipe))
    policy = decide_checkpointing(context, recipe.gradient_checkpointing)
    return context.with_settings({"gradient_checkpointing": policy})


def _collect_recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Return the values of the recipe by the keys of the plan; those of `loss` are keys, too."""
    values = {key: getattr(recipe, key) for key in KEYS}
    for key, name in PREFERENCE_KEYS.items():
        values[key] = getattr(recipe.loss, name)
    return values


# settings without a rule, and their reasons
REASONS = {
    "chat_template": "the model's own chat template, unless the recipe names one",
    "on_overlong": "what happens to documents over max_length; they are always counted",
    "seed": "order of rows, initial adapter, sampling",
    "stage": "sft: answers; cpt: every token of texts; preference: one answer over another",
    "output_dir": "the run folder",
}


def _decide_without_rules(
    recipe: Recipe, recipe_values: Mapping[str, Any], output_dir: Path, now: str
) -> dict[str, PlanValue]:
    values = {key: recipe_values.get(key) for key in REASONS} | {"output_dir": str(output_dir)}
    settings: dict[str, PlanValue] = {}
    for key, value in values.items():
        decided_by = "user" if key in recipe.model_fields_set else "rule"
        value = str(value) if isinstance(value, Path) else value
        settings[key] = PlanValue(value, decided_by, REASONS[key])
    settings["now"] = make_rule_value(now, "the date that chat templates see, frozen")
    return settings


def _decide_constraints(
    constraints: Sequence[Constraint], report: DataReport
) -> dict[str, PlanValue]:
    """Return what happens to rows that break a constraint, and how strongly bans are trained."""
    settings: dict[str, PlanValue] = {}
    if constraints:
        effects: list[str] = []
        for name, count in report.filtered.items():
            effects.append(f"{format_count(count, 'row')} left out for {name!r}")
        for name, count in report.banned.items():
            effects.append(f"{format_count(count, 'row')} trained away from {name!r}")
        if any(constraint.mode == "pair" for constraint in constraints):
            effects.append(
                "rows without a rejected answer get the base model's answer if it breaks one"
            )
        modes = tuple(f"{constraint.name} ({constraint.mode})" for constraint in constraints)
        reason = "; ".join(effects) or "no row breaks a constraint"
        settings["never"] = make_user_value(modes, reason)
    if report.banned:
        reason = "bad tokens weigh as much as good ones on average; the gradient is bounded"
        settings["ban_coefficient"] = make_rule_value(BAN_COEFFICIENT, reason, "Welleck 2019")
    return settings


def _check_fixed_value(key: str, recipe_value: Any, fixed: PlanValue) -> PlanValue:
    """Return the fixed value. Raises InputError if the recipe sets another one."""
    if not is_compatible(recipe_value, fixed.value):
        raise InputError(
            f"{key} is {normalize(recipe_value)} in the recipe and {normalize(fixed.value)} in the "
            "adapter that training continues",
            where=key,
            fix=f"leave {key} out, or leave adapter_from out to start a new adapter",
        )
    return fixed


def is_compatible(recipe_value: Any, value: Any) -> bool:
    """Return whether the recipe leaves a setting open, or sets it to `value`."""
    return recipe_value == "auto" or normalize(recipe_value) == normalize(value)


def normalize(value: Any) -> str:
    """Return a value as text: names sorted, and 16.0 like 16."""
    if isinstance(value, tuple):
        return ", ".join(sorted(cast("tuple[str, ...]", value)))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_lengths(context: RuleContext) -> None:
    max_length = context["max_length"]
    pack_length = context["pack_length"]
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
            fix="raise batch_tokens or lower max_length: a step must hold at least one window",
        )
    refuse_single_answers(context)


def _check_gates(context: RuleContext, recipe: Recipe) -> None:
    refuse_useless_limits(
        recipe.gates,
        stage=recipe.stage,
        metrics=context["metrics"],
        constraints=[constraint.name for constraint in recipe.never],
    )


def _check_libraries(context: RuleContext) -> None:
    if "bitsandbytes" in context.machine.versions:
        return
    for key, value, feature, alternative in BITSANDBYTES_SETTINGS:
        if context[key] == value:
            raise InputError(
                f"{feature} need bitsandbytes, which is not installed",
                where=f"{key}: {value}",
                fix=f"pip install '.[qlora]' in tunesmith's folder, or use {key}: {alternative}",
            )


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
        if recipe.general_texts is not None:
            cached_tokens += GENERAL_TEXT_TOKENS
        if "test_data" in data and context.stage != "cpt":
            cached_tokens += data["test_data"].supervised_tokens
    return estimate_disk_bytes(
        context.model,
        collect_footprint(context),
        checkpoints=checkpoints,
        cached_tokens=cached_tokens,
    )


def refuse_if_too_large(plan: Plan) -> None:
    """Raise MachineError if memory is too small, and DiskError if the disk is, before anything is
    loaded."""
    needed = plan.memory_bytes["peak"] * MEMORY_MARGIN
    free = plan.machine.available_bytes
    if not has_enough_memory(plan):
        larger = f", such as {plan.fits_on}" if plan.fits_on else ""
        if plan.machine.num_gpus > 1 and plan.config.dp_shard_size == 1:
            larger += "; more GPUs help if they hold the weights together: --dp-shard-size"
        raise MachineError(
            f"the run needs about {needed / 1e9:.1f} GB of memory with a margin of "
            f"{MEMORY_MARGIN - 1:.0%}, but {free / 1e9:.1f} GB are free",
            where="plan",
            fix="lower pack_length or lora_r, use method: qlora, a smaller model, or a machine "
            f"with more memory{larger}",
        )
    if plan.disk_bytes > plan.machine.disk_free_bytes:
        raise DiskError(
            f"the run folder needs up to {plan.disk_bytes:,} bytes, but "
            f"{plan.machine.disk_free_bytes:,} are free",
            where=plan.config.output_dir,
            fix="free some disk space, or set output_dir to another disk",
        )


def _collect_warnings(context: RuleContext, data: Mapping[str, DataReport]) -> list[str]:
    warnings = list(list_unusual(context))
    is_rate_by_rule = context.settings["learning_rate"].decided_by != "user"
    if is_rate_by_rule and context.model.parameters < 1e9 and context["method"] != "full":
        advice = "`tunesmith tune lr` tries five"
        if context.stage == "preference":
            advice = "compare two or three"
        warnings.append(
            f"learning rates below 1B parameters are extrapolated ({context['learning_rate']:g} "
            f"here): {advice}"
        )
    if context["method"] == "qlora" and context["dtype"] == "fp32":
        warnings.append(
            "4-bit weights are dequantized to fp32 for matmuls, and embeddings and head take 4 "
            "bytes per value"
        )
    if context["dtype"] == "bf16" and not context.machine.has_bf16_matmul:
        name = context.machine.device_name
        warnings.append(f"{name} has no bf16: torch emulates it, slower than fp32")
    warnings += _collect_gpu_warnings(context)
    warnings += _collect_fp16_warnings(context)
    if context.machine.device == "cpu" and context.model.num_experts:
        warnings.append(_describe_experts_on_cpu(context.model))
    if context.steps < MIN_STEPS:
        warnings.append(
            f"only {format_count(context.steps, 'step')}: results depend on the learning rate and "
            "the seed more than usual"
        )
    if context.stage == "cpt" and context.data.tokens < SMALL_CORPUS_TOKENS:
        warnings.append(
            f"{context.data.tokens:,} tokens of text teach a model the style of such texts, but "
            "little of their content (EntiGraph 2024: 1.3M tokens made an 8B model's answers worse)"
        )
    warnings += _collect_data_warnings(data)
    return list(dict.fromkeys(warnings))


def _list_software_warnings(machine: Machine) -> list[str]:
    """Say what the software of a GPU lacks."""
    warnings: list[str] = []
    if machine.gpu_software.startswith("ROCm"):
        warnings.append(f"{machine.gpu_software}: tunesmith has not been tried on AMD GPUs")
    if old_torch := find_old_torch(machine):
        warnings.append(
            f"torch {old_torch}: on a GPU, tunesmith needs {MIN_GPU_TORCH} or newer, whose flash "
            "attention it calls directly"
        )
    if missing := find_missing_for_triton(machine):
        warnings.append(
            "norms, rotations, MLPs and losses run in plain torch, with a quarter more activations "
            f"and three times the traffic: the kernels for GPUs need {missing}"
        )
    return warnings


def _collect_gpu_warnings(context: RuleContext) -> list[str]:
    """Say when a GPU is not used, or is used in a way that it does not support."""
    machine = context.machine
    warnings: list[str] = []
    if machine.unused_gpu:
        warnings.append(f"{machine.unused_gpu} (`tunesmith doctor` says what to do)")
    if machine.device != "cuda":
        return warnings
    warnings += _list_software_warnings(machine)
    if context["attention"] == "varlen":
        problem = ""
        if context["dtype"] == "fp32":
            problem = "runs in 16 bits only, but dtype is fp32"
        elif not machine.has_flash_attention:
            problem = f"is flash attention, which {machine.device_name} does not have"
        if problem:
            fix = "leave attention at auto, or use sdpa"
            raise InputError(f"attention: varlen {problem}", where="attention", fix=fix)
    return warnings


def _collect_fp16_warnings(context: RuleContext) -> list[str]:
    """Say what fp16 does not go well with. Its gradients are scaled, so all of them must be finite
    before the first weight is updated."""
    if context["dtype"] != "fp16":
        return []
    if context["step_in_backward"]:
        raise InputError(
            "step_in_backward updates weights before all gradients are known to be finite, but "
            "fp16 gradients sometimes overflow",
            where="step_in_backward",
            fix="leave step_in_backward at auto, or use dtype: bf16 or fp32",
        )
    machine = context.machine
    if machine.device == "cpu":
        return ["dtype: fp16 is for GPUs without bf16: on a CPU it is slower than fp32"]
    if machine.has_bf16_matmul:
        return [f"{machine.device_name} has bf16, which is as fast as fp16 and does not overflow"]
    return []


def _describe_experts_on_cpu(model: ModelSpec) -> str:
    """Say what a CPU does with experts."""
    share = model.active_parameters / model.block_parameters
    return (
        f"each token uses {model.num_experts_per_token} of {model.num_experts} experts "
        f"({share:.0%} of the layers' parameters), but a pack uses all of them, so steps are slow "
        "on a CPU"
    )


def _collect_data_warnings(data: Mapping[str, DataReport]) -> list[str]:
    warnings: list[str] = []
    if "test_data" not in data and "eval_data" in data:
        warnings.append(
            "test_data: none: before and after are measured on eval_data, which also chooses the "
            "checkpoint, so they are not an unbiased result"
        )
    elif "test_data" not in data:
        warnings.append(
            "no held-out rows, so nothing will show whether the run worked; set test_data or "
            "eval_split"
        )
    elif data["test_data"].rows < MIN_TEST_ROWS:
        test_rows = format_count(data["test_data"].rows, "test row")
        warnings.append(f"{test_rows}: only very large differences will be significant")
    for role, report in data.items():
        for finding in report.findings:
            if finding.level != "info":
                warnings.append(f"{role}: {finding.message}")
        for name, count in report.filtered.items():
            if count:
                rows = format_count(count, "row")
                warnings.append(f"{role}: {rows} left out by never: {name!r}; see rejected.jsonl")
        if num_dropped := sum(report.dropped.values()):
            warnings.append(
                f"{role}: {num_dropped:,} of {report.rows:,} rows lose all their documents and "
                "leave empty slots in their batches"
            )
    return warnings
