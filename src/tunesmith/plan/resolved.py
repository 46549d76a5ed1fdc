"""The recipe of a run with every value that its plan resolved: what the next run changes one of.

In: a Plan. Out: the values of `resolved.yaml`. Left out: the recipe as the user wrote it, whose
`auto` would be decided again, by the new number of steps (`recipe.yaml`)."""

from __future__ import annotations

from tunesmith.core.json_io import to_jsonable
from tunesmith.core.types import Json, Plan
from tunesmith.plan.build import PREFERENCE_KEYS
from tunesmith.recipe.objectives import SINGLE_LOSS_FIELDS

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
