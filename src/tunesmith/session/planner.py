"""The plan of a run from its inputs.

    make_plan(inputs) -> Plan
    make_planner(inputs) -> a function that plans for any machine and reads the rows once

Left out: opening the inputs (inputs.py), the rules (plan/build.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from tunesmith.core.formatting import format_bytes
from tunesmith.core.mesh import MeshPlan
from tunesmith.core.types import (
    DataReport,
    Document,
    Machine,
    Plan,
    PlanValue,
)
from tunesmith.data.checks.run import check_data
from tunesmith.data.length_stats import iter_documents, render_first_documents
from tunesmith.data.packing import compute_saved_share
from tunesmith.data.pretraining import find_separator
from tunesmith.data.sampler import TaskMixture, permute_rows
from tunesmith.data.tokenizer.added_tokens import (
    refuse_unused_tokens,
)
from tunesmith.model.hub.spec import read_model_headers
from tunesmith.model.target_modules import (
    list_linear_paths,
    select_targets,
)
from tunesmith.plan.build import build_plan
from tunesmith.plan.gpu_time import estimate_gpu_time
from tunesmith.plan.hardware_presets import list_machines, match_preset
from tunesmith.plan.mesh import make_option, select_single_gpu
from tunesmith.plan.mixture import decide_mixture
from tunesmith.plan.new_tokens import decide_new_tokens
from tunesmith.plan.rules import Measures, SavedShareFn, assume_no_savings
from tunesmith.plan.step_memory import has_enough_memory
from tunesmith.recipe.schema import Recipe
from tunesmith.session.adapter_settings import (
    count_module_parameters,
    fix_adapter_values,
    refuse_contradicting_modules,
    refuse_expert_settings,
)
from tunesmith.session.auto_metrics import choose_metrics
from tunesmith.session.input_warnings import list_input_warnings
from tunesmith.session.inputs import RunInputs

NO_PRESET = "none of the presets"
ANY_MESH = {"dp_shard_size": "auto", "context_parallel_size": "auto"}  # of other targets


def make_plan(inputs: RunInputs, inherited: Mapping[str, PlanValue] | None = None) -> Plan:
    return make_planner(inputs, inherited)(inputs.recipe, inputs.machine)


def make_planner(
    inputs: RunInputs, inherited: Mapping[str, PlanValue] | None = None
) -> Callable[[Recipe, Machine], Plan]:
    """Return a function that plans for any machine, reading the rows only once.

    Its recipe may differ in settings that do not change rows or model. `inherited` are settings
    that an earlier stage has decided."""
    layers = list_linear_paths(read_model_headers(inputs.model.path))
    reports = build_data_reports(inputs)
    fixed = _collect_fixed_values(inputs, layers, reports["data"])
    if inherited is None and inputs.adapter is None:  # else an earlier stage has trained them
        refuse_unused_tokens(_iter_documents(inputs), inputs.renderer.tokenizer.new_tokens)
    fixed = {**(inherited or {}), **fixed}
    plan_kwargs = {
        "model": inputs.model,
        "data": reports,
        "output_dir": inputs.output_dir,
        "now": inputs.now.isoformat(),
        "fixed": fixed,
        "measures": Measures(
            saved_share=_make_saved_share(inputs, fixed.get("mixture")),
            count_parameters=partial(count_module_parameters, inputs.model),
            metrics=choose_metrics(inputs, reports["data"].labels),
        ),
    }
    input_warnings = list_input_warnings(inputs)

    def plan_recipe(recipe: Recipe, machine: Machine) -> Plan:
        plan = build_plan(recipe, machine=machine, **plan_kwargs)
        plan = _add_time_estimate(plan)
        if plan.config.lora_target_modules is not None:
            targets = plan.config.lora_target_modules
            select_targets(layers, targets, inputs.model.model_type)  # refuses unknown layers
        refuse_contradicting_modules(plan, layers)
        refuse_expert_settings(plan, layers)
        return dataclasses.replace(
            plan,
            warnings=(*input_warnings, *plan.warnings),
            fits_on="" if has_enough_memory(plan) else find_preset_with_memory(recipe),
            mesh=compare_with_single_gpu(plan, recipe),
        )

    def find_preset_with_memory(recipe: Recipe) -> str:
        recipe = recipe.model_copy(update=ANY_MESH)
        for name, machine in list_machines(inputs.machine).items():
            if has_enough_memory(build_plan(recipe, machine=machine, **plan_kwargs)):
                return f"{name} ({format_bytes(machine.memory_bytes)})"
        return NO_PRESET

    def compare_with_single_gpu(plan: Plan, recipe: Recipe) -> MeshPlan | None:
        if plan.mesh is None or plan.mesh.mesh.num_gpus == 1:
            return plan.mesh
        recipe = recipe.model_copy(update={"method": plan.config.method, **ANY_MESH})
        machine = select_single_gpu(plan.machine)
        alone = _add_time_estimate(build_plan(recipe, machine=machine, **plan_kwargs))
        return dataclasses.replace(plan.mesh, options=(make_option(alone), make_option(plan)))

    return plan_recipe


def build_data_reports(
    inputs: RunInputs, *, needs_all_texts: bool = False
) -> dict[str, DataReport]:
    """Check the data; with `needs_all_texts` all of it, not only what a run needs to know."""
    return check_data(
        inputs.datasets,
        schema=inputs.response_schema,
        corpus=inputs.corpus,
        should_read_all=needs_all_texts,
    )


def _iter_documents(inputs: RunInputs) -> Iterator[Document]:
    corpus = inputs.corpus
    if corpus is None:
        return iter_documents(inputs.datasets["data"])
    return (corpus.read_window(index) for index in range(len(corpus)))


def _add_time_estimate(plan: Plan) -> Plan:
    """Add the published training time of a preset; the speed of this machine is not known yet."""
    preset = match_preset(plan.machine)
    return plan if preset is None else estimate_gpu_time(plan, preset)


def _make_saved_share(inputs: RunInputs, mixture: PlanValue | None) -> SavedShareFn:
    """Return the function that packs rows to find the savings of prefix sharing; it is cached,
    since several rules call it. Windows of texts have no common prefixes."""
    if inputs.corpus is not None:
        return assume_no_savings
    rows = inputs.datasets["data"]
    seed = inputs.recipe.seed
    first_N = (
        permute_rows(seed, 0, len(rows))
        if mixture is None
        else TaskMixture.from_dataset(rows, mixture.value).build_epoch(seed, 0)
    )
    return cache(partial(compute_saved_share, render_first_documents(rows, first_N)))


def _collect_fixed_values(
    inputs: RunInputs, layers: Sequence[str], report: DataReport
) -> dict[str, PlanValue]:
    """Return the settings that are decided before the rules."""
    fixed: dict[str, PlanValue] = {}
    if inputs.adapter is not None:
        fixed |= fix_adapter_values(inputs.adapter, inputs.recipe, inputs.model, layers)
    if inputs.recipe.mixture is not None:
        fixed["mixture"] = decide_mixture(inputs.recipe.mixture, report)
    fixed |= decide_new_tokens(inputs.renderer.tokenizer.new_tokens, inputs.model)
    if inputs.corpus is not None:
        separator = find_separator(inputs.renderer.tokenizer)
        reason = f"ends every text: {separator.reason}"
        fixed["separator"] = PlanValue(separator.text, "checkpoint", reason)
    return fixed


def has_same_layers(inputs: RunInputs, first: Any, second: Any) -> bool:
    """Return whether two values of lora_target_modules name the same layers."""
    layers = list_linear_paths(read_model_headers(inputs.model.path))
    model_type = inputs.model.model_type
    selected = select_targets(layers, first, model_type)
    return selected == select_targets(layers, second, model_type)
