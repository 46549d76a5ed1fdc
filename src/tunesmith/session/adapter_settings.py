"""Settings of a plan that an adapter decides, and what `modules_to_save` means for a model.

In: the adapter that training starts from, the recipe, the model's layers. Out: PlanValues, or an
InputError. Left out: reading the adapter (model/hub/adapter_config.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import ModelSpec, Plan, PlanValue, require
from tunesmith.model.hub.adapter_config import AdapterFolder
from tunesmith.model.hub.expert_names import is_target_parameter
from tunesmith.model.hub.spec import read_model_headers
from tunesmith.model.target_modules import (
    SAVED_MODULES_KEY,
    has_only_words,
    list_parameter_names,
    match_saved_parameters,
    select_saved_parameters,
    select_targets,
)
from tunesmith.plan.rules import make_user_value
from tunesmith.recipe.schema import Recipe


def fix_adapter_values(
    adapter: AdapterFolder, recipe: Recipe, model: ModelSpec, layers: Sequence[str]
) -> dict[str, PlanValue]:
    """Return the settings that follow from continuing an adapter. The recipe may name the same
    layers in another way."""
    requested = recipe.lora_target_modules
    target_modules = adapter.target_modules
    adapter_layers = select_targets(layers, target_modules, model.model_type)
    if requested != "auto":
        requested_layers = select_targets(layers, requested, model.model_type)
        target_modules = requested if requested_layers == adapter_layers else target_modules
    values: dict[str, Any] = {
        "adapter_sha256": adapter.sha256,
        "method": "qlora" if recipe.method == "qlora" else "lora",
        "lora_r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_target_modules": target_modules,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "modules_to_save": _name_saved_modules(adapter, recipe, model),
    }
    if adapter.rank_pattern:
        values["rank_pattern"] = dict(adapter.rank_pattern)
    if adapter.alpha_pattern:
        values["alpha_pattern"] = dict(adapter.alpha_pattern)
    settings: dict[str, PlanValue] = {}
    for key, value in values.items():
        settings[key] = PlanValue(value, "checkpoint", "the adapter that training continues")
    reason = "training starts from its weights"
    settings["adapter_from"] = make_user_value(str(adapter.path), reason)
    return settings


def _name_saved_modules(
    adapter: AdapterFolder, recipe: Recipe, model: ModelSpec
) -> tuple[str, ...]:
    """Return the modules that an adapter trains in full, as the recipe names them if it names the
    same."""
    requested = recipe.modules_to_save
    if requested == "auto":
        return adapter.saved_modules
    headers = read_model_headers(model.path)
    parameters = list_parameter_names(headers)
    is_tied = model.tie_word_embeddings
    selected = select_saved_parameters(parameters, requested, is_tied=is_tied)
    if set(selected) == set(adapter.saved_parameters):
        return requested
    return adapter.saved_modules


def count_module_parameters(model: ModelSpec, modules: Sequence[str]) -> int:
    """Count the parameters of modules that are trained in full. Raises InputError for a name that
    the model does not have."""
    if not modules:
        return 0
    headers = read_model_headers(model.path)
    sizes: dict[str, int] = {}
    for name, header in zip(list_parameter_names(headers), headers.values(), strict=True):
        sizes[name] = math.prod(header.shape)
    is_tied = model.tie_word_embeddings
    selected = select_saved_parameters(list(sizes), modules, is_tied=is_tied)
    return sum(sizes[name] for name in selected)


def refuse_expert_settings(plan: Plan, layers: Sequence[str]) -> None:
    """Raise InputError for what a model with experts does not do: full fine-tuning, and dropout or
    DoRA where PEFT adapts weights instead of modules. That can be so without experts, too."""
    config = plan.config
    has_experts = plan.model.num_experts > 0
    if config.method == "full":
        if not has_experts:
            return
        message = f"full does not train the experts of {plan.model.model_type}"
        fix = "use method: lora; lora_target_modules: [attention, experts] adapts the experts too"
        raise InputError(message, where="method", fix=fix)
    model_type = plan.model.model_type
    targets = select_targets(layers, require(config.lora_target_modules), model_type)
    parameters = [
        path for path in targets if is_target_parameter(path, model_type, has_experts=has_experts)
    ]
    for key in ("lora_dropout", "use_dora"):
        if getattr(config, key) and parameters:
            message = f"an adapter of {parameters[0]} has no {key}: PEFT adapts its weight"
            fix = f"leave {key} out, or set lora_target_modules: attention"
            raise InputError(message, where=key, fix=fix)


def refuse_contradicting_modules(plan: Plan, layers: Sequence[str]) -> None:
    """Raise InputError if a linear layer is to be trained in full that the plan quantizes, or that
    lora_target_modules names as well."""
    weights = [f"{path}.weight" for path in layers]
    saved = match_saved_parameters(weights, plan.config.modules_to_save or ())
    if not saved:
        return
    layer = saved[0].removesuffix(".weight")
    if plan.config.method == "qlora":
        message = f"method: qlora keeps {layer} in 4 bits, which cannot be trained in full"
        fix = "use method: lora, or leave linear layers of the decoder out of modules_to_save"
        raise InputError(message, where=SAVED_MODULES_KEY, fix=fix)
    setting = require(plan.config.lora_target_modules)
    targets = select_targets(layers, setting, plan.model.model_type)
    adapted = {f"{path}.weight" for path in targets}
    both = [name for name in saved if name in adapted]
    if both and not has_only_words(setting):
        message = f"{layer} is in lora_target_modules and in modules_to_save"
        fix = "train it in full or with an adapter: take it out of one of them"
        raise InputError(message, where=SAVED_MODULES_KEY, fix=fix)
    if not adapted.difference(saved):
        message = "modules_to_save trains every layer in full that would have an adapter"
        raise InputError(message, where=SAVED_MODULES_KEY, fix="use method: full")
