"""A disk that cannot be read is the machine's fault, whatever was read from it."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tunesmith import api


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
@pytest.mark.parametrize("words", [("runs", "."), ("runs", ".", "--json"), ("schema", "--json")])
def test_a_full_disk_under_stdout_is_exit_code_3(words: tuple[str, ...], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tunesmith", *words]
        ended = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False
        )
    assert ended.returncode == 3
    assert ended.stderr.startswith("error: cannot access a file: No space left on device\n")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_failing_disk_is_exit_code_3(
    number: int, tunesmith: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise OSError(number, "it broke", "weights")

    monkeypatch.setattr(api, "doctor", fail)
    code, _, stderr = tunesmith("doctor")
    assert code == 3
    assert "weights: cannot access a file: it broke" in stderr


def test_a_json_file_on_a_failing_disk_is_exit_code_3(
    tiny_folder: Path,
    tunesmith: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_bytes = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "config.json":
            raise OSError(errno.EIO, "it broke")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    code, _, stderr = tunesmith("doctor", "--model", str(tiny_folder))
    assert code == 3
    assert "config.json: cannot be read: it broke" in stderr
