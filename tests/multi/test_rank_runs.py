"""Runs on several ranks: one folder, and the results of one process."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rank_processes import run_processes
from rank_runs import (
    OTHER_TORCH,
    Job,
    check_resumed,
    evaluate_run,
    read_weights,
    resume_copies,
    train_alone,
    train_jobs_on_ranks,
    train_near_other_rows,
    train_on_ranks,
)
from tiny_runs import build_sum_rows, save_writer_folder, write_eval_files, write_rows
from tunesmith.core.events import CheckResult, Score, TrainStep
from tunesmith.core.run_dir import read_events
from tunesmith.core.types import Json

pytestmark = pytest.mark.multi

STEPS = 6
UNWATCHED = {"guard": {"collapse": "off", "forgetting": "off"}}
PREFERENCE_LOSSES = ("dpo", "kto")
PREFERENCES: dict[str, Any] = {
    "stage": "preference",
    "method": "full",
    "lora_r": "auto",
    "batch_size": 4,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a recipe of six steps with evaluation, probes and a checkpoint every two steps."""
    folder = tmp_path_factory.mktemp("rank-data")
    rows = write_rows(folder / "rows.jsonl", build_sum_rows(1, 24))
    return {
        "data": str(rows),
        "batch_size": 4,
        "save_steps": 2,
        "eval_steps": 3,
        **write_eval_files(folder),
    }


@pytest.fixture(scope="module")
def jobs(
    tiny_folder: Path, changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Job]:
    """Return runs of two ranks that have ended, by name. Their processes start once."""
    folder = tmp_path_factory.mktemp("runs")
    model = str(tiny_folder)
    writer = str(save_writer_folder(folder / "writer"))
    few = {key: changes[key] for key in ("data", "batch_size")}
    jobs = {
        "straight": Job(model, folder / "straight", changes, has_copy=True),
        "unwatched": Job(model, folder / "unwatched", few | UNWATCHED),
        "written": Job(writer, folder / "written", few | {"rehearsal": {"data": "self-generated"}}),
    }
    for loss in PREFERENCE_LOSSES:
        rows = {"data": str(write_preferences(folder / f"{loss}.jsonl", loss)), "loss": loss}
        jobs[loss] = Job(model, folder / loss, PREFERENCES | rows)
    train_jobs_on_ranks(jobs)
    return jobs


@pytest.fixture(scope="module")
def straight(jobs: dict[str, Job]) -> Path:
    """Return the folder of a run on two ranks."""
    return jobs["straight"].folder


def test_a_run_of_two_ranks_is_that_of_one_process(
    jobs: dict[str, Job], straight: Path, tmp_path: Path
) -> None:
    train_alone(jobs["straight"], tmp_path)
    np.testing.assert_allclose(read_weights(straight), read_weights(tmp_path), rtol=0, atol=1e-5)
    ours = read_events(straight / "run")
    theirs = read_events(tmp_path / "run")
    for kind in (TrainStep, Score):
        pairs = [[event for event in events if type(event) is kind] for events in (ours, theirs)]
        assert len(pairs[0]) == len(pairs[1]) >= STEPS
    losses = [[e.loss for e in events if isinstance(e, TrainStep)] for events in (ours, theirs)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-5)
    scores = [[e.value for e in events if isinstance(e, Score)] for events in (ours, theirs)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    assert "ranks" in [event.kind for event in ours if isinstance(event, CheckResult)]


def test_a_guard_changes_no_bit(jobs: dict[str, Job]) -> None:
    final, other = (
        load_file(jobs[name].folder / "run" / "adapter" / "adapter_model.safetensors")
        for name in ("straight", "unwatched")
    )
    assert {n: t.tobytes() for n, t in final.items()} == {n: t.tobytes() for n, t in other.items()}


def test_a_checkpoint_of_two_ranks_goes_on_with_any_number(
    jobs: dict[str, Job], straight: Path, tmp_path: Path
) -> None:
    first = jobs["straight"].copy
    check_resumed(resume_copies([first], tmp_path)[first], read_weights(straight))


@pytest.mark.parametrize(
    ("stop", "first_saved"), [({"signal": 1}, 1), ({"signal_in_answers": 3}, 3)]
)
def test_a_signal_stops_all_after_the_step_or_evaluation_with_a_checkpoint(
    tiny_folder: Path,
    changes: dict[str, Any],
    tmp_path: Path,
    stop: dict[str, int],
    first_saved: int,
) -> None:
    outcomes = train_on_ranks(2, tiny_folder, tmp_path, changes, **stop)
    assert [code for code, _ in outcomes] == [143, 143], outcomes
    assert "continue with: tunesmith resume" in outcomes[0][1]
    folders = (tmp_path / "run" / "checkpoints").iterdir()
    last_saved = max(int(folder.name.removeprefix("step-")) for folder in folders)
    assert last_saved >= first_saved, "the work until the signal is kept"


def test_a_rank_with_other_rows_ends_the_run_with_its_name(
    tiny_folder: Path, changes: dict[str, Any], tmp_path: Path
) -> None:
    for name, first in (("here", 1), ("there", 2)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", build_sum_rows(first, 24))
    relative = changes | {"data": "rows.jsonl"}
    outcomes = run_processes(
        train_near_other_rows,
        2,
        str(tiny_folder),
        str(tmp_path / "here"),
        relative,
        str(tmp_path / "there"),
    )
    assert [code for code, _ in outcomes] == [2, 2], outcomes
    message = outcomes[0][1]
    assert message.startswith("rank 1 on ")
    assert "other source files of tunesmith" in message
    assert "data.data: sha256" in message
    assert f"torch: {importlib.metadata.version('torch')} -> {OTHER_TORCH}" in message
    assert "give every machine the same files" in message


def test_an_evaluation_on_two_ranks_is_that_of_one(straight: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", build_sum_rows(40, 9))
    (tmp_path / "empty").mkdir()
    run = str(straight / "run")
    here = str(tmp_path)
    (alone,) = run_processes(evaluate_run, 1, run, "rows.jsonl", [here])
    assert alone[0] == 0
    assert "field_f1" in alone[1]
    assert run_processes(evaluate_run, 2, run, "rows.jsonl", [here, here]) == [alone, (0, "")]
    elsewhere = str(tmp_path / "empty")
    main, other = run_processes(evaluate_run, 2, run, "rows.jsonl", [here, elsewhere])
    assert (main[0], other[0]) == (2, 2)
    assert main[1].startswith("rank 1 on "), "rank 0 says what rank 1 misses"
    assert "no such file" in main[1]


def test_rows_that_the_model_writes_are_those_of_one_process(
    jobs: dict[str, Job], tmp_path: Path
) -> None:
    folders = (train_alone(jobs["written"], tmp_path), jobs["written"].folder)
    rows = [(folder / "run" / "rehearsal.jsonl").read_bytes() for folder in folders]
    assert rows[0].count(b"\n") > 4
    assert rows[0] == rows[1]


def write_preferences(path: Path, loss: str) -> Path:
    rows: list[Json] = []
    for number in range(1, 9):
        row: Json = {"prompt": f"{number} and {number}"}
        answers = (f"it is {2 * number}", f"no, {number}")
        if loss == "kto":
            row |= {"completion": answers[number % 2], "label": number % 2 == 0}
        else:
            row |= {"chosen": answers[0], "rejected": answers[1]}
        rows.append(row)
    return write_rows(path, rows)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_references_that_rank_0_has_measured_are_read_by_all(
    jobs: dict[str, Job], tmp_path: Path, loss: str
) -> None:
    folders = (train_alone(jobs[loss], tmp_path), jobs[loss].folder)
    alone, ours = (load_file(folder / "run" / "model" / "model.safetensors") for folder in folders)
    for name, tensor in alone.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=1e-5)
