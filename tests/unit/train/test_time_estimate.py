"""When a run will be finished: all that it does beside its steps counts, and more of it takes
longer."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import build_sum_rows, make_tiny_recipe, write_rows
from tunesmith.evaluate.adapter_scaling import ADAPTER_SCALES
from tunesmith.session import inputs, planner
from tunesmith.train.time_estimate import LOAD_SECONDS, EvalCostEstimate, add_run_seconds


def load_run_inputs(folder: Path, scratch: Path, **wish: Any) -> inputs.RunInputs:
    held_out = {
        role: str(write_rows(scratch / f"{role}.jsonl", build_sum_rows(50, 6)))
        for role in ("eval_data", "test_data")
    }
    return inputs.load_inputs(make_tiny_recipe(folder, scratch, **held_out | wish))


def estimate_cost(folder: Path, scratch: Path, **wish: Any) -> EvalCostEstimate:
    run_inputs = load_run_inputs(folder, scratch, **wish)
    return EvalCostEstimate(planner.make_plan(run_inputs), run_inputs)


def estimate_seconds(folder: Path, scratch: Path, **wish: Any) -> float:
    run_inputs = load_run_inputs(folder, scratch, **wish)
    plan = dataclasses.replace(planner.make_plan(run_inputs), seconds=(100.0,))
    return add_run_seconds(plan, EvalCostEstimate(plan, run_inputs)).total_seconds


def test_a_run_takes_longer_than_its_steps(tiny_folder: Path, tmp_path: Path) -> None:
    measured = estimate_seconds(tiny_folder, tmp_path)
    alone = estimate_seconds(tiny_folder, tmp_path, test_data=None, eval_data=None)
    assert measured > alone > 100 + LOAD_SECONDS


def test_a_metric_of_the_users_own_is_not_run(tiny_folder: Path, tmp_path: Path) -> None:
    messages = tmp_path / "told"
    custom = tmp_path / "mine.py"
    custom.write_text(
        f"open({str(messages)!r}, 'w').close()\ndef score(answer, expected):\n    return 1.0\n"
    )
    assert estimate_cost(tiny_folder, tmp_path, metrics=[f"{custom}:score"]).count_before() > 0
    assert not messages.exists()


def test_looks_and_probes_count(tiny_folder: Path, tmp_path: Path) -> None:
    few, many = (estimate_seconds(tiny_folder, tmp_path, eval_steps=steps) for steps in (2, 1))
    assert many > few
    item, three = (
        estimate_cost(tiny_folder, tmp_path, guard={"probe_steps": steps}).count_probes()
        for steps in (3, 1)
    )
    assert three == pytest.approx(item * 4 / 2)  # and one before the first step
    assert estimate_cost(tiny_folder, tmp_path).count_probes() == 0
    unguarded = {"collapse": "off", "forgetting": "off", "probe_steps": 1}
    assert estimate_cost(tiny_folder, tmp_path, guard=unguarded).count_probes() == 0


def test_the_base_writes_longer_answers_than_the_trained_model(
    tiny_folder: Path, tmp_path: Path
) -> None:
    actual = estimate_cost(tiny_folder, tmp_path)
    assert actual.count_before() > actual.count_after() > 0
    assert actual.count_scales() == len(ADAPTER_SCALES) * actual.eval_tokens
    assert estimate_cost(tiny_folder, tmp_path, method="full", lora_r="auto").count_scales() == 0
