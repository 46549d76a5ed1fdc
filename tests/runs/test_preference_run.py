"""Runs on pairs: rows become two sides, what is measured moves, and DPO's reference survives a
kill."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_runs import (
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    select_steps,
    train,
    write_rows,
)
from tunesmith.api import read_record
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult, Score
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.core.types import Json
from tunesmith.data.dataset import PAIR_TOO_LONG
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner
from tunesmith.train import run
from tunesmith.train.base_reference import REFERENCE_FILE

pytestmark = pytest.mark.promise


def pair(number: int) -> Json:
    return {
        "prompt": f"{number} and {number}",
        "chosen": f"it is {2 * number}",
        "rejected": f"no, {number}",
    }


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "data": str(write_rows(folder / "pairs.jsonl", [pair(n) for n in range(1, 7)])),
        "test_data": str(write_rows(folder / "test.jsonl", [pair(n) for n in range(50, 58)])),
    }
    return make_tiny_recipe(model, folder, stage="preference", **files | changed)


def test_a_row_is_two_documents_with_one_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    rows = inputs.load_inputs(wish(tiny_folder, tmp_path)).datasets["data"]
    for index in range(len(rows)):
        chosen, rejected = rows.render_documents(index)
        assert (chosen.side, rejected.side, chosen.id) == ("chosen", "rejected", rejected.id)
        starts = [int(np.flatnonzero(side.weights_L)[0]) for side in (chosen, rejected)]
        assert starts[0] == starts[1]
        assert chosen.tokens_L[: starts[0]].tolist() == rejected.tokens_L[: starts[1]].tolist()
        texts = [rows.renderer.decode(side.tokens_L[starts[0] :]) for side in (chosen, rejected)]
        assert [text.split("<")[0] for text in texts] == [
            rows.read_row(index).data[k] for k in ("chosen", "rejected")
        ]


def test_what_is_preferred_becomes_likelier(tiny_folder: Path, tmp_path: Path) -> None:
    made = wish(
        tiny_folder, tmp_path, num_train_epochs=8, learning_rate=0.02, lr_scheduler_type="constant"
    )
    events = train(made)
    actual = {(item.task, item.metric): item for item in read_record(tmp_path / "run").comparisons}
    assert set(actual) == {
        ("test", name)
        for name in ("loss", "preference_accuracy", "margin", "chosen_logp", "rejected_logp")
    }
    accuracy, margin = actual["test", "preference_accuracy"], actual["test", "margin"]
    assert accuracy.after.value == 1
    assert accuracy.after.n == 8
    assert margin.low > 0
    last = {(item.task, item.metric): item for item in events if isinstance(item, Score)}
    assert last["test", "margin"].value == pytest.approx(margin.after.value)
    lengths = [step.supervised_tokens for step in select_steps(events)]
    assert min(lengths) > 2 * len("no, 1")


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_other_losses_too(loss: str, tiny_folder: Path, tmp_path: Path) -> None:
    train(wish(tiny_folder, tmp_path, loss=loss, num_train_epochs=4, learning_rate=0.02))
    margin = next(
        item for item in read_record(tmp_path / "run").comparisons if item.metric == "margin"
    )
    assert margin.low > 0


@pytest.mark.parametrize("start", ["adapter", "full"])
def test_a_kept_reference_makes_a_resumed_run_the_same(
    start: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Killed after step 2 of 6; without its reference file the next attempt makes the same one."""
    changes: dict[str, Any] = {"num_train_epochs": 2, "save_steps": 2}
    if start == "adapter":
        train(wish(tiny_folder, tmp_path / "first", learning_rate=0.05))
        changes["adapter_from"] = str(tmp_path / "first" / "run")
    else:
        changes |= {"method": "full", "lora_r": "auto", "learning_rate": 0.001}
    straight, killed = (
        wish(tiny_folder, tmp_path / name, **changes) for name in ("straight", "killed")
    )
    train(straight)
    remaining = read_sealed_json(tmp_path / "straight" / "run" / REFERENCE_FILE)
    assert sorted(remaining) == [str(row) for row in range(6)]
    assert all(value < 0 for values in remaining.values() for value in values)
    run_until_saved(run.train(plan_recipe(killed)), 2)
    (tmp_path / "killed" / "run" / REFERENCE_FILE).unlink()
    list(run.resume(tmp_path / "killed" / "run"))
    assert read_sealed_json(tmp_path / "killed" / "run" / REFERENCE_FILE) == remaining
    if start == "adapter":
        assert read_adapter_bytes(killed) == read_adapter_bytes(straight)
    weights = [
        path.read_bytes()
        for at in ("straight", "killed")
        for path in (tmp_path / at / "run").glob("*/*.safetensors")
    ]
    assert weights[0] == weights[1]


def test_the_first_loss_of_dpo_is_log_two(tiny_folder: Path, tmp_path: Path) -> None:
    """Whatever training starts from is the reference, an adapter to go on with too."""
    train(wish(tiny_folder, tmp_path / "first", learning_rate=0.05))
    again = wish(
        tiny_folder,
        tmp_path / "again",
        adapter_from=str(tmp_path / "first" / "run"),
        loss={"nll_coefficient": 0},
    )
    for made in (wish(tiny_folder, tmp_path / "fresh", loss={"nll_coefficient": 0}), again):
        assert select_steps(train(made))[0].loss == pytest.approx(np.log(2), abs=1e-5)


def test_a_fall_of_the_chosen_answers_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    made = wish(
        tiny_folder, tmp_path, loss={"nll_coefficient": 0}, num_train_epochs=6, learning_rate=0.2
    )
    messages = [
        event
        for event in train(made)
        if isinstance(event, CheckResult) and "less likely" in event.kind
    ]
    fell = next(
        item for item in read_record(tmp_path / "run").comparisons if item.metric == "chosen_logp"
    )
    assert bool(messages) == (fell.after.value < 1.1 * fell.before.value)


# ---------------------------------------------------------------- bad rows


def test_equal_sides_are_refused_by_row(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [pair(1), pair(2) | {"chosen": "same", "rejected": " same "}, pair(3), pair(4)]
    data = str(write_rows(tmp_path / "equal.jsonl", rows))
    with pytest.raises(
        InputError, match=r"1 of 12 rows cannot be used: 1 equal sides(.|\n)*equal\.jsonl:2"
    ):
        train(wish(tiny_folder, tmp_path / "a", data=data))
    assert (
        len(select_steps(train(wish(tiny_folder, tmp_path / "b", data=data, skip_invalid=True))))
        == 2
    )


def test_rows_without_sides_are_no_preference(tiny_folder: Path, tmp_path: Path) -> None:
    data = str(write_rows(tmp_path / "plain.jsonl", [{"prompt": "a", "completion": "b"}] * 3))
    with pytest.raises(InputError, match="no rejected answer"):
        train(wish(tiny_folder, tmp_path, data=data))


def test_a_pair_with_one_long_side_is_left_out_whole(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [pair(n) | ({"rejected": "long " * 30} if n == 2 else {}) for n in range(1, 5)]
    data = str(write_rows(tmp_path / "long.jsonl", rows))
    run_inputs = inputs.load_inputs(wish(tiny_folder, tmp_path, data=data, max_length=80))
    assert [len(run_inputs.datasets["data"].render_documents(i)) for i in range(4)] == [2, 0, 2, 2]
    assert planner.build_data_reports(run_inputs)["data"].dropped == {PAIR_TOO_LONG: 1}
