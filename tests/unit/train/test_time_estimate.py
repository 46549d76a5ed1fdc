"""When a run will be finished: all that it does beside its steps counts, and more of it takes
longer."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import recipe, sums, write_rows
from tunesmith.evaluate.adapter_scaling import ADAPTER_SCALES
from tunesmith.session import inputs
from tunesmith.train.time_estimate import LOAD_SECONDS, EvalCostEstimate, add_run_seconds


def gathered(folder: Path, scratch: Path, **wish: Any) -> inputs.RunInputs:
    held_out = {
        role: str(write_rows(scratch / f"{role}.jsonl", sums(50, 6)))
        for role in ("eval_data", "test_data")
    }
    return inputs.load_inputs(recipe(folder, scratch, **held_out | wish))


def beside(folder: Path, scratch: Path, **wish: Any) -> EvalCostEstimate:
    known = gathered(folder, scratch, **wish)
    return EvalCostEstimate(inputs.make_plan(known), known)


def whole(folder: Path, scratch: Path, **wish: Any) -> float:
    known = gathered(folder, scratch, **wish)
    plan = dataclasses.replace(inputs.make_plan(known), seconds=(100.0,))
    return add_run_seconds(plan, EvalCostEstimate(plan, known)).total_seconds


def test_a_run_takes_longer_than_its_steps(tiny_folder: Path, tmp_path: Path) -> None:
    measured = whole(tiny_folder, tmp_path)
    alone = whole(tiny_folder, tmp_path, test_data=None, eval_data=None)
    assert measured > alone > 100 + LOAD_SECONDS


def test_a_metric_of_the_users_own_is_not_run(tiny_folder: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    own = tmp_path / "mine.py"
    own.write_text(
        f"open({str(told)!r}, 'w').close()\ndef score(answer, expected):\n    return 1.0\n"
    )
    assert beside(tiny_folder, tmp_path, metrics=[f"{own}:score"]).count_before() > 0
    assert not told.exists()


def test_looks_and_probes_count(tiny_folder: Path, tmp_path: Path) -> None:
    few, many = (whole(tiny_folder, tmp_path, eval_steps=steps) for steps in (2, 1))
    assert many > few
    one, three = (
        beside(tiny_folder, tmp_path, guard={"probe_steps": steps}).count_probes()
        for steps in (3, 1)
    )
    assert three == pytest.approx(one * 4 / 2)  # and one before the first step
    assert beside(tiny_folder, tmp_path).count_probes() == 0
    unguarded = {"collapse": "off", "forgetting": "off", "probe_steps": 1}
    assert beside(tiny_folder, tmp_path, guard=unguarded).count_probes() == 0


def test_the_base_writes_longer_answers_than_the_trained_model(
    tiny_folder: Path, tmp_path: Path
) -> None:
    found = beside(tiny_folder, tmp_path)
    assert found.count_before() > found.count_after() > 0
    assert found.count_scales() == len(ADAPTER_SCALES) * found.eval_tokens
    assert beside(tiny_folder, tmp_path, method="full", lora_r="auto").count_scales() == 0
