"""Rehearsal in a run: planned in tokens, added to the data, resumed to the same bytes, refused
where it would cheat."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tiny_runs import (
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    select_steps,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith.core.errors import InputError
from tunesmith.core.events import Event
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.types import Json, RunRecord
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs
from tunesmith.train import run

TEXTS: list[Json] = [{"text": f"general text {n}, " + "and so on " * (n % 4)} for n in range(20)]


def wish(model: Path, folder: Path, texts: Sequence[Json] = TEXTS, **changed: Any) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    data = str(write_rows(folder / "texts.jsonl", texts))
    values = {"rehearsal": {"data": data, "ratio": 0.5}, "num_train_epochs": 2, "save_steps": 2}
    return make_tiny_recipe(model, folder, **(values | changed))


def rehearsed(events: Sequence[Event]) -> list[int]:
    return [step.task_tokens.get("rehearsal", 0) for step in select_steps(events)]


@pytest.mark.promise
def test_no_row_of_the_data_is_lost_and_the_share_is_said(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with_it, without = (
        wish(tiny_folder, tmp_path / "with"),
        wish(tiny_folder, tmp_path / "without", rehearsal=None),
    )
    events, alone = train(with_it), train(without)
    custom = [
        step.tokens - more
        for step, more in zip(select_steps(events), rehearsed(events), strict=True)
    ]
    assert custom == [step.tokens for step in select_steps(alone)]
    total = sum(step.tokens for step in select_steps(events))
    assert sum(rehearsed(events)) / total == pytest.approx(0.5, abs=0.05)
    record = parse_as(RunRecord, read_json(tmp_path / "with" / "run" / "record.json"))
    assert (record.tokens, record.task_tokens) == (total, {"rehearsal": sum(rehearsed(events))})
    choice = record.plan.settings["rehearsal_ratio"]
    assert (choice.value, choice.decided_by) == (0.5, "user")
    assert "about 554 tokens added to 554 of the data" in choice.reason
    assert record.plan.data.keys() == {"data", "rehearsal"}


@pytest.mark.promise
def test_a_run_goes_on_to_the_same_bytes_with_the_same_rehearsal(
    tiny_folder: Path, tmp_path: Path
) -> None:
    straight, broken = (wish(tiny_folder, tmp_path / name) for name in ("straight", "broken"))
    events = train(straight)
    run_until_saved(run.train(plan_recipe(broken)), step=2)
    again = list(run.resume(tmp_path / "broken" / "run"))
    assert rehearsed(again) == rehearsed(events)[2:]
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)


def test_resuming_with_another_rehearsal_file_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    run_until_saved(run.train(plan_recipe(wish(tiny_folder, tmp_path))), step=2)
    write_rows(tmp_path / "texts.jsonl", TEXTS[::-1])
    with pytest.raises(InputError, match=r"data\.rehearsal: sha256"):
        list(run.resume(tmp_path / "run"))


def test_what_is_measured_is_not_rehearsed(tiny_folder: Path, tmp_path: Path) -> None:
    files = write_eval_files(tmp_path)
    with pytest.raises(
        InputError, match=r"also in retention_data: texts.jsonl:1 is general.jsonl:3"
    ) as caught:
        inputs.load_inputs(
            wish(tiny_folder, tmp_path, [{"text": "text number 2"}, *TEXTS], **files)
        )
    assert "remove them from the rehearsal file" in str(caught.value)
    with pytest.raises(ValidationError, match="rehearsal and retention_data name the same file"):
        wish(tiny_folder, tmp_path, **files, rehearsal={"data": files["retention_data"]})


def test_pairs_are_not_rehearsed(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="rehearsal has no effect with stage: preference"):
        wish(tiny_folder, tmp_path, stage="preference")


@pytest.mark.parametrize("ratio", [-0.1, 0.91, 1, True])
def test_a_ratio_out_of_bounds_is_refused(ratio: float, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"rehearsal\.ratio"):
        wish(tiny_folder, tmp_path, rehearsal={"data": "general.jsonl", "ratio": ratio})
