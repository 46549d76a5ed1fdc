"""Rehearsal rows that the model writes itself: what is written and left out, and runs that stand on
them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import (
    build_sum_rows,
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    save_writer_folder,
    select_steps,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith.api import read_record
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult, Event
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import is_free
from tunesmith.core.types import Json
from tunesmith.evaluate.degeneration import compute_repetition
from tunesmith.recipe.load import dump_recipe, load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner
from tunesmith.session.reopen import load_plan_and_inputs
from tunesmith.session.session import load_starting_model
from tunesmith.train import generated_rows, run
from tunesmith.train.generated_rows import generate_rows

pytestmark = pytest.mark.promise


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_writer_folder(tmp_path_factory.mktemp("writer") / "tiny")


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    values = {
        "rehearsal": {"data": "self-generated", "ratio": 0.3},
        "num_train_epochs": 2,
        "save_steps": 2,
    }
    return make_tiny_recipe(model, folder, **(values | changed))


def rows_of(folder: Path) -> list[Json]:
    return [
        json.loads(line) for line in (folder / "run" / "rehearsal.jsonl").read_text().splitlines()
    ]


def messages(events: Sequence[Event]) -> str:
    return next(
        e.evidence
        for e in events
        if isinstance(e, CheckResult) and e.kind == "self-generated rehearsal"
    )


@pytest.fixture(scope="module")
def straight(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(wish(writer, folder))


def test_the_model_writes_conversations_which_are_trained(
    straight: tuple[Path, list[Event]],
) -> None:
    folder, events = straight
    rows = rows_of(folder)
    assert {tuple(turn["role"] for turn in row["messages"]) for row in rows} == {
        ("user", "assistant")
    }
    assert all(turn["content"].strip() for row in rows for turn in row["messages"])
    assert messages(events).startswith(f"{len(rows)} rows of ")
    record = read_record(folder / "run")
    assert record.plan.data["rehearsal"].rows == len(rows)
    custom = sum(
        step.tokens - step.task_tokens.get("rehearsal", 0) for step in select_steps(events)
    )
    assert record.plan.config.rehearsal_tokens == pytest.approx(custom * 0.3 / 0.7, rel=0.01), (
        "as many as are due"
    )
    assert record.task_tokens["rehearsal"] > 0.1 * record.tokens


def test_a_run_goes_on_with_the_rows_that_it_has(
    straight: tuple[Path, list[Event]],
    writer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = wish(writer, tmp_path)
    run_until_saved(run.train(plan_recipe(broken)), step=2)
    assert rows_of(tmp_path) == rows_of(straight[0]), "the same seed, the same rows"
    # nothing is written a second time
    monkeypatch.setattr(generated_rows, "load_starting_model", None)
    list(run.resume(tmp_path / "run"))
    assert (
        read_adapter_bytes(broken)
        == (straight[0] / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    )


def test_its_rows_are_part_of_what_a_run_is(
    straight: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(straight[0] / "run", tmp_path / "run"))
    (folder / "record.json").unlink()
    file = folder / "rehearsal.jsonl"
    assert read_json(folder / "fingerprint.json")["data"]["rehearsal"]
    file.write_text(
        "".join(reversed(file.read_text().splitlines(keepends=True))) + '{"messages": []}\n'
    )
    with pytest.raises(InputError, match=r"data\.rehearsal: sha256|rehearsal.jsonl"):
        list(run.resume(folder))
    file.unlink()
    with pytest.raises(InputError, match=r"rehearsal\.jsonl"):
        list(run.resume(folder))


def test_a_run_that_was_moved_still_finds_its_rows(
    straight: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(straight[0] / "run", tmp_path / "moved"))
    away = straight[0] / "run" / "rehearsal.jsonl"
    away.rename(away.with_suffix(".away"))
    try:
        assert "rehearsal" in load_plan_and_inputs(moved)[1].datasets
    finally:
        away.with_suffix(".away").rename(away)


def test_an_attempt_that_was_killed_while_writing_leaves_a_free_folder(
    writer: Path, tmp_path: Path
) -> None:
    made = wish(writer, tmp_path, max_steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rehearsal.jsonl").write_text('{"messages": "half a r')
    train(made)
    assert rows_of(tmp_path)


@pytest.mark.parametrize(
    "values",
    [{"stage": "cpt", "batch_size": "auto", "batch_tokens": 100}, {"chat_template": "none"}],
)
def test_texts_are_written_where_texts_are_trained(
    values: Json, writer: Path, tmp_path: Path
) -> None:
    texts = [{"text": f"text number {n}"} for n in range(10)]
    data = str(write_rows(tmp_path / "texts.jsonl", texts))
    train(wish(writer, tmp_path, data=data, max_length=60, max_steps=2, **values))
    assert {tuple(row) for row in rows_of(tmp_path)} == {("text",)}


def test_a_seed_decides_what_is_written(writer: Path, tmp_path: Path) -> None:
    actual = []
    for seed in (0, 1):
        run_inputs = inputs.load_inputs(wish(writer, tmp_path / str(seed), seed=seed))
        plan = planner.make_plan(run_inputs)
        actual.append(generate_rows(load_starting_model(plan, run_inputs), plan, run_inputs)[0])
    assert not [row for row in actual[0] if row in actual[1]]


# ---------------------------------------------------------------- what is left out


def test_a_loop_is_seen_in_its_tokens() -> None:
    assert compute_repetition([1, 2, 3, 4] * 5) > 0.7
    assert compute_repetition(range(100)) == 0
    assert compute_repetition([1, 2, 3]) == 0


def test_rows_are_kept_once_and_none_that_is_measured(writer: Path, tmp_path: Path) -> None:
    files = write_eval_files(tmp_path)
    judge = generated_rows._RowFilter(inputs.load_inputs(wish(writer, tmp_path, **files)))
    fresh, measured = build_sum_rows(300, 1)[0], build_sum_rows(200, 1)[0]
    assert [judge.find_problem(row) for row in (fresh, fresh, measured)] == [
        "",
        "duplicate",
        "held out",
    ]
    assert judge.find_problem({"text": "text number 2"}) == "held out"
    assert judge.find_problem({"messages": []}) == "not readable or renderable"
    assert judge.tokens > 0


def test_a_model_that_ends_nothing_is_told(
    writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_rows, "MAX_QUESTION_TOKENS", 1)
    with pytest.raises(InputError, match=r"none of \d+ generated rows is usable: .*\d+ unfinished"):
        train(wish(writer, tmp_path))
    assert not (tmp_path / "run" / "plan.json").exists()
    assert is_free(tmp_path / "run")


# ---------------------------------------------------------------- the recipe


def test_self_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: rows.jsonl\nrehearsal: {data: self}\n")
    made = load_recipe(tmp_path / "recipe.yaml")
    assert made.rehearsal is not None
    assert made.rehearsal.is_self_generated
    (tmp_path / "again.yaml").write_text(dump_recipe(made))
    assert load_recipe(tmp_path / "again.yaml") == made
    (tmp_path / "file.yaml").write_text("model: m\ndata: rows.jsonl\nrehearsal: {data: ./self}\n")
    file = load_recipe(tmp_path / "file.yaml").rehearsal
    assert file is not None
    assert not file.is_self_generated, "a file of that name"
