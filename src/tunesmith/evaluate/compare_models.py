"""Models that no file has measured yet, each by the items of a run or of a file: a base, an
adapter, a checkpoint, an adapter at another scale, another model.

    a Side and a run's items, or `--data FILE` -> a model -> Measured

Left out: what files say already (versus.py), how two are compared (evaluate/paired.py).
"""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path

from tunesmith.core.atomic import verify_dir
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import find_weights_dir, read_run_plan
from tunesmith.core.types import Comparison, Plan, PlanValue
from tunesmith.data.constraints import ConstraintSet
from tunesmith.data.dataset import open_dataset
from tunesmith.evaluate.items import build_eval_items
from tunesmith.evaluate.measure import measure_items
from tunesmith.evaluate.model_ref import ModelRef
from tunesmith.evaluate.results import EvalResults, compare_results
from tunesmith.model.adapters import get_trainable_parameters, scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.hub.adapter_config import ADAPTER_CONFIG_FILE
from tunesmith.model.save import load_weights
from tunesmith.recipe.fields import DataSource
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs
from tunesmith.session.inputs import RunInputs
from tunesmith.session.reopen import load_plan_and_inputs, load_trained_model
from tunesmith.session.session import load_starting_model, open_eval_session

# What another model is asked: the rest of a recipe is about training, or about the model of the
# run.
EVAL_SETTINGS = (
    *(
        "data",
        "eval_data",
        "eval_split",
        "test_data",
        "retention_data",
        "never",
        "stage",
        "metrics",
        "schema",
    ),
    *("skip_bad", "seed", "max_length", "pack_length", "dtype"),
)


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """What is measured instead of a run's own items: the rows of `data`, by these metrics. Nothing:
    as it was."""

    data: Path | None = None
    metrics: tuple[str, ...] = ()
    allow_code: bool = False


def evaluate_model(model_ref: ModelRef, other_ref: ModelRef, spec: EvalSpec) -> EvalResults:
    """A side that no file has measured, on the items of its own run, of the other side's, or of the
    exam."""
    if model_ref.run_dir is not None:
        return _evaluate_trained(model_ref, *load_plan_and_inputs(model_ref.run_dir), spec)
    plan, run_inputs = _build_plan(_build_recipe(model_ref.name, other_ref.run_dir, spec))
    return _measure_model(
        *_apply_spec(plan, run_inputs, spec), load_starting_model(plan, run_inputs), spec
    )


def evaluate_before_after(model_ref: ModelRef, spec: EvalSpec) -> tuple[Comparison, ...]:
    """A run, a checkpoint, a scale or an adapter beside the model that it began with. Raises
    InputError for a model alone, which has none."""
    if model_ref.run_dir is None and not is_adapter_dir(Path(model_ref.name)):
        raise InputError(
            "a model alone has no before",
            where=model_ref.name,
            fix="compare it with another: tunesmith compare",
        )
    if model_ref.run_dir is None:
        plan, run_inputs = _build_plan(_build_recipe(model_ref.name, None, spec))
        model, plan_and_inputs = (
            load_starting_model(plan, run_inputs),
            _apply_spec(plan, run_inputs, spec),
        )
        after = _measure_model(*plan_and_inputs, model, spec)
        with scaled_adapter(model.network, 0):
            return compare_results(_measure_model(*plan_and_inputs, model, spec), after, step=0)
    plan, run_inputs = load_plan_and_inputs(model_ref.run_dir)
    start = inputs.load_starting_adapter(plan, run_inputs.model.path)
    base_model = load_starting_model(plan, dataclasses.replace(run_inputs, adapter=start))
    before = _measure_model(*_apply_spec(plan, run_inputs, spec), base_model, spec)
    del base_model
    return compare_results(
        before, _evaluate_trained(model_ref, plan, run_inputs, spec), step=plan.steps
    )


def _build_plan(recipe: Recipe) -> tuple[Plan, RunInputs]:
    run_inputs = inputs.load_inputs(recipe, now=datetime.now(), output_dir=Path("runs"))
    return inputs.make_plan(run_inputs), run_inputs


def _evaluate_trained(
    model_ref: ModelRef, plan: Plan, run_inputs: RunInputs, spec: EvalSpec
) -> EvalResults:
    """A side of a run: what it has made of the model, at a checkpoint or a scale."""
    model = _load_model(model_ref, plan, run_inputs)
    with scaled_adapter(model.network, model_ref.scale):
        return _measure_model(*_apply_spec(plan, run_inputs, spec), model, spec)


def _load_model(model_ref: ModelRef, plan: Plan, run_inputs: RunInputs) -> PackedCausalLM:
    assert model_ref.run_dir is not None
    if model_ref.checkpoint_dir is None:
        if plan.config.method == "full" and model_ref.scale != 1:
            raise InputError(
                "this run has no adapter to scale", where=model_ref.name, fix="name the run alone"
            )
        return load_trained_model(find_weights_dir(model_ref.run_dir), plan, run_inputs)
    if not model_ref.checkpoint_dir.is_dir():
        available = (
            ", ".join(sorted(path.name for path in model_ref.checkpoint_dir.parent.iterdir()))
            or "none"
        )
        raise InputError(
            "there is no such checkpoint", where=model_ref.name, fix=f"there are: {available}"
        )
    if problem := verify_dir(model_ref.checkpoint_dir):
        raise InputError(
            f"not as the run wrote it: {problem}",
            where=model_ref.name,
            fix="take another checkpoint",
        )
    model = load_starting_model(plan, run_inputs)
    load_weights(model_ref.checkpoint_dir, get_trainable_parameters(model.network))
    return model


def _build_recipe(name: str, run: Path | None, spec: EvalSpec) -> Recipe:
    """A recipe whose items are those of the run or the exam, and whose model is the one that is
    named."""
    if run is None and spec.data is None:
        message = "nothing says what to measure it on"
        raise InputError(
            message, where=name, fix="name a run on the other side, or a file: --data test.jsonl"
        )
    settings: dict[str, object] = {}
    if run is not None:
        run_recipe = read_run_plan(find_weights_dir(run)).recipe
        settings = {
            key: run_recipe[key]
            for key in EVAL_SETTINGS
            if run_recipe.get(key) not in (None, "auto", [])
        }
        settings["model"] = run_recipe["model"]
    else:
        settings["data"] = str(spec.data)
    if spec.metrics:
        settings["metrics"] = list(spec.metrics)
    if not is_adapter_dir(Path(name)):
        return Recipe.model_validate(settings | {"model": name})
    base = settings.get("model") or read_json(Path(name) / ADAPTER_CONFIG_FILE).get(
        "base_model_name_or_path"
    )
    if not base:
        raise InputError(
            "the adapter does not say what its base is",
            where=name,
            fix="compare it with a run of that base",
        )
    return Recipe.model_validate(settings | {"model": base, "adapter_from": name})


def is_adapter_dir(path: Path) -> bool:
    """Whether it is the folder of an adapter, ours or PEFT's."""
    return (path / ADAPTER_CONFIG_FILE).is_file()


def _apply_spec(plan: Plan, run_inputs: RunInputs, spec: EvalSpec) -> tuple[Plan, RunInputs]:
    """With the rows and metrics of the exam. Raises InputError with file:line for a row that cannot
    be used."""
    if spec.metrics:
        choice = PlanValue(spec.metrics, "user", "set by --metrics")
        plan = plan.with_settings(metrics=choice)
    if spec.data is None:
        return plan, run_inputs
    never, pairs = (
        ConstraintSet(run_inputs.recipe.never, is_held_out=True),
        plan.config.stage == "preference",
    )
    rows = open_dataset(
        [DataSource(path=spec.data)], run_inputs.renderer, has_pairs=pairs, constraint_set=never
    )
    if errors := [
        problem for problems in rows.rejected_rows.examples.values() for problem in problems
    ]:
        raise errors[0]
    return plan, dataclasses.replace(
        run_inputs, datasets={**run_inputs.datasets, "test_data": rows}
    )


def _measure_model(
    plan: Plan, run_inputs: RunInputs, model: PackedCausalLM, spec: EvalSpec
) -> EvalResults:
    items = build_eval_items(plan, run_inputs, allow_code=spec.allow_code)
    if not (items.prompts or items.test_documents or items.general_texts or items.held_out_texts):
        fix = "give rows to measure: --data test.jsonl"
        raise InputError(
            "the run has neither test_data nor retention_data",
            where=run_inputs.recipe.model,
            fix=fix,
        )
    return measure_items(open_eval_session(plan, run_inputs, model), items, step=0)
