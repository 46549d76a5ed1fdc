"""A line for each run: its state, step, score, and what cannot be read."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fake_runs import make_events, make_record, make_step, write_run, write_stages
from processor_time import check_seconds
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult, Score, StageStart
from tunesmith.core.run_dir import EVENTS_FILE, FAILED_CHECK, OWNER_FILE, PLAN_FILE, RunFolder
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.core.types import Json
from tunesmith.session.run_list import list_newest_runs, list_runs, summarize_run

GRADE = Score("test", "exact_match", 0.44, 0.33, 0.55, 80, 30)
LOSS = Score("test", "loss", 0.02, 0.01, 0.03, 80, 30)


def test_a_finished_run_has_all_its_steps_and_its_grade(tmp_path: Path) -> None:
    record = make_record()
    run = summarize_run(write_run(tmp_path / "a", record=record))
    assert (run.state, run.step, run.steps) == ("finished", 30, 30)
    assert run.score == record.comparisons[0].after
    assert run.peak_bytes == record.peak_bytes
    graded = summarize_run(write_run(tmp_path / "b", events=[*make_events(), GRADE, LOSS]))
    assert graded.score == GRADE
    assert graded.peak_bytes == make_step(1).peak_bytes


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"plan": {}}', b'{"plan": {"format": 1}}'])
def test_a_damaged_record_is_listed_with_its_problem(content: bytes, tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", record=make_record())
    (path / "record.json").write_bytes(content)
    assert summarize_run(path).state == "unreadable"


@pytest.mark.parametrize(
    "damage",
    [
        {"verdict": "ready"},
        {"steps": "Infinity"},
        {"peak_bytes": None},
        {"comparisons": [{"after": []}]},
        {"comparisons": [{"after": {"metric": "loss", "value": "x", "low": 0, "high": 1}}]},
        {"comparisons": [{"after": {"metric": "loss", "value": None, "low": 0, "high": 1}}]},
    ],
)
def test_a_record_with_values_of_other_types_is_unreadable(damage: Json, tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", record=make_record())
    text = json.dumps(read_sealed_json(path / "record.json") | damage)
    (path / "record.json").write_text(text.replace('"Infinity"', "1e999"))
    run = summarize_run(path)
    assert (run.state, run.problem) == ("unreadable", "its plan or record is damaged")


def test_without_a_grade_the_score_is_the_loss_and_never_forgetting(tmp_path: Path) -> None:
    general = replace(LOSS, task="general text", metric="bits_per_byte")
    path = write_run(tmp_path / "a", events=[make_step(1), LOSS, general])
    assert summarize_run(path).score == LOSS
    assert summarize_run(write_run(tmp_path / "b", events=[make_step(1), general])).score is None


def test_a_run_is_running_while_its_process_lives(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", events=[make_step(1), make_step(2)])
    with RunFolder.open(path):
        run = summarize_run(path)
        assert (run.state, run.step) == ("running", 2)
    (path / OWNER_FILE).write_text("999999999")
    assert summarize_run(path).state == "interrupted"


def test_the_number_of_a_process_that_began_later_is_another_process(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", events=[make_step(1)])
    (path / OWNER_FILE).write_text(str(os.getpid()))
    os.utime(path / OWNER_FILE, (1.0, 1.0))
    assert summarize_run(path).state == "interrupted"


def test_a_gate_that_stopped_a_run_is_named(tmp_path: Path) -> None:
    failed = CheckResult(FAILED_CHECK, "stop", "packed != alone")
    path = write_run(tmp_path / "a", events=[make_step(1), failed])
    (path / OWNER_FILE).unlink()
    run = summarize_run(path)
    assert (run.state, run.problem) == ("stopped", "packed != alone")


def test_stages_are_one_run(tmp_path: Path) -> None:
    path = write_stages(tmp_path / "a", steps=60)
    (run,) = list_runs([tmp_path])
    assert (run.path, run.state, run.steps) == (str(path), "finished", 60)
    assert list_runs([path]) == [run]
    with RunFolder.open(path) as folder:
        folder.append_event(StageStart(1, 2, "cpt", 30, "stages/1-cpt"))
    (path / "record.json").unlink()
    assert summarize_run(path).step == 60


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"plans": []}', b"\xff"])
def test_a_damaged_run_is_listed_with_its_problem(content: bytes, tmp_path: Path) -> None:
    path = write_run(tmp_path / "a")
    (path / PLAN_FILE).write_bytes(content)
    (run,) = list_runs([tmp_path])
    assert run.state == "unreadable"
    assert run.problem


def test_broken_and_unfinished_lines_of_events_are_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", events=[make_step(1), make_step(2)])
    with (path / EVENTS_FILE).open("ab") as file:
        file.write(b'\xff{"type": "step"}\n{"type": "st')
    assert summarize_run(path).step == 2


def test_runs_are_found_below_a_folder_the_last_changed_first(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name) for name in ("a", "x/b", "x/y/c", "x/y/z/w/too-deep")]
    for age, path in enumerate(paths):
        os.utime(path / EVENTS_FILE, (1e9 - age, 1e9 - age))
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert [run.path for run in list_runs([tmp_path])] == [str(path) for path in paths[:3]]
    assert len(list_runs([tmp_path, tmp_path / "a"])) == 3
    assert list_newest_runs([tmp_path], 2) == (list_runs([tmp_path])[:2], 1)
    with pytest.raises(InputError, match="no such folder"):
        list_runs([tmp_path / "nowhere"])


def test_a_stage_that_trains_makes_its_run_the_newest(tmp_path: Path) -> None:
    """Its folder was made long before its last step, and a new run has no event yet."""
    staged = write_stages(tmp_path / "staged", steps=60)
    (staged / "record.json").unlink()
    begun = write_run(tmp_path / "begun")
    (begun / EVENTS_FILE).unlink(missing_ok=True)
    for age in range(3):
        old = write_run(tmp_path / f"old-{age}", events=[make_step(1)])
        os.utime(old / EVENTS_FILE, (1e9 - age, 1e9 - age))
    for path in (staged / "stages", *(staged / "stages").iterdir()):
        os.utime(path, (1e8, 1e8))
    runs = list_runs([tmp_path])
    assert {runs[0].path, runs[1].path} == {str(staged), str(begun)}
    for count in range(1, 6):
        assert list_newest_runs([tmp_path], count) == (runs[:count], 5 - count)


def test_a_thousand_runs_are_listed_in_a_fraction_of_a_second(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run", record=make_record(), events=[*make_events(), GRADE])
    for number in range(300):
        folder = tmp_path / "many" / f"run-{number}"
        folder.mkdir(parents=True)
        for name in (PLAN_FILE, EVENTS_FILE, "record.json"):
            (folder / name).hardlink_to(source / name)
    assert len(list_runs([tmp_path / "many"])) == 300
    # 0.3 s for 1,000 on an idle core; a loaded or slow machine has five times that
    check_seconds(lambda: list_runs([tmp_path / "many"]), limit=0.5)
