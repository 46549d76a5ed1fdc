"""Pairs whose worse side is the base model's own bad answer: made once, kept, counted, and trained
on."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

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
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import CheckResult, Event
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.core.types import Json
from tunesmith.recipe.schema import Recipe
from tunesmith.train import run
from tunesmith.train.generated_rows import PAIRS_FILE

PHRASE = {"match": "an AI", "name": "ai", "mode": "pair"}


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_ai_mention_model(tiny_folder, tmp_path_factory.mktemp("talker"))


def make_recipe(model: Path, folder: Path, **changed: Any) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [make_chat_row(f"say {n}", f"me {n}") for n in range(4)] + [
        make_chat_row(f"tell {n}", f"that is {n}") for n in range(4)
    ]
    values = {
        "data": str(write_rows(folder / "rows.jsonl", rows)),
        "stage": "preference",
        "never": [PHRASE],
        "save_steps": 2,
    }
    return make_tiny_recipe(model, folder, **{**values, **changed})


def read_pairs(folder: Path) -> Json:
    return read_sealed_json(folder / "run" / PAIRS_FILE)


def list_pair_verdicts(events: list[Event]) -> list[tuple[str, str]]:
    return [
        (event.level, event.evidence)
        for event in events
        if isinstance(event, CheckResult) and event.kind == "synthetic pairs"
    ]


def test_steps_with_less_than_half_of_their_pairs_are_warned_of(
    model: Path, tmp_path: Path
) -> None:
    rows = [make_chat_row(f"say {n}", f"me {n}") for n in range(2)]
    rows += [make_chat_row(f"tell {n}", f"that is {n}") for n in range(4)]
    data = str(write_rows(tmp_path / "few.jsonl", rows))
    ((level, evidence),) = list_pair_verdicts(train(make_recipe(model, tmp_path, data=data)))
    assert level == "warn"
    assert evidence.endswith("a step of batch_size 2 has 0.7 pairs on average")


LONG_ROWS = [make_chat_row(f"say {n}", "long " * 40) for n in range(3)]


def test_rows_over_the_length_are_no_pairs(model: Path, tmp_path: Path) -> None:
    rows = [make_chat_row(f"say {n}", f"me {n}") for n in range(2)]
    data = str(write_rows(tmp_path / "long.jsonl", [*rows, *LONG_ROWS]))
    events = train(make_recipe(model, tmp_path, data=data, max_length=64, skip_invalid=True))
    ((level, evidence),) = list_pair_verdicts(events)
    assert level == "warn"
    assert evidence.startswith("2 of 2 answers")
    assert evidence.endswith("a step of batch_size 2 has 0.8 pairs on average")


def test_the_base_models_bad_answers_become_worse_sides(model: Path, tmp_path: Path) -> None:
    test = str(
        write_rows(
            tmp_path / "test.jsonl",
            [{**make_chat_row(f"say {n}", "an AI"), "negative": True} for n in (7, 8, 9)],
        )
    )
    changed = {"num_train_epochs": 12, "learning_rate": 0.02, "save_steps": 100, "test_data": test}
    events = train(make_recipe(model, tmp_path, **changed))
    made = read_pairs(tmp_path)
    assert list(made) == ["0", "1", "2", "3"]
    assert all("an AI" in answer for answer in made.values())
    evidence = (
        f"4 of 8 answers of the base model violate a constraint: {PAIRS_FILE}; a step of "
        "batch_size 2 has 1.0 pairs on average"
    )
    assert list_pair_verdicts(events) == [("ok", evidence)]
    actual = {(item.task, item.metric): item for item in read_record(tmp_path / "run").comparisons}
    assert (
        actual["eliciting prompts", "breaks ai"].before.value,
        actual["eliciting prompts", "breaks ai"].after.value,
    ) == (
        1,
        0,
    )


def test_made_pairs_survive_a_kill(model: Path, tmp_path: Path) -> None:
    straight, killed = (make_recipe(model, tmp_path / name) for name in ("straight", "killed"))
    events = train(straight)
    assert sum(step.supervised_tokens > 0 for step in select_steps(events)) >= 2
    run_until_saved(run.train(plan_recipe(killed)), 2)
    list(run.resume(tmp_path / "killed" / "run"))
    assert read_pairs(tmp_path / "killed") == read_pairs(tmp_path / "straight")
    assert read_adapter_bytes(killed) == read_adapter_bytes(straight)


def test_changed_pairs_and_those_of_other_rows_are_refused(model: Path, tmp_path: Path) -> None:
    run_until_saved(run.train(plan_recipe(make_recipe(model, tmp_path))), 2)
    file = tmp_path / "run" / PAIRS_FILE
    text = file.read_text()
    for changed, problem in (
        (text.replace("an AI", "an AL", 1), "changed since tunesmith wrote it"),
        ('{"99": "an AI"}', "row 99 of the data has no pair"),
        (text[:-9], "not valid JSON"),
    ):
        file.write_text(changed)
        with pytest.raises(InputError, match=problem):
            list(run.resume(tmp_path / "run"))


def test_a_better_side_that_breaks_a_constraint_is_left_out(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "chosen": f"me {n}", "rejected": "an AI"} for n in range(6)]
    rows.append({"prompt": "say 7", "chosen": "an AI", "rejected": "me"})
    data = str(write_rows(tmp_path / "pairs.jsonl", rows))
    events = train(make_recipe(model, tmp_path, data=data))
    assert plan_recipe(make_recipe(model, tmp_path / "b", data=data)).data["data"].filtered == {
        "ai": 1
    }
    assert len(select_steps(events)) == 3
    assert not (tmp_path / "run" / PAIRS_FILE).exists(), "every row has both sides"


def test_nothing_to_prefer_to_is_said(model: Path, tmp_path: Path) -> None:
    data = str(
        write_rows(
            tmp_path / "fine.jsonl", [make_chat_row(f"tell {n}", f"that is {n}") for n in range(4)]
        )
    )
    with pytest.raises(GateError, match="0 of 4 answers of the base model violate a constraint"):
        train(make_recipe(model, tmp_path, data=data))
    few = [make_chat_row(f"tell {n}", f"that is {n}") for n in range(4)]
    data = str(write_rows(tmp_path / "long.jsonl", [*few, *LONG_ROWS]))
    with pytest.raises(GateError, match="0 of 4 answers of the base model violate a constraint"):
        train(make_recipe(model, tmp_path / "long", data=data, max_length=64, skip_invalid=True))


def test_rows_without_a_worse_side_need_a_constraint_that_makes_one(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no rejected answer"):
        plan_recipe(make_recipe(model, tmp_path, never=[{**PHRASE, "mode": "filter"}]))
    with pytest.raises(
        ValidationError, match="mode pair has no effect with stage: sft; use stage: preference"
    ):
        make_recipe(
            model,
            tmp_path,
            data=str(write_rows(tmp_path / "s.jsonl", build_sum_rows(1, 4))),
            stage="sft",
        )
