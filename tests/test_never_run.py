"""Constraints in a run: bans are trained and resumed, filters leave rows out without stopping anything."""

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_run import adapter_bytes, chat, plan_of, recipe, steps_of, sums, train, until_saved, write_rows
from tunesmith import run
from tunesmith.errors import InputError
from tunesmith.recipe import Recipe

BAD = [chat("who?", "as an AI, fine"), {**chat("what?", "I am an AI"), "negative": True}]
BAN = {"match": "an AI", "name": "ai", "mode": "ban"}


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    data = str(write_rows(folder / "rows.jsonl", [*sums(1, 6), *BAD]))
    return recipe(model, folder, **{"data": data, "never": [BAN], "save_steps": 2, **changed})


def test_a_ban_is_planned_trained_and_resumed_to_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    straight, broken = (wish(tiny_folder, tmp_path / name) for name in ("straight", "broken"))
    plan = plan_of(straight)
    assert (plan["ban_coefficient"], plan.data["data"].banned) == (1.0, {"ai": 2})
    assert plan.choices["never"].why == "2 rows trained away from 'ai'"
    steps = steps_of(train(straight))
    plain = steps_of(train(wish(tiny_folder, tmp_path / "plain", never=[{**BAN, "mode": "filter"}])))
    banned = sum(step.supervised_tokens for step in steps) - sum(step.supervised_tokens for step in plain)
    assert banned == 2 * len("an AI"), "one token a byte"
    until_saved(run.train(plan_of(broken)), step=2)
    list(run.resume(tmp_path / "broken" / "run"))
    assert adapter_bytes(broken) == adapter_bytes(straight)


def test_left_out_rows_stop_nothing_and_are_written_down(tiny_folder: Path, tmp_path: Path) -> None:
    train(wish(tiny_folder, tmp_path, never=["as an AI", "I am"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["where"], line["reason"]) for line in lines] == [("rows.jsonl:7", "never"), ("rows.jsonl:8", "never")]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["data"]["data"]["left_out"] == {"as an AI": 1, "I am": 1}


def test_a_negative_row_is_never_trained_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 of 8 rows cannot be used: 1 nothing bad"):
        train(wish(tiny_folder, tmp_path, never=[]))
