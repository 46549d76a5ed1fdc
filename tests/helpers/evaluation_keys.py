"""Keys of the recipe's evaluation: a run in which each makes a difference, for
test_recipe_keys.py."""

from __future__ import annotations

import pytest

from tiny_recipe_runs import Lab
from tiny_runs import build_sum_rows, make_tiny_recipe
from tunesmith import api
from tunesmith.advise.sweep.records import SweepStart
from tunesmith.core.errors import InputError


def metrics(lab: Lab) -> None:
    test = lab.rows(build_sum_rows(90, 3))
    always = {"loss", "kl", "top1_agreement"}
    assert {metric for _, metric in lab.scores(test_data=test)} == {"exact_match", *always}
    assert {metric for _, metric in lab.scores(test_data=test, metrics=["field_f1"])} == {
        "field_f1",
        *always,
    }


def gates(lab: Lab) -> None:
    test = lab.rows(build_sum_rows(90, 6))
    for limit, is_held in (("<= 0.9", True), ("> 0.9", False)):
        lab.events(test_data=test, gates={"exact_match": limit})
        results = {gate.name: gate.passed for gate in api.evaluate(lab.output).check_gates()}
        assert results["test exact_match limit"] == is_held


def sweep(lab: Lab) -> None:
    """Each value is a trial of `tune sweep`; `train` refuses the several runs that it describes."""
    with pytest.raises(InputError, match="describes a sweep of several runs"):
        lab.events(sweep={"lora_r": [2]})
    held_out = {
        "eval_data": lab.rows(build_sum_rows(90, 2), "eval.jsonl"),
        "test_data": lab.rows(build_sum_rows(80, 2), "test.jsonl"),
        "metrics": ["bits_per_byte"],
        "max_steps": 1,
    }
    for ranks in ([2], [4, 8]):
        folder = lab.folder / str(ranks)
        recipe = make_tiny_recipe(lab.model, folder, **held_out, sweep={"lora_r": ranks})
        events = api.tune_sweep(recipe, output_dir=folder / "sweep")
        start = next(events)
        assert isinstance(start, SweepStart)
        assert start.configurations == len(ranks)
