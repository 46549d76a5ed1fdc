"""Load what a recipe names, and read plans, for the functions of the API.

In: a recipe, or inputs that were loaded before. Out: one RunInputs, or a tuple of one per stage.
Left out: what is done with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core import run_dir
from tunesmith.core.json_io import parse_as
from tunesmith.core.types import Plan
from tunesmith.plan.stages import StagedPlan

if TYPE_CHECKING:
    from tunesmith.recipe.load import RecipeLike
    from tunesmith.recipe.schema import Recipe, Stages
    from tunesmith.session.inputs import RunInputs

    AnyInputs = RunInputs | tuple[RunInputs, ...]  # one per stage

AnyPath = str | Path


def read_recipe(recipe: RecipeLike = None, **changes: Any) -> Recipe | Stages:
    """Read a recipe from a file or a mapping, with changed values."""
    from tunesmith.recipe import load

    return load.read_recipe(recipe, **changes)


def load_inputs(
    recipe: RecipeLike | AnyInputs = None, *, needs_weights: bool = True, **changes: Any
) -> AnyInputs:
    """Load the model spec, machine and data sets of a recipe, once per stage.

    The result can be passed to the functions below instead of a recipe, which saves reading the
    data again. Without `needs_weights` a folder with only a config.json is accepted as the model,
    which is enough to plan."""
    from tunesmith.recipe.schema import Recipe, Stages
    from tunesmith.session import inputs

    if isinstance(recipe, (inputs.RunInputs, tuple)) and not changes:
        return recipe
    if isinstance(recipe, inputs.RunInputs):
        recipe = recipe.recipe
    elif isinstance(recipe, tuple):
        recipe = Stages(tuple(stage_inputs.recipe for stage_inputs in recipe))
    loaded_recipe = read_recipe(recipe, **changes)
    if isinstance(loaded_recipe, Recipe):
        return inputs.load_inputs(loaded_recipe, needs_weights=needs_weights)
    from tunesmith.train import stages

    return stages.load_stage_inputs(loaded_recipe, weights=needs_weights)


def load_demo_inputs(output_dir: AnyPath | None = None) -> AnyInputs:
    """Load the inputs of the embedded example."""
    from tunesmith.recipe.demo import DEMO_RECIPE

    output_dir = output_dir or run_dir.pick_run_folder(Path("runs"), "demo")
    return load_inputs(DEMO_RECIPE, output_dir=str(output_dir))


def split_by_stage(inputs: AnyInputs) -> dict[str, RunInputs]:
    """Map the name of each stage's folder to its inputs; a single stage has the name ""."""
    return {s.output_dir.name: s for s in inputs} if isinstance(inputs, tuple) else {"": inputs}


def read_plan(path: AnyPath) -> Plan | StagedPlan:
    """Read the plan of a run folder, or a file written by `tunesmith plan --json`."""
    file = Path(path)
    if not file.is_file():
        run_dir.require_run(file)
        file = file / (run_dir.STAGES_FILE if run_dir.is_staged(file) else run_dir.PLAN_FILE)
    content = run_dir.read_plan_json(file)
    return parse_as(StagedPlan if "plans" in content else Plan, content, where=str(file))
