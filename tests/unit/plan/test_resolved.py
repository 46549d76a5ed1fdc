"""The resolved recipe gives the plan of the run again, and a change of one key changes that one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.types import Plan
from tunesmith.plan.build import build_plan
from tunesmith.plan.resolved import FOLLOWING, resolve_recipe
from tunesmith.plan.rules import RuleContext
from tunesmith.recipe.load import read_recipe

RECIPES: dict[str, dict[str, Any]] = {
    "sft": {"eval_data": "e.jsonl", "test_data": "t.jsonl"},
    "rehearsed": {"rehearsal": {"data": "r.jsonl"}, "retention_data": "g.txt"},
    "max_steps": {"max_steps": 40, "lr_scheduler_type": "warmup_stable_decay"},
    "full": {"method": "full"},
    "cpt": {"stage": "cpt", "lr_scheduler_type": "constant"},
    "dpo": {"stage": "preference"},
    "kto": {"stage": "preference", "loss": "kto"},
    "simpo": {"stage": "preference", "loss": {"name": "simpo", "beta": 3}},
    "adaptive": {"rehearsal": {"data": "r.jsonl", "ratio": "adaptive"}, "retention_data": "g.txt"},
    "a swept run": {"sweep": {"learning_rate": [1e-4, 1e-3]}, "guard": "off"},
}


@pytest.fixture
def make_plan(make_context: Callable[..., RuleContext]) -> Callable[..., Plan]:
    def make(recipe: dict[str, Any], run: str = "runs/a", **facts: Any) -> Plan:
        context = make_context(**{"rows": 336, **facts})
        held_out = dataclasses.replace(context.data, rows=80)
        return build_plan(
            read_recipe({"model": "smollm2", "data": "d.jsonl", **recipe}),  # type: ignore[arg-type]
            machine=context.machine,
            model=context.model,
            data={"data": context.data, "eval_data": held_out, "test_data": held_out},
            output_dir=Path(run),
            now="2026-01-01T00:00:00",
        )

    return make


@pytest.mark.parametrize("name", RECIPES)
def test_a_resolved_recipe_freezes_all_that_the_plan_decided(
    name: str, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(RECIPES[name])
    resolved = resolve_recipe(plan)
    again = make_plan(resolved)
    assert (again.values, again.steps) == (plan.values, plan.steps)
    # on another machine, with rows of other lengths: what was decided stays
    longer = {"p50": 280, "p90": 400, "p99": 500, "max": 690}
    other = make_plan(resolved, available_bytes=10**10, length_percentiles=longer)
    differ = {key for key in plan.values if other.values[key] != plan.values[key]}
    assert differ <= set(FOLLOWING)


@pytest.mark.parametrize("name", ["sft", "dpo", "full", "cpt"])
def test_six_epochs_are_twice_the_steps_of_three(name: str, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan({**RECIPES[name], "num_train_epochs": 3}, rows=336, tokens=98_304)
    resolved = resolve_recipe(plan)
    longer = make_plan(resolved | {"num_train_epochs": 6}, rows=336, tokens=98_304)
    assert longer.steps == 2 * plan.steps
    assert {key for key in plan.values if longer.values[key] != plan.values[key]} == {
        "num_train_epochs"
    }
    assert resolved["guard"]["probe_steps"] == plan.config.probe_steps
    # of the recipe as written, other settings would follow the new number of steps
    rewritten = make_plan({**RECIPES[name], "num_train_epochs": 6}, rows=336, tokens=98_304)
    assert rewritten.values != longer.values
