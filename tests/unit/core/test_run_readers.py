"""Readers of a run folder: its record, its weights, its last events, and what to name instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_runs import PLAN, make_events, make_record, make_step, write_run, write_stages
from tunesmith.core.errors import InputError
from tunesmith.core.run_dir import (
    EVENTS_FILE,
    OWNER_FILE,
    PLAN_FILE,
    RECORD_FILE,
    STAGES_DIR,
    RunFolder,
    find_weights_dir,
    read_last_events,
    read_run_plan,
    read_run_record,
    require_run,
)


def test_a_record_is_that_of_a_finished_run(tmp_path: Path) -> None:
    record = make_record()
    assert read_run_record(write_run(tmp_path / "a", record=record)) == record
    with pytest.raises(InputError, match="this run is not finished") as caught:
        read_run_record(write_run(tmp_path / "b"))
    assert caught.value.fix == f"finish it: tunesmith resume {tmp_path / 'b'}"
    with pytest.raises(InputError, match="not a run folder"):
        read_run_record(tmp_path)
    assert read_run_plan(tmp_path / "a") == PLAN


def test_weights_are_those_of_the_run_or_of_its_last_stage(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    assert find_weights_dir(run) == run
    assert find_weights_dir(tmp_path) == tmp_path  # an adapter or a model, not a run
    staged = write_stages(tmp_path / "staged")
    for number in (9, 10):  # by number, not by name
        (staged / STAGES_DIR / f"{number}-sft").mkdir()
    (staged / STAGES_DIR / "99 copy").mkdir()
    assert find_weights_dir(staged) == staged / STAGES_DIR / "10-sft"
    (staged / RECORD_FILE).unlink()
    with pytest.raises(InputError, match="some of its stages are not finished") as caught:
        find_weights_dir(staged)
    assert caught.value.fix == f"finish the run: tunesmith resume {staged}"


def test_a_run_of_another_format_has_no_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / PLAN_FILE).write_text('{"format": 1}')
    with pytest.raises(InputError, match="run folder format 1 is not supported"):
        find_weights_dir(run)


def test_the_last_events_are_whole_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", events=[make_step(number) for number in range(1, 6)])
    steps = [make_step(number) for number in range(1, 6)]
    assert read_last_events(run) == steps
    file = run / EVENTS_FILE
    lines = file.read_bytes().splitlines(keepends=True)
    two = len(lines[-1]) + len(lines[-2])
    assert read_last_events(run, max_bytes=two + 1) == steps[-2:]
    assert read_last_events(run, max_bytes=two) == steps[-1:]  # the first line may be torn
    assert read_last_events(run, max_bytes=file.stat().st_size) == steps
    file.write_bytes(b"".join([*lines[:2], b"{broken\n", lines[2], b'{"type"']))
    assert read_last_events(run) == steps[:3]
    file.unlink()
    assert read_last_events(run) == []


def test_old_checkpoints_go_only_below_the_saved_step(tmp_path: Path) -> None:
    def save(folder: RunFolder, number: int, **options: int | tuple[int, ...]) -> list[str]:
        with folder.checkpoint(number, metadata={}, **options) as target:  # type: ignore[arg-type]
            (target / "weights").write_bytes(b"x")
        return [path.name for path, _ in folder.iter_checkpoints()]

    with RunFolder.create(tmp_path / "a") as folder:
        for number in (1, 2, 3, 9):
            save(folder, number, keep_last=9)
        assert save(folder, 5, keep_last=1) == ["step-9", "step-5"]
        assert save(folder, 6, keep_last=1, keep_steps=(5,)) == ["step-9", "step-6", "step-5"]
        assert save(folder, 7, keep_last=4) == ["step-9", "step-7", "step-6", "step-5"]
        for number in (10, 11):
            save(folder, number, keep_last=9)
        # three newer ones than the two to keep: none of the older ones is needed
        assert save(folder, 8, keep_last=2) == ["step-11", "step-10", "step-9", "step-8"]


# ---------------------------------------------------------------- what is no run


def test_the_closest_run_is_suggested(tmp_path: Path) -> None:
    write_run(tmp_path / "first-run")
    with pytest.raises(InputError, match="no such run folder") as caught:
        require_run(tmp_path / "frst-run")
    assert "tunesmith runs" in caught.value.fix


def test_a_lock_without_an_owner_is_one_of_somebody(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "a"):
        (tmp_path / "a" / OWNER_FILE).unlink()
        with pytest.raises(InputError, match="in use by process unknown"):
            RunFolder.create(tmp_path / "a")


def test_events_of_a_run_come_back(tmp_path: Path) -> None:
    events = make_events()
    run = write_run(tmp_path / "a", events=events)
    assert read_last_events(run, max_bytes=10**6) == events
