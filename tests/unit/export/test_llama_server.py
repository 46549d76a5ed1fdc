"""The files of `export --to llama-server` started as they are written, and `verify` against it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from llama_server import find_llama_server
from tiny_export import make_export_job, save_model
from tiny_runs import make_chat_row
from transformers_server import COLORS, train_on_rows
from tunesmith import api
from tunesmith.export.gguf import get_model_path, write_gguf
from tunesmith.export.servers import export_servers

pytestmark = pytest.mark.slow
START_SECONDS = 300


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return find_llama_server(tmp_path_factory.mktemp("llama-server"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colors")
    save_model(folder / "model", "llama")
    rows = [
        make_chat_row(f"{COLORS[n % 4]} {n}", f"{COLORS[(n + 1) % 4]} it is") for n in range(52)
    ]
    return train_on_rows(folder, rows)


@contextmanager
def started(folder: Path, llama_server: Path, *more: str) -> Iterator[str]:
    """Run serve.sh of a folder on a free port inside the block, and yield the URL of its API."""
    environment = {**os.environ, "LLAMA_SERVER": str(llama_server), "PORT": "0"}
    environment["MAX_MODEL_LEN"] = "512"
    log = folder.parent / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["bash", str(folder / "serve.sh"), *more], env=environment, stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (lines := [x for x in log.read_text().splitlines() if x.startswith("http://")]):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield f"{lines[0]}/v1"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_verify_finds_the_run_behind_the_exported_files(
    run: Path, llama_server: Path, tmp_path: Path
) -> None:
    export_servers([run], "llama-server", kind="f32", out=tmp_path / "out")
    with started(tmp_path / "out", llama_server) as url:
        result = api.verify(run, url, items=8)
        assert run_verify_sh(tmp_path / "out", url) == 0
    statuses = {check.name: check.status for check in result.checks}
    assert result.is_run, result.checks
    assert statuses["prompt"] == statuses["applied"] == statuses["answers"] == "ok"


def test_the_base_behind_the_same_files_is_not_the_run(
    run: Path, llama_server: Path, tmp_path: Path
) -> None:
    export_servers([run], "llama-server", kind="f32", out=tmp_path / "out")
    job = make_export_job(run, tmp_path / "base", "f32")
    job = replace(job, run=replace(job.run, loras={}))
    write_gguf(job)
    with started(tmp_path / "out", llama_server, "--model", str(get_model_path(job))) as url:
        result = api.verify(run, url, items=8)
        assert run_verify_sh(tmp_path / "out", url) == 4
    statuses = {check.name: check.status for check in result.checks}
    assert statuses["prompt"] == "ok"
    assert statuses["applied"] == "failed"
    assert not result.is_run


def run_verify_sh(folder: Path, url: str) -> int:
    """Return the exit code of the exported verify.sh."""
    command = ["bash", str(folder / "verify.sh"), "--items", "8"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "URL": url, "PATH": path}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode
