"""Keys of the recipe's evaluation: a run in which each makes a difference, for
test_recipe_keys.py."""

from __future__ import annotations

from recipe_lab import Lab
from tiny_runs import build_sum_rows
from tunesmith import api


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
    for limit, is_held in (("<= 1", True), ("> 1", False)):
        lab.events(test_data=test, gates={"exact_match": limit})
        results = {gate.name: gate.passed for gate in api.evaluate(lab.output).check_gates()}
        assert results["test exact_match limit"] == is_held
