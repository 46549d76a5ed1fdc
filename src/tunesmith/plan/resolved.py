"""The recipe of a run with every value that its plan resolved, what the next run changes one of;
and what that run takes.

In: a Plan or RunRecord. Out: the values of `resolved.yaml`; steps and seconds. Left out: the recipe
as written, whose `auto` would be decided again, by the new number of steps (`recipe.yaml`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tunesmith.core.formatting import format_count, format_duration
from tunesmith.core.json_io import to_jsonable
from tunesmith.core.types import Json, Plan, RunRecord
from tunesmith.plan.build import PREFERENCE_KEYS
from tunesmith.recipe.objectives import SINGLE_LOSS_FIELDS
from tunesmith.recipe.schema import SOURCE_KEYS

GUARD_KEYS = {
    "collapse": "guard_collapse",
    "forgetting": "guard_forgetting",
    "margin": "forgetting_margin",
    "patience": "patience",
    "probe_steps": "probe_steps",
}
# What a plan decides anew: the run folder and the date of a run; and what is no key, but follows
# from other settings, the number of steps, or the memory that is free.
FOLLOWING = (
    *("output_dir", "now", "probe_prompts", "rehearsal_tokens", "lr_scheduler_kwargs"),
    *("step_in_backward", "weight_layout", "new_rows_lr_factor"),
)


def resolve_recipe(plan: Plan) -> Json:
    """Return the recipe of a plan with its values in place of `auto`, in all but FOLLOWING.

    A sweep is left out: its winner has been chosen."""
    values = {key: value for key, value in plan.values.items() if value not in (None, ())}
    recipe: Json = {**plan.recipe, "sweep": None}
    recipe |= _fill(recipe, {key: values[key] for key in values if key not in FOLLOWING})
    guard = {name: values[key] for name, key in GUARD_KEYS.items() if key in values}
    pairs = {name: values[key] for key, name in PREFERENCE_KEYS.items() if key in values}
    for name, owner in SINGLE_LOSS_FIELDS.items():
        if pairs.get("name") != owner:
            pairs.pop(name, None)  # without effect in this loss
    ratio = {"ratio": values["rehearsal_ratio"]} if "rehearsal_ratio" in values else {}
    for key, fields in (("guard", guard), ("loss", pairs), ("rehearsal", ratio)):
        if recipe.get(key):
            recipe[key] = {**recipe[key], **_fill(recipe[key], fields)}
    return recipe


def _fill(mapping: Json, values: Json) -> Json:
    """Return the values of the keys that are `auto` in a mapping."""
    return {key: to_jsonable(values[key]) for key in values if mapping.get(key) == "auto"}


def identify_run(plan: Plan, *free: str) -> Json:
    """Return what runs have in common that differ in these keys alone: model, files, settings."""
    files = {role: report.fingerprint for role, report in plan.data.items()}
    free = (*free, *SOURCE_KEYS, "output_dir")
    settings = {key: value for key, value in resolve_recipe(plan).items() if key not in free}
    return {**settings, "model": plan.model.name, "files": files}


def count_steps(plan: Plan, changes: Mapping[str, Any]) -> int:
    """Return the steps of a plan with some settings changed, as plan/rules.py counts them."""
    config = plan.config
    max_steps = changes.get("max_steps", plan.recipe.get("max_steps"))
    epochs = changes.get("num_train_epochs", config.num_train_epochs)
    if config.batch_tokens:
        steps = max(1, math.ceil(plan.tokens_per_epoch * epochs / config.batch_tokens))
    else:
        batch_size = changes.get("batch_size", config.batch_size) or 1
        steps = math.ceil(max(1, round(plan.rows_per_epoch * epochs)) / batch_size)
    return max_steps or steps


def estimate_seconds(record: RunRecord, changes: Mapping[str, Any]) -> float | None:
    """Return how long a run would take with some settings changed: its own seconds a step, in
    proportion to the rows of a step, and what it took beside the steps."""
    if not record.steps:
        return None
    seconds = record.train_seconds / record.steps * count_steps(record.plan, changes)
    batch_size = record.plan.config.batch_size or 1
    seconds *= changes.get("batch_size", batch_size) / batch_size
    return seconds + max(0.0, record.total_seconds - record.train_seconds)


def describe_training(steps: int, seconds: float | None) -> str:
    time = "" if seconds is None else f", about {format_duration(seconds)}"
    return f"{format_count(steps, 'step')}{time}"
