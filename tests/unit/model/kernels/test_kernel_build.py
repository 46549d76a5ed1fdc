"""The cache of compiled kernels is loaded only if it is as it was compiled."""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tunesmith.core.atomic import hash_file
from tunesmith.model.kernels import build

QUICK_FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)
KERNELS = build.load_kernels()  # of all sources
needs_kernels = pytest.mark.skipif(KERNELS.library is None, reason=KERNELS.problem)


def load() -> build.Kernels:
    return build.load_kernels.__wrapped__()


@pytest.fixture(autouse=True, scope="module")
def _quick_compiler() -> Iterator[None]:
    """Compile one source without optimization: these tests are of files, not of what they hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SOURCES", build.SOURCES[:1])
        patch.setattr(build, "FLAGS", QUICK_FLAGS)
        yield


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(folder))
        assert load().library is not None
    return folder / "kernels"


@pytest.fixture
def cache(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, since a file that this process has loaded must not be damaged."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    return Path(shutil.copytree(compiled, tmp_path / "kernels"))


def get_library(folder: Path) -> Path:
    (library,) = folder.glob("*.so")
    return library


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    for position in range(middle, middle + 200):
        content[position] ^= 0xFF
    file.write_bytes(content)


def lead_elsewhere(file: Path) -> None:
    file.rename(file.parent.parent / "elsewhere.so")
    file.symlink_to(file.parent.parent / "elsewhere.so")


@pytest.mark.skipif(build.find_compiler() is None, reason="there is no C compiler")
def test_the_sources_compile_where_there_is_a_compiler() -> None:
    """Else every test of a kernel would be skipped."""
    assert KERNELS.library is not None, KERNELS.problem


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty": (".so", lambda file: file.write_bytes(b"")),
    "cut": (".so", lambda file: os.truncate(file, file.stat().st_size // 2)),
    "one byte short": (".so", lambda file: os.truncate(file, file.stat().st_size - 1)),
    "flipped bytes": (".so", flip),
    "more bytes": (".so", lambda file: file.write_bytes(file.read_bytes() + b"\0")),
    "a folder's link": (".so", lead_elsewhere),
    "writable by the group": (".so", lambda file: file.chmod(0o660)),
    "checksum writable by all": (".sha256", lambda file: file.chmod(0o666)),
    "no checksum": (".sha256", lambda file: file.unlink()),
    "an empty checksum": (".sha256", lambda file: file.write_bytes(b"")),
    "another checksum": (".sha256", lambda file: file.write_text("0" * 64 + "\n")),
}


@needs_kernels
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_that_does_not_fit_is_compiled_again(
    damage: str, cache: Path, compiled: Path
) -> None:
    suffix, change = DAMAGES[damage]
    change(get_library(cache).with_suffix(suffix))
    kernels = load()
    assert kernels.library is not None
    assert kernels.sha256 == hash_file(get_library(compiled)), "the same compiler, the same bytes"
    library = get_library(cache)
    assert not library.is_symlink()
    assert hash_file(library) == kernels.sha256
    assert library.with_suffix(".sha256").read_text() == f"{kernels.sha256}\n"
    modes = [file.stat().st_mode & 0o777 for file in sorted(cache.iterdir())]
    assert modes == [0o600, 0o600], "nothing else stays, and only the user may write"


@needs_kernels
def test_an_intact_library_is_loaded_as_it_is(cache: Path) -> None:
    before = get_library(cache).stat().st_mtime_ns
    assert load().library is not None
    assert get_library(cache).stat().st_mtime_ns == before


@needs_kernels
def test_another_users_umask_leaves_a_cache_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    umask = os.umask(0)
    try:
        assert load().library is not None
    finally:
        os.umask(umask)
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700
    before = get_library(tmp_path / "kernels").stat().st_mtime_ns
    assert load().library is not None
    assert get_library(tmp_path / "kernels").stat().st_mtime_ns == before


@needs_kernels
@pytest.mark.parametrize("obstacle", ["a file", "a link", "another user's"])
def test_a_cache_that_is_not_this_users_is_not_used(
    obstacle: str, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    folder = tmp_path / "kernels"
    if obstacle == "a file":
        folder.write_text("")
    elif obstacle == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        shutil.copytree(compiled, folder)
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
    before = sorted(tmp_path.rglob("*"))
    kernels = load()
    assert kernels.library is not None
    assert kernels.sha256 == hash_file(get_library(compiled))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("compiler", "problem"),
    [("false", "the kernels cannot be compiled: .*false exits with 1"), ("", "no C compiler")],
)
def test_the_reference_is_announced(
    compiler: str,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        kernels = load()
    assert (kernels.library, kernels.describe()) == (None, "none")
    (record,) = caplog.records
    assert "plain torch, which is slower and rounds differently" in record.message
    assert caplog.text.count("\n") == 1
    assert re.search(problem, kernels.problem)


@needs_kernels
def test_library_and_checksum_are_forced_to_the_disk_before_they_are_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    calls: list[str] = []
    fsync = os.fsync
    replace = os.replace

    def log_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix}")
        fsync(descriptor)

    def log_replace(source: Path, target: Path) -> None:
        calls.append(f"replace {Path(target).suffix}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    assert load().library is not None
    assert calls == ["fsync .so", "fsync .sha256", "replace .so", "replace .sha256", "fsync "]
