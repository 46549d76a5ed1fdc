"""A disk that cannot be read is the machine's fault, whatever was read from it."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tiny_runs import build_sum_rows, write_rows
from tunesmith import api
from tunesmith.core.errors import MachineError
from tunesmith.data.readers.sources import Source, open_source
from tunesmith.model.hub.validate import check_files

ROW = b'{"prompt": "a", "completion": "b"}\n'


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


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE])
def test_a_failing_disk_is_exit_code_3(
    number: int, tunesmith: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise OSError(number, "it broke", "weights")

    monkeypatch.setattr(api, "doctor", fail)
    code, stdout, stderr = tunesmith("doctor", "--json")
    assert code == 3
    assert "weights: cannot access a file: it broke" in stderr
    assert json.loads(stdout)["error"]["kind"] == "MachineError"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, 3),
        (errno.EPERM, 3),
        (errno.ENOENT, 2),
        (errno.EISDIR, 2),
        (errno.ENOTDIR, 2),
        (errno.ELOOP, 2),
    ],
)
def test_a_file_that_cannot_be_read_is_no_bug(
    number: int,
    code: int,
    tunesmith: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise OSError(number, os.strerror(number), "run/events.jsonl")

    monkeypatch.setattr(api, "doctor", fail)
    actual, _, stderr = tunesmith("doctor")
    assert actual == code
    assert f"run/events.jsonl: cannot {'access a file' if code == 3 else 'be read'}: " in stderr
    assert "fix: " in stderr
    assert "Traceback" not in stderr


def test_a_json_file_on_a_failing_disk_is_exit_code_3(
    tiny_folder: Path,
    tmp_path: Path,
    tunesmith: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", build_sum_rows(1, 4))
    open_file = Path.open

    def fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "config.json":
            raise OSError(errno.EIO, "it broke")
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    code, _, stderr = tunesmith("plan", "--model", str(tiny_folder), "--data", str(rows))
    assert code == 3
    assert "config.json: cannot be read: it broke" in stderr


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_each_file_of_a_model_on_a_failing_disk_is_exit_code_3(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_text("{}")
    stat = Path.stat

    def fail(file: Path, **options: Any) -> os.stat_result:
        if file == path:
            raise OSError(errno.EIO, "it broke")
        return stat(file, **options)

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(MachineError, match="cannot be read: it broke") as caught:
        check_files(tmp_path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "jsonl.gz"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_data_on_a_failing_disk_is_exit_code_3_and_names_the_file(
    number: int, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not "damaged": the file may be whole."""
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(gzip.compress(ROW) if suffix.endswith("gz") else ROW)

    class Failing(io.FileIO):
        def readinto(self, _: object) -> NoReturn:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", lambda file, _: io.BufferedReader(Failing(file)))
    monkeypatch.setattr(gzip, "open", lambda file, _: io.BufferedReader(Failing(file)))
    with pytest.raises(MachineError, match=re.escape(os.strerror(number))) as caught:
        open_source(path)
    assert caught.value.where == str(path)
    assert caught.value.fix.startswith("check the disk")


def test_a_row_on_a_failing_disk_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(ROW)
    source = open_source(path)

    def fail(*_: int) -> NoReturn:
        raise OSError(errno.EIO, "it broke")

    monkeypatch.setattr(os, "pread", fail)
    assert isinstance(source, Source)
    with pytest.raises(MachineError, match="cannot be read: it broke") as caught:
        source.read_row(0)
    assert caught.value.where == str(path)
