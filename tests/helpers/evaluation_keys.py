"""Keys of the recipe's evaluation: a run in which each makes a difference, for
test_recipe_keys.py."""

from __future__ import annotations

import pytest

from tiny_recipe_runs import Lab
from tiny_runs import build_sum_rows, make_tiny_recipe
from tunesmith import api
from tunesmith.advise.sweep.records import SweepStart
from tunesmith.api import read_record
from tunesmith.core.errors import InputError


def metrics(lab: Lab) -> None:
    test = lab.rows(build_sum_rows(90, 3))
    always = {"loss", "kl", "top1_agreement"}
    chosen = {metric for _, metric in lab.scores(test_data=test)}
    assert chosen == {"field_f1", "json_valid", *always}, "the answers are JSON"
    named = {metric for _, metric in lab.scores(test_data=test, metrics=["exact_match"])}
    assert named == {"exact_match", *always}


def gates(lab: Lab) -> None:
    test = lab.rows(build_sum_rows(90, 6))
    for limit, is_held in (("<= 0.9", True), ("> 0.9", False)):
        lab.events(test_data=test, gates={"exact_match": limit})
        results = {gate.name: gate.passed for gate in api.evaluate(lab.output).check_gates()}
        assert results["test exact_match limit"] == is_held


def group(lab: Lab) -> None:
    """Seven pairs of rows count as seven, by a key or by their ids; a row without it is refused."""
    rows = [
        row | {"author": i // 2, "id": f"chapter-{i // 2}/{i % 2}"}
        for i, row in enumerate(build_sum_rows(90, 14))
    ]
    for setting, groups in (("author", 7), ("auto", 7), ("none", 0)):
        test = lab.rows(rows)
        lab.events(test_data=test, group=setting)
        record = read_record(lab.output)
        assert {entry.after.groups for entry in record.comparisons} == {groups}
        assert {entry.after.n for entry in record.comparisons} == {14}
    with pytest.raises(InputError, match="the row has no key `writer`") as refusal:
        lab.events(test_data=lab.rows(rows), group="writer")
    assert refusal.value.where.endswith(":1")


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
    for swept, count in (({"lora_r": [2]}, 1), ({"lora_r": [4, 8]}, 2), ({"seeds": 3}, 1)):
        folder = lab.folder / str(swept)
        recipe = make_tiny_recipe(lab.model, folder, **held_out, sweep=swept)
        events = api.tune_sweep(recipe, output_dir=folder / "sweep")
        start = next(events)
        assert isinstance(start, SweepStart)
        assert start.configurations == count
