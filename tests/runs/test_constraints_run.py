"""Constraints in a run: bans are trained and resumed, filters leave rows out without stopping
anything."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiment_modules import load_experiment
from tiny_runs import (
    build_sum_rows,
    make_chat_row,
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    select_steps,
    train,
    train_ai_mention_model,
    write_rows,
)
from tunesmith.api import read_record
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.recipe.schema import Recipe
from tunesmith.train import run

pytestmark = pytest.mark.promise


baselines = load_experiment("constraint_baselines")

BAD = [
    make_chat_row("who?", "as an AI, fine"),
    {**make_chat_row("what?", "I am an AI"), "negative": True},
]
BAN = {"match": "an AI", "name": "ai", "mode": "ban"}


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    data = str(write_rows(folder / "rows.jsonl", [*build_sum_rows(1, 6), *BAD]))
    return make_tiny_recipe(
        model, folder, **{"data": data, "never": [BAN], "save_steps": 2, **changed}
    )


def test_a_ban_is_planned_trained_and_resumed_to_the_same_bytes(
    tiny_folder: Path, tmp_path: Path
) -> None:
    straight, broken = (wish(tiny_folder, tmp_path / name) for name in ("straight", "broken"))
    plan = plan_recipe(straight)
    assert (plan.config.ban_coefficient, plan.data["data"].banned) == (1.0, {"ai": 2})
    assert plan.reasons["never"].reason == "2 rows trained away from 'ai'"
    steps = select_steps(train(straight))
    plain = select_steps(
        train(wish(tiny_folder, tmp_path / "plain", never=[{**BAN, "mode": "filter"}]))
    )
    banned = sum(step.supervised_tokens for step in steps) - sum(
        step.supervised_tokens for step in plain
    )
    assert banned == 2 * len("an AI"), "one token a byte"
    run_until_saved(run.train(plan_recipe(broken)), step=2)
    list(run.resume(tmp_path / "broken" / "run"))
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)


def test_left_out_rows_stop_nothing_and_are_written_down(tiny_folder: Path, tmp_path: Path) -> None:
    train(wish(tiny_folder, tmp_path, never=["as an AI", "I am"]))
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    ]
    assert [(line["where"], line["reason"]) for line in lines] == [
        ("rows.jsonl:7", "never"),
        ("rows.jsonl:8", "never"),
    ]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["data"]["data"]["filtered"] == {"as an AI": 1, "I am": 1}


def test_a_negative_row_is_never_trained_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 of 8 rows cannot be used: 1 nothing bad"):
        train(wish(tiny_folder, tmp_path, never=[]))


# ---------------------------------------------------------------- measured


def marked(first: int, count: int, answer: str, negative: Any) -> list[Json]:
    return [
        {**make_chat_row(f"say {n}", f"{answer} {n}"), "negative": negative}
        for n in range(first, first + count)
    ]


def test_a_ban_is_measured_before_and_after_by_kind_of_prompt(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """A model that answers with the phrase stops when it is banned; rightful prompts are asked
    too."""
    model = train_ai_mention_model(tiny_folder, tmp_path / "talker")
    test = [*build_sum_rows(200, 3), *marked(20, 3, "an AI", True), *marked(30, 2, "an AI", False)]
    bad = write_rows(tmp_path / "bad.jsonl", [*build_sum_rows(1, 6), *marked(0, 5, "an AI", True)])
    files = {"data": str(bad), "test_data": str(write_rows(tmp_path / "test.jsonl", test))}
    train(wish(model, tmp_path / "then", **files, num_train_epochs=4, save_steps=1000))
    record = read_record(tmp_path / "then" / "run")
    actual = {(item.task, item.metric): item for item in record.comparisons}
    eliciting, logp = (
        actual["eliciting prompts", "breaks ai"],
        actual["eliciting prompts", "bad_logp"],
    )
    assert (eliciting.before.value, eliciting.after.value, eliciting.after.n) == (1, 0, 3)
    assert logp.high < 0
    assert (
        actual["neutral prompts", "breaks ai"].after.n,
        actual["rightful prompts", "says ai"].after.n,
    ) == (3, 2)
    assert actual["test", "exact_match"].after.n == 5, "bad answers are not graded"
    assert record.samples[-1][0].answer.startswith("an AI")
    assert record.samples[-1][0].expected == ""

    beside = baselines.compare_baselines(tmp_path / "then" / "run")
    assert list(beside) == ["base", "prompted", "banned"]
    for rows in beside.values():
        after = {(item.task, item.metric): item.after for item in rows}
        assert after == {key: actual[key].after for key in after}
        assert ("eliciting prompts", "breaks ai") in after
    remaining = {
        name: {(item.task, item.metric): item.before.value for item in rows}
        for name, rows in beside.items()
    }
    assert remaining["base"]["eliciting prompts", "breaks ai"] == 1
    assert remaining["banned"]["eliciting prompts", "breaks ai"] == 0
    assert remaining["banned"]["rightful prompts", "says ai"] == 0, (
        "a ban at decoding knows no exception"
    )


def test_baselines_are_of_constraints(tiny_folder: Path, tmp_path: Path) -> None:
    files = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", build_sum_rows(n, 3)))
        for n, name in ((1, "data"), (9, "test_data"))
    }
    train(wish(tiny_folder, tmp_path, **files, never=[]))
    with pytest.raises(InputError, match="baselines need constraints and prompts"):
        baselines.compare_baselines(tmp_path / "run")
