"""A disk that cannot be read is the machine's fault, whatever was read from it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tunesmith import api


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
