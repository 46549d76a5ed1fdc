"""Output that cannot be written: said before training where it can be, and never at the price of
what is there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from full_disk import file_limit
from tiny_runs import make_tiny_recipe, plan_recipe, read_adapter_bytes, select_steps, train
from tunesmith.core.errors import MachineError
from tunesmith.core.events import CheckResult, Event, TrainStep
from tunesmith.core.run_dir import EVENTS_FILE, read_events
from tunesmith.train import run


@pytest.mark.promise
def test_fault_25_a_checkpoint_that_does_not_fit_says_how_much_it_needs(
    tiny_folder: Path, tmp_path: Path
) -> None:
    wishes = [
        make_tiny_recipe(tiny_folder, tmp_path / name, save_steps=1, lora_r=16)
        for name in ("straight", "full")
    ]
    train(wishes[0])
    folder = tmp_path / "full" / "run"
    events = run.train(plan_recipe(wishes[1]))
    while getattr(next(events), "path", "") != "checkpoints/step-1":
        pass
    size = (folder / "checkpoints" / "step-1" / "state.safetensors").stat().st_size
    with (
        file_limit(size // 2),
        pytest.raises(
            MachineError, match=r"step-2: no space left on the disk: .* \(\d+ bytes\) needed"
        ) as full,
    ):
        list(events)
    assert full.value.exit_code == 3
    assert int(full.value.message.partition("(")[2].split()[0]) == pytest.approx(size, rel=0.2)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-0", "step-1"}
    assert [step.step for step in select_steps(list(run.resume(folder)))] == [2, 3]
    assert read_adapter_bytes(wishes[1]) == read_adapter_bytes(wishes[0])


def test_fault_25_the_plan_warns_before_a_disk_is_full(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_recipe(make_tiny_recipe(tiny_folder, tmp_path))
    assert plan.disk_bytes > 0
    object.__setattr__(plan.machine, "disk_free_bytes", plan.disk_bytes - 1)
    monkeypatch.setattr(run, "open_session", lambda *_: pytest.fail("nothing is loaded"))
    with pytest.raises(MachineError, match="the run folder needs up to"):
        next(run.train(plan))


@pytest.mark.parametrize("location", ["/proc/run", "/sys/run", "gone/run", "file/run"])
def test_fault_26_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    location: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systems that take no files, a link to a disk that is gone, and a file where a folder should
    be."""
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted" / "disk")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(run, "open_session", lambda *_: pytest.fail("nothing is loaded"))
    with pytest.raises(MachineError, match=r"cannot be written: |bytes, but 0 are free") as refused:
        list(
            run.train(
                plan_recipe(
                    make_tiny_recipe(tiny_folder, tmp_path, output_dir=str(tmp_path / location))
                )
            )
        )
    assert "output_dir" in refused.value.fix
    assert not (tmp_path / "unmounted").exists()


def test_fault_26_nothing_is_ever_renamed_from_one_folder_to_another(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no rename can meet the border of two disks, wherever links and mounts are."""
    moves: list[tuple[Path, Path]] = []

    def watched(move: Callable[..., None]) -> Callable[..., None]:
        def noted(source: Path, target: Path) -> None:
            moves.append((Path(source), Path(target)))
            move(source, target)

        return noted

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    train(make_tiny_recipe(tiny_folder, tmp_path, save_steps=1))
    assert len(moves) > 8
    assert [move for move in moves if move[0].parent != move[1].parent] == []


# ---------------------------------------------------------------- events.jsonl


@contextmanager
def no_room_for_events(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk takes half a line of events.jsonl, then nothing of it."""
    write, events, taken = os.write, folder / EVENTS_FILE, list[int]()

    def refusing(descriptor: int, content: bytes) -> int:
        if not os.path.samestat(os.fstat(descriptor), events.stat()):
            return write(descriptor, content)
        if taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken.append(write(descriptor, content[: len(content) // 2]))
        return taken[0]

    with patch.context() as inner:
        inner.setattr(os, "write", refusing)
        yield


def test_fault_33_events_that_cannot_be_written_wait_and_one_warning_says_so(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    events = run.train(plan_recipe(make_tiny_recipe(tiny_folder, tmp_path, save_steps=4)))
    seen: list[Event] = []
    while not select_steps(seen):  # the start has been saved
        seen.append(next(events))
    with no_room_for_events(folder, monkeypatch):
        while len(select_steps(seen)) < 3:
            seen.append(next(events))
        assert [step.step for step in read_lines(folder)] == [1]
    seen += list(events)
    warnings = [e for e in seen if isinstance(e, CheckResult) and e.level == "warn"]
    (warning,) = [each for each in warnings if each.kind != "EOS is supervised"]
    assert (warning.kind, warning.evidence) == (
        "events.jsonl",
        "No space left on device: events wait in memory until there is room",
    )
    written = read_events(folder)
    assert [event.step for event in written if isinstance(event, TrainStep)] == [1, 2, 3]
    assert len(written) == len(seen) - 1
    assert (folder / "record.json").exists()


def read_lines(folder: Path) -> list[TrainStep]:
    return [event for event in read_events(folder) if isinstance(event, TrainStep)]


@pytest.mark.promise
def test_fault_33_no_checkpoint_is_newer_than_the_events_before_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = [
        make_tiny_recipe(tiny_folder, tmp_path / name, save_steps=1)
        for name in ("straight", "full")
    ]
    train(wishes[0])
    folder, events = tmp_path / "full" / "run", run.train(plan_recipe(wishes[1]))
    while getattr(next(events), "path", "") != "checkpoints/step-1":
        pass
    with (
        no_room_for_events(folder, monkeypatch),
        pytest.raises(MachineError, match=r"events\.jsonl: no space left on the disk"),
    ):
        list(events)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-0", "step-1"}
    assert [step.step for step in select_steps(list(run.resume(folder)))] == [2, 3]
    assert [event.step for event in read_lines(folder)] == [1, 2, 3]
    assert read_adapter_bytes(wishes[1]) == read_adapter_bytes(wishes[0])
