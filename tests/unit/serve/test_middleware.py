"""Who gets in: keys, scopes, hosts, origins, content types, sizes. Everything else is denied."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tiny_server import LiveServer, make_chat, make_settings, serving
from tunesmith.core.errors import InputError
from tunesmith.serve.app import ROUTES, find_scope
from tunesmith.serve.keys import add_key
from tunesmith.serve.middleware import list_hosts
from tunesmith.serve.server import prepare_keys

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def secrets(keys_file: Path) -> dict[str, str]:
    """Return a key for each kind of user."""
    return {
        "user": add_key(keys_file, "user")[0],
        "limited": add_key(keys_file, "limited", models=("small",))[0],
        "watcher": add_key(keys_file, "watcher", scopes=("metrics",))[0],
        "boss": add_key(keys_file, "boss", scopes=("admin",))[0],
    }


@pytest.fixture(scope="module")
def guarded(
    writer: Path, adapters: dict[str, Path], keys_file: Path, secrets: dict[str, str]
) -> Iterator[LiveServer]:
    settings = make_settings({"small": adapters["small"]}, base=str(writer), keys=keys_file)
    assert secrets
    with serving(settings) as server:
        yield server


def send(
    server: LiveServer, method: str, path: str, key: str = "", body: Any = None, **headers: str
) -> httpx.Response:
    all_headers = {name.replace("_", "-"): text for name, text in headers.items()}
    if key:
        all_headers["authorization"] = f"Bearer {key}"
    with server.client() as http:
        return http.request(method, path, json=body, headers=all_headers)


@pytest.mark.parametrize("endpoint", ROUTES, ids=lambda endpoint: endpoint.path)
@pytest.mark.parametrize("key", ["", "tsk_wrong"])
def test_every_route_needs_a_key(endpoint: Any, key: str, guarded: LiveServer) -> None:
    path = endpoint.path.replace("{model}", "base")
    response = send(guarded, endpoint.method, path, key, {} if endpoint.body else None)
    if endpoint.scope is None:
        assert endpoint.path == "/health"
        assert response.status_code == 200
        assert response.json() == {}
    else:
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/v1/nothing", "/admin", "//"])
@pytest.mark.parametrize("method", ["GET", "POST", "TRACE"])
def test_paths_that_are_not_there_say_nothing(
    path: str, method: str, guarded: LiveServer, secrets: dict[str, str]
) -> None:
    assert send(guarded, method, path).status_code == 401
    body = {} if method in ("POST", "TRACE") else None
    assert send(guarded, method, path, secrets["user"], body).status_code in (404, 405)


def test_a_websocket_is_refused() -> None:
    """Directly: the server itself speaks HTTP only."""
    from tunesmith.serve.keys import KeyRing
    from tunesmith.serve.metrics import ServerMetrics
    from tunesmith.serve.middleware import AccessMiddleware, AccessRules

    sent: list[Any] = []

    async def send_message(message: Any) -> None:
        sent.append(message)

    async def refuse(*_: Any) -> None:
        raise AssertionError("the application was called")

    rules = AccessRules(KeyRing(None), (), 100, find_scope)
    scope: Any = {"type": "websocket", "path": "/v1/chat/completions", "headers": []}
    guard = AccessMiddleware(refuse, rules, ServerMetrics())
    asyncio.run(guard(scope, refuse, send_message))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_scopes(guarded: LiveServer, secrets: dict[str, str]) -> None:
    expected = {
        "user": {"infer"},
        "watcher": {"metrics"},
        "boss": {"infer", "feedback", "metrics", "admin"},
    }
    for endpoint in ROUTES:
        path = endpoint.path.replace("{model}", "base")
        for name, scopes in expected.items():
            if endpoint.path == "/admin/drain" and name == "boss":
                continue
            body = {} if endpoint.method in ("POST", "PUT") else None
            status = send(guarded, endpoint.method, path, secrets[name], body).status_code
            if endpoint.scope is not None:
                assert (status == 403) == (endpoint.scope not in scopes), (endpoint.path, name)


@pytest.mark.parametrize("end", ["%0A", "%0a", "%0D", "%00", "/", "%2F", ";x", "%20"])
def test_a_path_that_looks_like_another_needs_its_scope(
    end: str, guarded: LiveServer, secrets: dict[str, str]
) -> None:
    """The router takes a path with a line break at its end for the path."""
    for method, path in (("POST", "/admin/drain"), ("GET", "/admin/routes"), ("GET", "/metrics")):
        body = {} if method == "POST" else None
        response = send(guarded, method, path + end, secrets["user"], body)
        assert response.status_code in (403, 404), (path + end, response.text)
        assert send(guarded, method, path + end, "", body).status_code == 401
    assert not guarded.server.scheduler.is_draining


def test_models_of_others_are_not_there(guarded: LiveServer, secrets: dict[str, str]) -> None:
    key = secrets["limited"]
    listed = send(guarded, "GET", "/v1/models", key).json()["data"]
    assert [model["id"] for model in listed] == ["small"]
    assert send(guarded, "GET", "/v1/models/base", key).status_code == 404
    other = send(guarded, "POST", CHAT, key, make_chat("base", max_tokens=1))
    missing = send(guarded, "POST", CHAT, key, make_chat("nope", max_tokens=1))
    assert other.status_code == missing.status_code == 404
    assert other.text.replace("base", "") == missing.text.replace("nope", "")
    assert send(guarded, "POST", CHAT, key, make_chat("small", max_tokens=1)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": "localhost:1"}, 421),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"content_type": "text/plain"}, 415),
        ({"content_type": "application/x-www-form-urlencoded"}, 415),
        ({"content_type": ""}, 415),
    ],
)
def test_pages_of_other_sites_are_refused(
    headers: dict[str, str], status: int, guarded: LiveServer, secrets: dict[str, str]
) -> None:
    response = send(guarded, "POST", CHAT, secrets["user"], make_chat("base"), **headers)
    assert response.status_code == status
    assert "error" in response.json()
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_this_machines_names_are_served(guarded: LiveServer, secrets: dict[str, str]) -> None:
    port = guarded.url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "LOCALHOST"):
        response = send(
            guarded, "POST", CHAT, secrets["user"], make_chat("base", max_tokens=1),
            host=host, origin=f"http://{host}", sec_fetch_site="same-origin",
        )  # fmt: skip
        assert response.status_code == 200
    assert "evil.example" not in list_hosts("127.0.0.1", 8000)


def test_a_body_with_two_lengths_hides_no_request(
    guarded: LiveServer, secrets: dict[str, str]
) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    key = f"Host: {host}:{port}\r\nAuthorization: Bearer {secrets['user']}\r\n"
    hidden = f"GET /v1/models HTTP/1.1\r\n{key}\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\n{key}Content-Type: application/json\r\n"
    lengths = f"Content-Length: {len(hidden) + 5}\r\nTransfer-Encoding: chunked\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}{lengths}\r\n0\r\n\r\n{hidden}".encode())
        replies = b"".join(iter(lambda: connection.recv(10_000), b""))
    assert replies.startswith(b"HTTP/1.1 400")
    assert replies.count(b"HTTP/1.1") == 1


def test_no_path_is_redirected(guarded: LiveServer, secrets: dict[str, str]) -> None:
    with guarded.client(headers={"authorization": f"Bearer {secrets['user']}"}) as http:
        assert http.get("/v1/models/").status_code == 404
        assert http.post(f"{CHAT}/", json=make_chat("base")).status_code == 404


@pytest.mark.promise
def test_bodies_are_bounded(guarded: LiveServer, secrets: dict[str, str]) -> None:
    headers = {"authorization": f"Bearer {secrets['user']}", "content-type": "application/json"}

    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * 10_000

    with guarded.client(headers=headers) as http:
        large = http.post(CHAT, content=b" " * 2_000_000)
        assert large.status_code == 413
    # the connection may be closed while the client still sends
    closed = (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError)
    with suppress(*closed), guarded.client(headers=headers) as http:
        assert http.post(CHAT, content=endless()).status_code == 413
    messages = [{"role": "user", "content": "x"}] * 20_000
    with guarded.client(headers=headers) as http:
        many = http.post(CHAT, json={"model": "base", "messages": messages})
        assert many.status_code == 400
        nested = http.post(CHAT, content=b"[" * 100_000)
        assert nested.status_code == 400
        assert http.get("/v1/models").status_code == 200


def test_other_hosts_need_a_key_before_the_start(tmp_path: Path) -> None:
    settings = make_settings({}, base="x", keys=tmp_path / "keys.json", host="0.0.0.0")
    with pytest.raises(InputError, match="there is no API key"):
        prepare_keys(settings)
    assert not (tmp_path / "keys.json").exists()
    secret, _ = add_key(tmp_path / "keys.json", "ci")
    ring, new_key = prepare_keys(settings)
    assert new_key == ""
    assert ring.find(f"Bearer {secret}") is not None


def test_the_first_start_on_this_machine_makes_a_key(tmp_path: Path) -> None:
    settings = make_settings({}, base="x", keys=tmp_path / "keys.json")
    ring, new_key = prepare_keys(settings)
    found_key = ring.find(f"Bearer {new_key}")
    assert found_key is not None
    assert found_key.has_scope("admin")
    assert prepare_keys(settings)[1] == ""


def test_logs_metrics_and_errors_hold_no_content_and_no_key(
    guarded: LiveServer, secrets: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    marker = "xylophone"
    texts: list[str] = []
    for body in (
        make_chat("small", marker, user=marker, metadata={"a": marker}, max_tokens=2),
        make_chat("base", [{"type": marker}]),  # type: ignore[arg-type]
        make_chat("base", stop=marker * 100),
        {marker: 1},
    ):
        texts.append(send(guarded, "POST", f"{CHAT}?q={marker}", secrets["user"], body).text)
    assert marker not in texts[1]
    assert marker not in texts[2]
    metrics = send(guarded, "GET", "/metrics", secrets["boss"]).text
    ours = [r for r in caplog.records if r.name.startswith(("tunesmith", "uvicorn.error"))]
    logged = "\n".join(record.getMessage() for record in ours)
    for text in (metrics, logged):
        assert marker not in text
        for secret in secrets.values():
            assert secret not in text
    lines: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60  # a line is written after its response is sent
    while len(lines) < 5 and time.monotonic() < deadline:
        records = [r for r in caplog.records if r.name == "tunesmith.access"]
        lines = [json.loads(record.getMessage()) for record in records]
    assert len(lines) == 5
    answered = lines[0]
    assert answered["key"] == "user"
    assert answered["model"].startswith("small@1#")
    assert answered["status"] == 200
    assert answered["tokens"][2] in (1, 2)
    assert [line["status"] for line in lines] == [200, 400, 400, 400, 200]
    assert 'tunesmith_requests_total{code="200",model="small"}' in metrics


def test_stored_prompts_are_of_one_key(guarded: LiveServer, secrets: dict[str, str]) -> None:
    """A prompt that another key has sent is no faster, which would tell that it was sent."""

    def count_cached(key: str, model: str) -> int:
        body = make_chat(model, "a secret that another key has sent " * 5, max_tokens=1)
        usage = send(guarded, "POST", CHAT, secrets[key], body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert count_cached("user", "small") == 0
    assert count_cached("user", "small") >= 64
    assert count_cached("limited", "small") == 0
    assert count_cached("boss", "small") == 0
    assert count_cached("user", "base") == 0  # nor of another adapter
    assert count_cached("user", "small") >= 64
