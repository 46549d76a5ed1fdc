"""Adapters that are loaded when they are first asked for: whatever happens to their files, names
and memory before that, an answer is the one of the content that was registered, or an error."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tiny_server import (
    LiveServer,
    make_chat,
    make_settings,
    save_toy_adapter,
    serving,
    wait_for,
)
from tunesmith.serve import server as serve_server

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "return_token_ids": True}
NO_END = {"257": -100, "258": -100}
CHAT = "/v1/chat/completions"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RECORD = "tunesmith.json"
WAIT_SECONDS = 300  # of a hang


def ask(live: LiveServer, model: str, **more: Any) -> httpx.Response:
    with live.client() as http:
        return http.post(CHAT, json=make_chat(model, **(GREEDY | more)))


def get_ids(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


@pytest.fixture
def _nothing_is_loaded_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_server, "LOADED_AT_START", 0)


@pytest.fixture(scope="module")
def pair(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two adapters with files of the same sizes."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = (save_toy_adapter(folder / f"a{n}", writer, seed=n, lora_r=2) for n in range(2))
    return first, second


@pytest.fixture(scope="module")
def alone(writer: Path, pair: tuple[Path, Path]) -> list[list[int]]:
    """Return what each of them answers in a server that nobody disturbs."""
    with serving(make_settings({path.name: path for path in pair}, base=str(writer))) as live:
        answers = [get_ids(ask(live, path.name)) for path in pair]
    assert answers[0] != answers[1]
    return answers


def copy_adapter(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


# ---------------------------------------------------------------- files


def write_unseen(file: Path, content: bytes) -> None:
    """Change a file in place; its inode, size and times stay."""
    before = file.stat()
    assert len(content) == before.st_size
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_weights(folder: Path, other: Path) -> None:
    shutil.copy(other / WEIGHTS, folder / WEIGHTS)


def replace_weights_unseen(folder: Path, other: Path) -> None:
    write_unseen(folder / WEIGHTS, (other / WEIGHTS).read_bytes())


def replace_weights_and_record(folder: Path, other: Path) -> None:
    replace_weights_unseen(folder, other)
    shutil.copy(other / RECORD, folder / RECORD)


def cut_weights(folder: Path, _other: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def flip_a_bit(folder: Path, _other: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-2] ^= 64
    write_unseen(folder / WEIGHTS, bytes(content))


def link_weights(folder: Path, other: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(other / WEIGHTS)


def delete_folder(folder: Path, _other: Path) -> None:
    shutil.rmtree(folder)


CHANGES = (
    replace_weights,
    replace_weights_unseen,
    replace_weights_and_record,
    cut_weights,
    flip_a_bit,
    link_weights,
    delete_folder,
)


@pytest.mark.promise
@pytest.mark.usefixtures("_nothing_is_loaded_at_start")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_files_that_change_before_the_first_use_are_refused(
    change: Callable[[Path, Path], None],
    writer: Path,
    pair: tuple[Path, Path],
    alone: list[list[int]],
    tmp_path: Path,
) -> None:
    models = {"spoiled": copy_adapter(pair[0], tmp_path / "spoiled"), "other": pair[1]}
    with serving(make_settings(models, base=str(writer))) as live:
        change(models["spoiled"], pair[1])
        for _ in range(2):
            response = ask(live, "spoiled")
            assert response.status_code == 503, response.text
            error = response.json()["error"]
            assert error["code"] == "model_not_loaded"
            assert "spoiled cannot be loaded" in error["message"]
            assert str(tmp_path) not in error["message"]
        assert get_ids(ask(live, "other")) == alone[1]
        assert get_ids(ask(live, "base")) not in alone


@pytest.mark.usefixtures("_nothing_is_loaded_at_start")
def test_what_was_read_at_the_start_stays_as_it_was(
    writer: Path, pair: tuple[Path, Path], alone: list[list[int]], tmp_path: Path
) -> None:
    """Scale and template were read when the name was registered, and its digest stands for them."""
    folder = copy_adapter(pair[0], tmp_path / "a0")
    with serving(make_settings({"a0": folder}, base=str(writer))) as live:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 99}))
        (folder / "chat_template.jinja").write_text("{{ 'other' }}")
        (folder / RECORD).write_text("{}")
        assert get_ids(ask(live, "a0")) == alone[0]


# ---------------------------------------------------------------- memory


@pytest.mark.promise
@pytest.mark.usefixtures("_nothing_is_loaded_at_start")
def test_an_adapter_is_not_dropped_while_it_answers(
    writer: Path, pair: tuple[Path, Path], alone: list[list[int]]
) -> None:
    limits = {"adapters": (pair[0] / WEIGHTS).stat().st_size + 10}
    models = {path.name: path for path in pair}
    long = {"max_tokens": 48, "logit_bias": NO_END}
    with serving(make_settings(models, base=str(writer), limits=limits)) as live:
        undisturbed = get_ids(ask(live, "a0", **long))
        body = make_chat("a0", **(GREEDY | long), stream=True)
        with live.client() as http, http.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            other = ask(live, "a1")
            if other.status_code == 200:  # the engine was faster than the client
                assert get_ids(other) == alone[1]
            else:
                assert other.json()["error"]["code"] == "adapters_full"
            tokens: list[int] = []
            for line in lines:
                if line.startswith("data: {"):
                    tokens += json.loads(line[6:])["choices"][0].get("token_ids", [])
        assert tokens == undisturbed
        wait_for(lambda: not live.server.scheduler.num_active)
        assert get_ids(ask(live, "a1")) == alone[1]
        assert get_ids(ask(live, "a0")) == alone[0]


# ---------------------------------------------------------------- names that change during a load


@pytest.mark.usefixtures("_nothing_is_loaded_at_start")
@pytest.mark.parametrize("changes", ["put", "delete put", "put delete"])
def test_a_name_changes_while_its_adapter_is_loaded(
    changes: str,
    writer: Path,
    pair: tuple[Path, Path],
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who asked before has the old adapter and is told so, who asks after it the new one, and what
    no name points to is dropped."""
    settings = make_settings({"name": pair[0]}, base=str(writer), models_dir=pair[0].parent)
    with serving(settings) as live, ThreadPoolExecutor(8) as pool, live.client() as http:
        registry = live.server.registry
        scheduler = live.server.scheduler
        digest = http.get("/v1/models/name").json()["root"]
        go_on = threading.Event()
        load = registry._bank.load
        monkeypatch.setattr(
            registry._bank, "load", lambda *args: load(*args) if go_on.wait(WAIT_SECONDS) else 0
        )
        early = pool.submit(ask, live, "name")  # has its model when there is a load
        wait_for(lambda: registry._loads)
        steps = [pool.submit(change_name, live, changes.split())]
        wait_for(lambda: steps[0].done() or len(registry._loads) > 1)
        go_on.set()
        response = early.result(WAIT_SECONDS)
        assert response.headers["x-tunesmith-model"].endswith(digest[:12])
        assert get_ids(response) == alone[0]
        assert steps[0].result(WAIT_SECONDS) <= {200, 204}
        late = ask(live, "name")
        if changes.endswith("put"):
            assert get_ids(late) == alone[1]
        else:
            assert late.status_code == 404
        wait_for(lambda: len(registry._residents) == changes.endswith("put"))
        idle = live.call(scheduler.run_between_steps, lambda: len(scheduler._batch.bank.keys))
        assert idle == changes.endswith("put")


def change_name(live: LiveServer, changes: list[str]) -> set[int]:
    """Delete the name, or let it point to the other adapter; return the status codes."""
    codes: set[int] = set()
    with live.client() as http:
        for change in changes:
            if change == "delete":
                codes.add(http.delete("/admin/models/name").status_code)
            else:
                codes.add(http.put("/admin/models/name", json={"from": "a1"}).status_code)
    return codes
