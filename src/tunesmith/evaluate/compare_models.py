"""Evaluate models that have no stored results, on the items of a run or a file.

In: a ModelRef (a base model, an adapter, a checkpoint, another adapter scale) and an EvalSpec.
Out: EvalResults, or before/after comparisons. Left out: results that files hold already
(model_ref.py), pairing two models (pairing.py).
"""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path

from tunesmith.core.atomic import verify_dir
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json_object
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
from tunesmith.core.run_dir import find_weights_dir, read_run_plan
from tunesmith.core.types import Plan, PlanValue
from tunesmith.data.constraints import ConstraintSet
from tunesmith.data.dataset import open_dataset
from tunesmith.evaluate.error_analysis import Evaluation, analyze_errors, evaluate_results
from tunesmith.evaluate.items import build_eval_items
from tunesmith.evaluate.measure import measure_items
from tunesmith.evaluate.model_ref import ModelRef
from tunesmith.evaluate.results import EvalResults, compare_results
from tunesmith.model.adapters import get_trainable_parameters, scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.hub.adapter_config import ADAPTER_CONFIG_FILE
from tunesmith.model.save import load_weights
from tunesmith.recipe.fields import DataSource
from tunesmith.recipe.load import rebuild_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner
from tunesmith.session.datasets import get_row_kind
from tunesmith.session.hub_data import fetch_sources
from tunesmith.session.identity import check_checkpoint
from tunesmith.session.inputs import RunInputs
from tunesmith.session.reopen import load_plan_and_inputs, load_trained_model
from tunesmith.session.session import load_starting_model, open_eval_session

# Recipe keys that another model is evaluated with; the others concern training or the run's model.
EVAL_SETTINGS = (
    "data",
    "eval_data",
    "eval_split",
    "test_data",
    "retention_data",
    "never",
    "stage",
    "metrics",
    "response_schema",
    "group",
    "skip_invalid",
    "seed",
    "max_length",
    "pack_length",
    "dtype",
)


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """Rows of `data` and metrics that replace a run's own items; empty keeps the run's. `ranks` in
    lockstep share the items out."""

    data: Path | None = None
    metrics: tuple[str, ...] = ()
    allow_code: bool = False
    ranks: Ranks = SINGLE_PROCESS


def evaluate_model(model_ref: ModelRef, other_ref: ModelRef, spec: EvalSpec) -> EvalResults:
    """Evaluate a model on the items of its own run, of the other model's run, or of the spec."""
    if model_ref.run_dir is not None:
        plan, run_inputs = load_plan_and_inputs(model_ref.run_dir)
        return _evaluate_trained(model_ref, plan, run_inputs, spec)
    plan, run_inputs = _build_plan(_build_recipe(model_ref.name, other_ref.run_dir, spec))
    eval_plan, eval_inputs = _apply_spec(plan, run_inputs, spec)
    return _evaluate(eval_plan, eval_inputs, load_starting_model(plan, run_inputs), spec)


def evaluate_before_after(model_ref: ModelRef, spec: EvalSpec) -> Evaluation:
    """Compare a run, a checkpoint, a scale or an adapter with the model that it started from.

    Raises InputError for a base model, which has no before.
    """
    if model_ref.run_dir is not None:
        plan, run_inputs = load_plan_and_inputs(model_ref.run_dir)
        start = inputs.load_starting_adapter(plan, run_inputs.model.path)
        # One model in memory at a time; the trained one first, which may be missing or changed.
        after = _evaluate_trained(model_ref, plan, run_inputs, spec)
        base_model = load_starting_model(plan, dataclasses.replace(run_inputs, adapter=start))
        eval_plan, eval_inputs = _apply_spec(plan, run_inputs, spec)
        before = _evaluate(eval_plan, eval_inputs, base_model, spec)
        return evaluate_results(before, after, eval_plan, run_inputs)
    if not is_adapter_dir(Path(model_ref.name)):
        fix = "compare it with another model: tunesmith compare A B"
        raise InputError("a base model has no before/after", where=model_ref.name, fix=fix)
    plan, run_inputs = _build_plan(_build_recipe(model_ref.name, None, spec))
    model = load_starting_model(plan, run_inputs)
    eval_plan, eval_inputs = _apply_spec(plan, run_inputs, spec)
    after = _evaluate(eval_plan, eval_inputs, model, spec)
    with scaled_adapter(model.network, 0):
        before = _evaluate(eval_plan, eval_inputs, model, spec)
    errors = analyze_errors(before, after, graded_metrics=eval_plan.config.metrics)
    return Evaluation(compare_results(before, after, step=0), errors)


def is_adapter_dir(path: Path) -> bool:
    """Return whether a folder is an adapter in PEFT format."""
    return (path / ADAPTER_CONFIG_FILE).is_file()


def _build_plan(recipe: Recipe) -> tuple[Plan, RunInputs]:
    run_inputs = inputs.load_inputs(recipe, now=datetime.now(), output_dir=Path("runs"))
    return planner.make_plan(run_inputs), run_inputs


def _evaluate_trained(
    model_ref: ModelRef, plan: Plan, run_inputs: RunInputs, spec: EvalSpec
) -> EvalResults:
    """Evaluate a run's trained model, at a checkpoint or a scale."""
    model = _load_model(model_ref, plan, run_inputs)
    eval_plan, eval_inputs = _apply_spec(plan, run_inputs, spec)
    with scaled_adapter(model.network, model_ref.scale):
        return _evaluate(eval_plan, eval_inputs, model, spec)


def _load_model(model_ref: ModelRef, plan: Plan, run_inputs: RunInputs) -> PackedCausalLM:
    assert model_ref.run_dir is not None
    where = model_ref.name
    checkpoint_dir = model_ref.checkpoint_dir
    if checkpoint_dir is None:
        if plan.config.method == "full" and model_ref.scale != 1:
            fix = "leave the @SCALE out"
            raise InputError("this run has no adapter to scale", where=where, fix=fix)
        return load_trained_model(find_weights_dir(model_ref.run_dir), plan, run_inputs)
    if not checkpoint_dir.is_dir():
        names = sorted(path.name for path in checkpoint_dir.parent.iterdir())
        fix = f"available checkpoints: {', '.join(names) or 'none'}"
        raise InputError("no such checkpoint", where=where, fix=fix)
    if problem := verify_dir(checkpoint_dir):
        message = f"the checkpoint was changed or damaged: {problem}"
        raise InputError(message, where=where, fix="use another checkpoint")
    check_checkpoint(checkpoint_dir, run_inputs.model.path, run_inputs.renderer)
    model = load_starting_model(plan, run_inputs)
    load_weights(checkpoint_dir, get_trainable_parameters(model.network))
    return model


def _build_recipe(name: str, run: Path | None, spec: EvalSpec) -> Recipe:
    """Return a recipe with the items of the run or the spec, and the named model."""
    if run is None and spec.data is None:
        fix = "compare it with a run, or name a file: --data test.jsonl"
        raise InputError("there are no items to evaluate it on", where=name, fix=fix)
    settings: dict[str, object] = {}
    if run is None:
        settings["data"] = str(spec.data)
    else:
        run_recipe = read_run_plan(find_weights_dir(run)).recipe
        for key in EVAL_SETTINGS:
            if run_recipe.get(key) not in (None, "auto", []):
                settings[key] = run_recipe[key]
        settings["model"] = run_recipe.get("model")
    if spec.metrics:
        settings["metrics"] = list(spec.metrics)
    if not is_adapter_dir(Path(name)):
        return rebuild_recipe(settings | {"model": name})
    adapter_config = read_json_object(Path(name) / ADAPTER_CONFIG_FILE)
    base = settings.get("model") or adapter_config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        fix = "compare it with a run of its base model"
        raise InputError("the adapter does not name its base model", where=name, fix=fix)
    return rebuild_recipe(settings | {"model": base, "adapter_from": name})


def _apply_spec(plan: Plan, run_inputs: RunInputs, spec: EvalSpec) -> tuple[Plan, RunInputs]:
    """Replace the run's rows and metrics. Raises InputError with file:line for an invalid row."""
    if spec.metrics:
        plan = plan.with_settings(metrics=PlanValue(spec.metrics, "user", "set by --metrics"))
    if spec.data is None:
        return plan, run_inputs
    rows = open_dataset(
        fetch_sources([DataSource(path=spec.data)], "test_data"),
        run_inputs.renderer,
        row_kind=get_row_kind(run_inputs.recipe),
        constraint_set=ConstraintSet(run_inputs.recipe.never, is_held_out=True),
    )
    for problems in rows.rejected_rows.examples.values():
        for problem in problems:
            raise problem
    datasets = {**run_inputs.datasets, "test_data": rows}
    return plan, dataclasses.replace(run_inputs, datasets=datasets)


def _evaluate(
    plan: Plan, run_inputs: RunInputs, model: PackedCausalLM, spec: EvalSpec
) -> EvalResults:
    items = build_eval_items(plan, run_inputs, allow_code=spec.allow_code)
    if not (items.prompts or items.test_documents or items.general_texts or items.held_out_texts):
        message = "the run has neither test_data nor retention_data"
        fix = "name a file to evaluate on: --data test.jsonl"
        raise InputError(message, where=run_inputs.recipe.model, fix=fix)
    model.ranks = spec.ranks
    return measure_items(open_eval_session(plan, run_inputs, model), items, step=0)
