"""`tunesmith serve` as a process: its start, its refusals, its signals and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tiny_server import make_chat

pytestmark = pytest.mark.promise


NO_END = {"257": -100, "258": -100}
LIMIT_SECONDS = 300  # of a hang


@contextmanager
def run_serve(*words: str, home: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Yield (process, url, key) of a server that has started."""
    command = [sys.executable, "-P", "-m", "tunesmith", "serve", "--port", "0", *words]
    env = {**os.environ, "XDG_CONFIG_HOME": str(home)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=home)
    assert process.stderr is not None
    key = ""
    url = ""
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        key = line.partition("once: ")[2].strip() or key
        if match := re.search(r"at (http://\S+)/v1", line):
            url = match[1]
            break
    assert url, "".join(lines)
    try:
        yield process, url, key
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_signal_drains_and_a_second_one_ends(writer: Path, tmp_path: Path) -> None:
    with run_serve("--base", str(writer), "--dtype", "fp32", home=tmp_path) as (process, url, key):
        headers = {"authorization": f"Bearer {key}"}
        assert key.startswith("tsk_")
        assert httpx.get(f"{url}/v1/models", timeout=LIMIT_SECONDS).status_code == 401
        body = make_chat("base", stream=True, max_tokens=400, logit_bias=NO_END)
        path = f"{url}/v1/chat/completions"
        with httpx.stream(
            "POST", path, json=body, headers=headers, timeout=LIMIT_SECONDS
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert text.rstrip().endswith("[DONE]")
        assert process.wait(LIMIT_SECONDS) == 0
        assert process.stderr is not None
        access = [json.loads(line) for line in process.stderr if line.startswith("{")]
        assert access[-1]["finish"] == ["length"]
        assert access[-1]["key"] == "first"


def test_answers_that_are_cut_are_exit_143(writer: Path, tmp_path: Path) -> None:
    settings = tmp_path / "serve.yaml"
    settings.write_text(
        f"base: {writer}\ndtype: fp32\nport: 0\nauth: false\nlimits: {{drain: 0.001}}\n"
    )
    with run_serve(str(settings), home=tmp_path) as (process, url, _):
        body = make_chat("base", stream=True, max_tokens=480, n=4, logit_bias=NO_END)
        path = f"{url}/v1/chat/completions"
        with httpx.stream("POST", path, json=body, timeout=LIMIT_SECONDS) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert "server_shutdown" in text
        assert process.wait(LIMIT_SECONDS) == 143


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "there is nothing to serve"),
        (("runs/nothing",), 2, "there is no adapter in this folder"),
        (("--base", "x", "--host", "0.0.0.0", "--no-auth"), 2, "without keys"),
        (("--base", "x", "--host", "0.0.0.0", "--keys", "none.json"), 2, "there is no API key"),
        (("--base", "x", "--dtype", "int3"), 2, "dtype"),
    ],
)
def test_refusals(words: tuple[str, ...], code: int, message: str, tunesmith) -> None:
    exit_code, _, err = tunesmith("serve", *words)
    assert exit_code == code
    assert message in err


def test_a_port_that_is_taken(writer: Path, tunesmith) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = tunesmith("serve", "--base", str(writer), "--port", str(port), "--no-auth")
    assert code == 3
    assert "cannot listen" in err
