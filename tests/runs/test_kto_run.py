"""KTO runs: rows with a label and pairs as two rows, what is measured, and references that survive
a kill."""

from pathlib import Path
from typing import Any

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
from tunesmith.core.errors import InputError
from tunesmith.core.events import Score
from tunesmith.core.types import Json
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs
from tunesmith.train import run
from tunesmith.train.base_reference import MISMATCHED_FILE, REFERENCE_FILE


def label(number: int) -> Json:
    is_right = number % 2 == 1
    answer = f"it is {2 * number}" if is_right else f"no, {number}"
    return {"prompt": f"{number} and {number}", "completion": answer, "label": is_right}


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "data": str(write_rows(folder / "labels.jsonl", [label(n) for n in range(1, 7)])),
        "test_data": str(write_rows(folder / "test.jsonl", [label(n) for n in range(50, 58)])),
    }
    return make_tiny_recipe(
        model, folder, **{"stage": "preference", "loss": "kto"} | files | changed
    )


def test_a_row_has_the_side_of_its_label(tiny_folder: Path, tmp_path: Path) -> None:
    rows = inputs.load_inputs(wish(tiny_folder, tmp_path)).datasets["data"]
    sides = [rows.render_documents(index)[0].side for index in range(len(rows))]
    assert sides == ["desirable", "undesirable"] * 3


def test_a_pair_is_one_answer_of_each_label(tiny_folder: Path, tmp_path: Path) -> None:
    pair = {"prompt": "one and one", "chosen": "it is 2", "rejected": "no, 1"}
    data = str(write_rows(tmp_path / "pairs.jsonl", [pair]))
    rows = inputs.load_inputs(wish(tiny_folder, tmp_path / "x", data=data)).datasets["data"]
    assert [document.side for document in rows.render_documents(0)] == ["desirable", "undesirable"]


@pytest.mark.parametrize("value", [None, "yes", 0.5, "missing"])
def test_a_row_without_a_label_is_refused(tiny_folder: Path, tmp_path: Path, value: Any) -> None:
    row = label(1) | {"label": value}
    if value == "missing":
        del row["label"]
    data = str(write_rows(tmp_path / "bad.jsonl", [row, row]))
    with pytest.raises(InputError, match="label"):
        inputs.load_inputs(wish(tiny_folder, tmp_path / "x", data=data))


def test_a_column_can_be_the_label(tiny_folder: Path, tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "thumbs_up": True}
    file = write_rows(tmp_path / "rows.jsonl", [row, row | {"thumbs_up": False}])
    data = [{"path": str(file), "columns": {"label": "thumbs_up"}}]
    rows = inputs.load_inputs(wish(tiny_folder, tmp_path / "x", data=data)).datasets["data"]
    assert [rows.render_documents(i)[0].side for i in (0, 1)] == ["desirable", "undesirable"]


def test_what_is_measured_moves(tiny_folder: Path, tmp_path: Path) -> None:
    events = train(wish(tiny_folder, tmp_path, learning_rate=0.05, num_train_epochs=4))
    scores: dict[str, list[float]] = {}
    for event in events:
        if isinstance(event, Score) and event.task == "test":
            scores.setdefault(event.metric, []).append(event.value)
    assert {"desirable_logp", "undesirable_logp", "loss"} <= scores.keys()
    desirable = scores["desirable_logp"]
    undesirable = scores["undesirable_logp"]
    assert desirable[-1] - desirable[0] > undesirable[-1] - undesirable[0]


@pytest.mark.promise
def test_weights_change_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    losses: list[tuple[float, ...]] = []
    for number, more in enumerate(({}, {"desirable_weight": 3.0}, {"undesirable_weight": 0.0})):
        loss = {"name": "kto", **more}
        recipe = wish(tiny_folder, tmp_path / str(number), loss=loss)
        losses.append(tuple(step.loss for step in select_steps(train(recipe))))
    assert len(set(losses)) == 3


def test_the_plan_has_its_rules(tiny_folder: Path, tmp_path: Path) -> None:
    config = plan_recipe(wish(tiny_folder, tmp_path)).config
    assert (config.loss, config.beta, config.nll_coefficient) == ("kto", 0.1, 0.0)
    assert (config.desirable_weight, config.undesirable_weight) == (1.0, 1.0)
    dpo = plan_recipe(
        wish(
            tiny_folder,
            tmp_path / "dpo",
            loss="dpo",
            data=str(
                write_rows(
                    tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]
                )
            ),
            test_data=[],
        )
    )
    assert dpo.config.desirable_weight is None


def test_one_row_per_step_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a step has one"):
        plan_recipe(wish(tiny_folder, tmp_path, batch_size=1))


@pytest.mark.promise
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_is_the_same(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    more = {"method": method, "save_steps": 1} | ({"lora_r": "auto"} if method == "full" else {})
    whole = wish(tiny_folder, tmp_path / "whole", **more)
    train(whole)
    killed = wish(tiny_folder, tmp_path / "killed", **more)
    run_until_saved(run.train(plan_recipe(killed)), 2)
    list(run.resume(tmp_path / "killed" / "run"))
    folders = [tmp_path / name / "run" for name in ("whole", "killed")]
    if method == "full":
        files = [folder / "model" / "model.safetensors" for folder in folders]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert all((folder / REFERENCE_FILE).exists() for folder in folders)
        assert all((folder / MISMATCHED_FILE).exists() for folder in folders)
    else:
        assert read_adapter_bytes(whole) == read_adapter_bytes(killed)
        assert not (folders[0] / MISMATCHED_FILE).exists()
