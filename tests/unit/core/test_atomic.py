"""Files and folders appear whole or not at all, whatever the system call that fails."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.core.atomic import (
    atomic_dir,
    disk_errors,
    remove_folder,
    remove_leftovers,
    require_disk_space,
    verify_dir,
    write_file,
)
from tunesmith.core.errors import DiskError, InputError, MachineError
from tunesmith.core.formatting import format_bytes
from tunesmith.core.json_io import read_json

SYSTEM_CALLS = ("mkdir", "open", "write", "fsync", "rename", "replace")

# Writes the new version of a folder over the old one and dies, without a goodbye, at the n-th call
# of the system.
DIES = """
import os, sys
from pathlib import Path
from tunesmith.core.atomic import atomic_dir
target, left = Path(sys.argv[1]), int(sys.argv[2])
def dying(call):
    def wrapper(*arguments, **keywords):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*arguments, **keywords)
    return wrapper
for name in ("mkdir", "open", "fsync", "rename", "replace"):
    setattr(os, name, dying(getattr(os, name)))
with atomic_dir(target, metadata={"version": 2}) as folder:
    (folder / "weights").write_bytes(b"new" * 1000)
"""


def filled(path: Path, content: bytes, version: int) -> None:
    with atomic_dir(path, metadata={"version": version}) as folder:
        (folder / "weights").write_bytes(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_bytes(b"")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", b"old")
    write_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_what_is_no_file_is_never_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    before = path.lstat()
    with pytest.raises(InputError, match="not a regular file") as refusal:
        write_file(path, b"new")
    assert refusal.value.where == str(path)
    assert path.lstat() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_is_sealed_with_its_facts_sizes_and_hashes(tmp_path: Path) -> None:
    filled(tmp_path / "step-1", b"abc", 1)
    manifest = read_json(tmp_path / "step-1" / "manifest.json")
    assert manifest["version"] == 1
    assert manifest["files"]["weights"] == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert set(manifest["files"]) == {"weights", "sub/more"}
    assert verify_dir(tmp_path / "step-1") == ""


def test_every_kind_of_damage_is_seen(tmp_path: Path) -> None:
    def damaged(change: str) -> str:
        folder = tmp_path / change
        filled(folder, b"abc", 1)
        weights, manifest = folder / "weights", folder / "manifest.json"
        if change == "flip":
            weights.write_bytes(b"abd")
        elif change == "grow":
            weights.write_bytes(b"abcd")
        elif change == "lose":
            weights.unlink()
        elif change == "tear":
            manifest.write_bytes(manifest.read_bytes()[:-20])
        elif change == "unseal":
            manifest.write_text("[]")
        return verify_dir(folder)

    assert "was changed" in damaged("flip")
    assert damaged("grow") == "weights has 4 bytes instead of 3"
    assert damaged("lose") == "weights is missing"
    assert damaged("tear") == damaged("unseal") == "manifest.json is missing or broken"
    assert verify_dir(tmp_path / "flip", should_hash=False) == ""


def test_every_changed_byte_of_a_manifest_is_seen(tmp_path: Path) -> None:
    """Its facts have no other witness."""
    filled(tmp_path / "a", b"abc", 1)
    manifest = tmp_path / "a" / "manifest.json"
    content = manifest.read_bytes()
    assert b'"version": 1' in content
    for position in range(len(content)):
        for change in (1, 4, 0x80):
            manifest.write_bytes(
                content[:position] + bytes([content[position] ^ change]) + content[position + 1 :]
            )
            assert verify_dir(tmp_path / "a") == "manifest.json is missing or broken"
    for other in (
        b"",
        b"{}",
        b"[]",
        b"null",
        b"[" * 100_000,
        content + b"\n",
        content.replace(b"  ", b" "),
    ):
        manifest.write_bytes(other)
        assert verify_dir(tmp_path / "a") == "manifest.json is missing or broken"
    manifest.write_bytes(content)
    assert verify_dir(tmp_path / "a") == ""


def test_every_new_folder_is_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is an entry of the folder above it; without that a power cut takes the folder away."""
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    filled(tmp_path / "run" / "checkpoints" / "step-1", b"abc", 1)
    assert {str(tmp_path), str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints")} <= set(
        synced
    )
    names = {Path(path).name for path in synced if ".tmp-step-1" in path}
    assert names >= {"weights", "more", "sub", "manifest.json"}
    assert any(name.startswith(".tmp-step-1") for name in names)


def test_an_error_while_filling_keeps_the_old_folder(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_dir(tmp_path / "adapter", metadata={}) as folder:
            (folder / "weights").write_bytes(b"new")
            raise KeyboardInterrupt

    filled(tmp_path / "adapter", b"old", 1)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert verify_dir(tmp_path / "adapter") == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def fail_at(n: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Makes the n-th call of the operating system fail; returns the list that the names of the
    calls go to."""
    calls: list[str] = []

    def failing(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            calls.append(name)
            if len(calls) == n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **keywords)

        return call

    for name in SYSTEM_CALLS:
        patch.setattr(os, name, failing(name, getattr(os, name)))
    return calls


def test_every_failing_call_leaves_the_old_or_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th call of the operating system fails, for every n until none is left to fail."""
    outcomes: list[str] = []
    for n in range(1, 100):
        target = tmp_path / str(n) / "adapter"
        filled(target, b"old", 1)
        with monkeypatch.context() as patch:
            calls = fail_at(n, patch)
            try:
                filled(target, b"new", 2)
            except MachineError:
                outcomes.append("refused")
        remove_leftovers(target.parent)
        assert len(list(target.parent.iterdir())) == target.exists()
        if target.exists():
            assert verify_dir(target) == ""
            outcomes.append((target / "weights").read_text())
        if len(calls) < n:
            break
    assert outcomes[-1] == "new"
    assert outcomes.count("refused") > 10
    assert outcomes.count("old") > 8


@pytest.mark.promise
def test_a_kill_at_any_call_leaves_a_whole_folder_or_none(tmp_path: Path) -> None:
    """The gap between the two renames of a replacement may leave none: the checkpoint before it is
    taken then."""
    seen: list[str] = []
    for n in range(40):
        target = tmp_path / str(n) / "step-1"
        target.parent.mkdir()
        filled(target, b"old", 1)
        done = subprocess.run([sys.executable, "-c", DIES, str(target), str(n)], check=False)
        remove_leftovers(target.parent)
        assert len(list(target.parent.iterdir())) == target.exists()
        assert not target.exists() or verify_dir(target) == ""
        seen.append((target / "weights").read_text()[:3] if target.exists() else "none")
        if done.returncode == 0:
            break
        assert done.returncode == 9
    assert seen[-1] == "new"
    assert seen[0] == "old"
    assert seen.count("none") <= 1


def test_a_full_disk_says_how_much_is_needed(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_file(tmp_path / "a", b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(
            MachineError, match=r"no space left on the disk: 2\.0 kB \(2000 bytes\) needed"
        ):
            write_file(tmp_path / "a", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_room_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"1000000000\.0 GB \(10{18} bytes\) needed"):
        require_disk_space(tmp_path, 10**18)
    with pytest.raises(MachineError), atomic_dir(tmp_path / "a", metadata={}, needed_bytes=10**18):
        pytest.fail("the body must not run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_system_refuses_is_the_machines_fault(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(MachineError, match=f"cannot be written: {os.strerror(code)}"),
        disk_errors(tmp_path / "a" / "b"),
    ):
        raise OSError(code, os.strerror(code))


def test_removal_leaves_no_half_folder(tmp_path: Path) -> None:
    filled(tmp_path / "step-1", b"x", 1)
    remove_folder(tmp_path / "step-1")
    assert list(tmp_path.iterdir()) == []


def test_sizes_for_people() -> None:
    assert [format_bytes(count) for count in (0, 999, 1500, 2.5e6, 1.94e9)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "2.5 MB",
        "1.9 GB",
    ]


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.EIO, "check the disk and its connection"),
        (errno.ESTALE, "check the disk and its connection"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "close other programs"),
        (errno.ENOMEM, "the memory is full"),
        (errno.EROFS, "choose another output_dir"),
        (errno.EACCES, "make it writable"),
        (errno.ENOLCK, "rpc.statd"),
    ],
)
def test_each_error_of_a_disk_says_what_helps_against_it(
    number: int, fix: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(MachineError, match=re.escape(os.strerror(number))) as caught,
        disk_errors(tmp_path / "run"),
    ):
        raise OSError(number, os.strerror(number))
    assert fix in caught.value.fix
    is_of_disk = number not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    assert isinstance(caught.value, DiskError) == is_of_disk
