"""What `serve --watch` reads of a running server, and how it looks at 80 columns."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_server import LiveServer, make_chat, make_settings, serving, wait_for
from tunesmith.cli.output import TerminalConsole
from tunesmith.cli.views.server import render_activity
from tunesmith.core.errors import InputError, MachineError
from tunesmith.serve.keys import add_key
from tunesmith.serve.watch import (
    Metrics,
    ServerActivity,
    ServerMonitor,
    describe_activity,
    parse_metrics,
)

COLUMNS = 80
LIMIT_SECONDS = 300  # of a hang


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return {
        "file": str(path),
        "boss": add_key(path, "boss", scopes=("admin",))[0],
        "watcher": add_key(path, "watcher", scopes=("metrics",))[0],
        "user": add_key(path, "user")[0],
    }


@pytest.fixture(scope="module")
def busy(
    writer: Path,
    adapters: dict[str, Path],
    keys: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveServer]:
    """Return a server that has answered a few requests of a route."""
    route = {
        "arms": {"base": 100},
        "sticky": "request",
        "shadow": {"model": "dora", "share": 100},
        "canary": {"model": "dora", "steps": [50, 100]},
    }
    settings = make_settings(
        {name: str(adapters[name]) for name in ("small", "dora")},
        base=str(writer),
        keys=Path(keys["file"]),
        routes={"prod": route},
        state_dir=tmp_path_factory.mktemp("state"),
    )
    with serving(settings) as live:
        with live.client(headers={"authorization": f"Bearer {keys['boss']}"}) as http:
            for _ in range(4):
                http.post("/v1/chat/completions", json=make_chat("prod", max_tokens=4))
            http.post("/v1/chat/completions", json=make_chat("small", max_tokens=4))
            http.post("/v1/chat/completions", json=make_chat("small", max_tokens=-1))
            http.get("/v1/nothing")
        yield live


def show(url: str, activity: ServerActivity, **options: Any) -> list[str]:
    console = TerminalConsole(width=COLUMNS, file=io.StringIO(), color_system=None)
    console.print(render_activity(url, activity, **options))
    output: Any = console.file
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_a_server_is_read_with_its_routes(busy: LiveServer, keys: dict[str, str]) -> None:
    monitor = ServerMonitor(f"{busy.url}/v1/", keys["boss"])
    assert monitor.url == busy.url
    first = monitor.read()
    assert first.answer_rate is None
    with busy.client(headers={"authorization": f"Bearer {keys['user']}"}) as http:
        http.post("/v1/chat/completions", json=make_chat("small", max_tokens=4))
    second = monitor.read()
    assert second.state == "ready"
    assert (second.running, second.waiting) == (0, 0)
    models = {model.name: model for model in second.models}
    assert models.keys() == {"base", "small", "dora"}
    assert models["small"].requests == 2
    assert models["small"].answer_rate is not None
    assert models["small"].answer_rate > 0
    assert models["dora"].is_resident
    assert second.step_seconds is not None
    assert second.routes is not None
    assert second.routes[0]["canary"]["model"].startswith("dora@1#")


def test_a_key_for_metrics_sees_no_routes(busy: LiveServer, keys: dict[str, str]) -> None:
    activity = ServerMonitor(busy.url, keys["watcher"]).read()
    assert activity.routes is None
    assert "routes: shown to a key with the scope admin" in show(busy.url, activity)


def test_what_cannot_be_watched_is_told(busy: LiveServer, keys: dict[str, str]) -> None:
    for key in ("", keys["user"]):
        with pytest.raises(InputError, match="may not read this") as refusal:
            ServerMonitor(busy.url, key).read()
        assert "TUNESMITH_API_KEY" in refusal.value.fix
    with pytest.raises(InputError, match="not the URL") as wrong:
        ServerMonitor("localhost:8000")
    assert wrong.value.where == "--watch"
    with pytest.raises(MachineError, match="nothing answers there"):
        ServerMonitor("http://127.0.0.1:9").read()
    with pytest.raises(InputError, match="not Prometheus' text"):
        parse_metrics('a{b="c" 1 2 3')


def test_the_view_fits_80_columns(busy: LiveServer, keys: dict[str, str]) -> None:
    monitor = ServerMonitor(busy.url, keys["boss"])
    wait_for(lambda: monitor.read().metrics.get("route_answers_total") >= 4)
    lines = show(busy.url, monitor.read())
    assert max(map(len, lines)) <= COLUMNS
    text = "\n".join(lines)
    for words in ("ready", "0 running  0 waiting", "small", "route prod", "50%", "shadow dora"):
        assert words in text, text
    assert "canary dora@1: running, step 1 of 1" in text
    assert "cut" in text


def test_many_models_and_strange_names_stay_within_the_view() -> None:
    lines = ['tunesmith_adapter_resident{model="[red]' + "x" * 70 + '"} 1.0']
    lines += [f'tunesmith_adapter_resident{{model="m{number}"}} 0.0' for number in range(99)]
    lines += [
        f'tunesmith_tokens_total{{kind="answer",model="m{number}"}} {number}' for number in (5, 9)
    ]
    metrics = parse_metrics("\n".join(lines) + "\n")
    activity = describe_activity(metrics, Metrics(), 2.0, state="ready")
    shown = show("http://h", activity, max_models=3)
    assert max(map(len, shown)) <= COLUMNS
    assert [line.split()[0] for line in shown if line.startswith("m")] == ["model", "m9", "m5"]
    assert any(line.startswith("[red]xxx") for line in shown)
    assert "and 97 more models" in shown


def test_a_server_that_was_started_again_has_no_negative_rate() -> None:
    many = parse_metrics('tunesmith_tokens_total{kind="answer",model="a"} 900\n')
    few = parse_metrics('tunesmith_tokens_total{kind="answer",model="a"} 10\n')
    assert describe_activity(few, many, 2.0).answer_rate == 5


def test_watching_in_a_terminal(busy: LiveServer, keys: dict[str, str]) -> None:
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "tunesmith", "serve", "--watch", busy.url]
    environment = {**os.environ, "TUNESMITH_API_KEY": keys["boss"], "COLUMNS": "80", "LINES": "40"}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    output = b""
    deadline = time.monotonic() + LIMIT_SECONDS
    while b"canary dora" not in output and time.monotonic() < deadline:
        if select.select([main], [], [], 1)[0]:
            output += os.read(main, 65_536)
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_SECONDS) == 130
    os.close(main)
    assert b"route prod" in output
    assert keys["boss"].encode() not in output
