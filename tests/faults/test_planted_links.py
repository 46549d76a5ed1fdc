"""A folder of a stranger may hold links to files of the user: nothing is written through them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_runs import make_tiny_recipe, save_model_folder, train
from tunesmith.core import run_dir
from tunesmith.core.atomic import (
    atomic_dir,
    atomic_file,
    remove_folder,
    remove_leftovers,
    write_file,
)
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.run_dir import RunFolder
from tunesmith.data.rejects import write_rejected_rows
from tunesmith.report.trackers import RunTracker

RUN_FILES = sorted(
    {
        *run_dir.STARTUP_FILES,
        *(value for key, value in vars(run_dir).items() if key.endswith(("_FILE", "_DIR"))),
        *(".tmp-rejected.jsonl", ".tmp-rejected.jsonl-1-ab", ".trash-x"),
    }
)
PLANTS: dict[str, Callable[[Path, Path], None]] = {
    "symbolic": lambda link, victim: link.symlink_to(victim),
    "relative": lambda link, victim: link.symlink_to(os.path.relpath(victim, link.parent)),
    "dangling": lambda link, victim: link.symlink_to(victim.with_name("new")),
    "to a folder": lambda link, victim: link.symlink_to(victim.parent),
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "home" / "key"
    file.parent.mkdir()
    file.write_bytes(b"")  # an empty events.jsonl is no content
    return file


def require_unharmed(victim: Path) -> None:
    assert [entry.name for entry in victim.parent.iterdir()] == ["key"]
    assert victim.read_bytes() == b""


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_new_run_refuses_a_link(name: str, plant: str, tmp_path: Path, victim: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    PLANTS[plant](run / name, victim)
    with pytest.raises(InputError, match="symbolic link") as caught:
        RunFolder.create(run)
    assert caught.value.where == str(run / name)
    assert not run_dir.is_free(run)
    assert [entry.name for entry in run.iterdir()] == [name]
    require_unharmed(victim)


@pytest.mark.parametrize("name", [".lock", ".lock.pid", "events.jsonl"])
def test_a_new_run_refuses_a_hard_link(name: str, tmp_path: Path, victim: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    os.link(victim, run / name)
    with pytest.raises(InputError, match="hard links"):
        RunFolder.create(run)
    require_unharmed(victim)


@pytest.mark.parametrize("name", [".lock", ".lock.pid", "events.jsonl"])
def test_what_is_no_file_is_refused_without_waiting(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises((InputError, MachineError)):
        RunFolder.create(tmp_path)


@pytest.mark.parametrize(
    "name", [".lock", "events.jsonl", "adapter", "checkpoints", "checkpoints/step-2", "stages"]
)
def test_a_resumed_run_refuses_a_link(name: str, tmp_path: Path, victim: Path) -> None:
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / "plan.json").write_text(f'{{"format": {run_dir.RUN_FORMAT}}}')
    (run / name).symlink_to(victim.parent)
    with pytest.raises(InputError, match="symbolic link"):
        RunFolder.open(run)
    require_unharmed(victim)


@pytest.mark.parametrize("name", [".lock", ".tmp-rejected.jsonl", "rejected.jsonl", "events.jsonl"])
def test_train_refuses_a_link(name: str, tmp_path: Path, victim: Path) -> None:
    settings = make_tiny_recipe(
        save_model_folder(tmp_path / "model"), tmp_path / "work", skip_invalid=True
    )
    with Path(settings.data[0].path).open("a") as rows:
        rows.write('{"x": "$(touch PWNED)"}\n')
    run = tmp_path / "work" / "run"
    run.mkdir()
    (run / name).symlink_to(victim)
    with pytest.raises(InputError, match="symbolic link"):
        train(settings)
    require_unharmed(victim)


def test_a_finished_file_replaces_a_link(tmp_path: Path, victim: Path) -> None:
    for number, write in enumerate((write_file, write_parts)):
        (tmp_path / f"link-{number}").symlink_to(victim)
        write(tmp_path / f"link-{number}", b"new")
        assert (tmp_path / f"link-{number}").read_bytes() == b"new"
        assert not (tmp_path / f"link-{number}").is_symlink()
    require_unharmed(victim)


def write_parts(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)


def test_a_finished_folder_replaces_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "step-1").symlink_to(victim.parent)
    with atomic_dir(tmp_path / "step-1", metadata={}) as folder:
        (folder / "weights").write_bytes(b"new")
    assert (tmp_path / "step-1" / "weights").read_bytes() == b"new"
    assert not (tmp_path / "step-1").is_symlink()
    require_unharmed(victim)


def test_removal_removes_the_link_alone(tmp_path: Path, victim: Path) -> None:
    for name in (".tmp-a", ".trash-a", "step-1"):
        (tmp_path / name).symlink_to(victim.parent)
    remove_leftovers(tmp_path)
    remove_folder(tmp_path / "step-1")
    assert [entry.name for entry in tmp_path.iterdir()] == ["home"]
    require_unharmed(victim)


def test_rejected_rows_are_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    """Their file is removed where no row is rejected: the link, and not what it leads to."""
    (tmp_path / "rejected.jsonl").symlink_to(victim)
    write_rejected_rows(tmp_path / "rejected.jsonl", {}, {})
    assert not (tmp_path / "rejected.jsonl").is_symlink()
    require_unharmed(victim)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_does_not_write_into_a_linked_folder(
    tracker: str, tmp_path: Path, victim: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / tracker).symlink_to(victim.parent)
    with pytest.raises(InputError, match="symbolic link"):
        RunTracker(tmp_path / "run", tracker)
    require_unharmed(victim)
