"""Servers that fail, lie or hang: each ends in one sentence, and with the exit code of its kind."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from transformers_server import MODEL, Fault, serving
from tunesmith.cli import app
from tunesmith.core.errors import InputError, MachineError, TunesmithError
from tunesmith.evaluate.verify import server_client
from tunesmith.evaluate.verify.server_client import LiveClient, choose_model, open_request_pool

KEY = "sk-very-secret-key"
SILENCE = 60.0  # seconds, longer than anybody waits
PATH = "/chat/completions"


def ask(url: str, *, key: str = "", seconds: float = SILENCE) -> Any:
    return LiveClient(url, key, timeout_seconds=seconds).request_json(PATH, {"model": MODEL})


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (Fault(500, content=b'{"error": {"message": "CUDA"}}'), MachineError, "status 500: CUDA"),
        (Fault(502, content=b"<html>bad gateway</html>"), MachineError, "status 502"),
        (Fault(400, content=b'{"error": "no such field"}'), InputError, "no such field"),
        (Fault(404, content=b'{"detail": "Not Found"}'), InputError, "status 404: Not Found"),
        (Fault(403), InputError, "status 403"),
        (Fault(302, {"Location": "http://127.0.0.1:1/"}), InputError, "redirects are not followed"),
        (Fault(418), InputError, "status 418"),
        (Fault(content=b"<html>hello</html>"), InputError, "the reply is not JSON"),
        (Fault(content=b"[1, 2]"), InputError, "not a JSON object"),
        (Fault(content=b"[" * 10**5), InputError, "the reply is not JSON"),
        (
            Fault(headers={"Content-Encoding": "gzip"}, content=gzip.compress(b"{}")),
            InputError,
            "JSON",
        ),
        (Fault(content=b'{"a": 1', is_cut=True), MachineError, "received 7 bytes, expected 24"),
    ],
    ids=lambda value: None if isinstance(value, Fault | type) else str(value)[:24],
)
def test_a_failing_server_is_named(fault: Fault, kind: type[TunesmithError], message: str) -> None:
    with serving(None, fault=fault) as live, pytest.raises(kind, match=message) as error:
        ask(live.url)
    assert error.value.where == f"{live.url}{PATH}"
    assert error.value.fix


def test_a_server_that_hangs_is_given_up() -> None:
    with serving(None, fault=Fault(seconds=SILENCE)) as live:
        started = time.monotonic()
        with pytest.raises(MachineError, match=r"no complete reply within 0\.3 s"):
            ask(live.url, seconds=0.3)
        assert time.monotonic() - started < SILENCE / 2


def test_an_endless_reply_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "MAX_REPLY_BYTES", 2**20)
    with (
        serving(None, fault=Fault(is_endless=True)) as live,
        pytest.raises(MachineError, match="longer than 1 MiB"),
    ):
        ask(live.url)


@contextmanager
def raw_server(content: bytes, pause: float = 0.0, first: bytes = b"") -> Iterator[str]:
    """A server that sends bytes one by one after the first ones, whatever it is asked."""
    listener = socket.create_server(("127.0.0.1", 0))

    def send() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(2**16)
            try:
                connection.sendall(first)
                for byte in content:
                    connection.sendall(bytes([byte]))
                    time.sleep(pause)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(2**16):  # unread bytes would reset the connection
                    pass
            except OSError:
                return

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nff\r\n",
    ],
    ids=["status", "head", "until the end", "length", "chunks"],
)
def test_bytes_that_trickle_in_have_one_deadline(first: bytes) -> None:
    content = b"HTTP/1.1 200 OK".ljust(2000)
    with raw_server(content, pause=0.05, first=first) as url:
        started = time.monotonic()
        with pytest.raises(MachineError, match=r"no complete reply within 0\.4 s"):
            ask(url, seconds=0.4)
        assert time.monotonic() - started < SILENCE / 2


def test_what_is_no_http_is_named() -> None:
    with raw_server(b"SSH-2.0-OpenSSH_9.6\r\n") as url, pytest.raises(MachineError, match="HTTP"):
        ask(url)


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(MachineError, match="nothing answers there"):
        ask(f"http://127.0.0.1:{port}/v1")


def test_a_busy_server_is_asked_again() -> None:
    fault = Fault(429, {"Retry-After": "0"}, times=2, has_models=False)
    with serving(None, fault=fault) as live:
        assert LiveClient(live.url).list_models() == (MODEL,)
    assert len(live.requests) == 3


def test_a_server_that_stays_busy_is_given_up() -> None:
    fault = Fault(503, {"Retry-After": "0"})
    with serving(None, fault=fault) as live, pytest.raises(MachineError, match="status 503"):
        ask(live.url)
    assert len(live.requests) == 1 + server_client.MAX_RETRIES


# ---------------------------------------------------------------- the key


def test_the_key_is_sent_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(None, key="another") as live, pytest.raises(InputError) as error:
        ask(live.url, key=KEY)
    assert live.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    # the server quotes it
    assert "status 401: no such key: Bearer ***" in error.value.message
    assert KEY not in str(error.value) + caplog.text
    assert KEY not in repr(LiveClient(live.url, KEY))


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_holds_is_refused_unquoted(key: str) -> None:
    with pytest.raises(InputError) as error:
        LiveClient("http://localhost/v1", key)
    assert key not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "ftp://localhost/v1",
        "http://",
        "http://localhost:99999/v1",
        "http://localhost/v1?key=1",
        "http://local host/v1",
        "http://localhost/v1\r\nX: y",
        "file:///etc/passwd",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError):
        LiveClient(url)


def test_a_password_in_the_url_is_refused_unquoted() -> None:
    with pytest.raises(InputError, match="user or password") as error:
        LiveClient("http://me:hunter2@localhost/v1")
    assert "hunter2" not in str(error.value)


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with serving(None) as live:
        assert LiveClient(live.url).list_models() == (MODEL,)


def test_a_key_variable_that_is_not_set(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "run", "--url", "http://localhost/v1", "--key-env", "NO_SUCH_KEY", "--json"]
    with pytest.raises(SystemExit) as ended:
        app.main(words)
    assert ended.value.code == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["where"], error["exit_code"]) == ("--key-env", 2)


# ---------------------------------------------------------------- the model


def test_the_model_is_the_only_one_or_the_named_one() -> None:
    with serving(None) as live:
        client = LiveClient(live.url)
        assert choose_model(client, None) == MODEL
        assert choose_model(client, MODEL) == MODEL
        assert choose_model(client, f"{MODEL}:adapter") == f"{MODEL}:adapter"
        with pytest.raises(InputError, match="has no model 'other'") as error:
            choose_model(client, "other")
    assert error.value.fix == f"--model takes one of: {MODEL}"


def test_a_server_without_a_list_needs_a_name() -> None:
    with serving(None, fault=Fault(404, has_models=False)) as live:
        client = LiveClient(live.url)
        assert choose_model(client, "mine") == "mine"
        with pytest.raises(InputError, match="does not list its models"):
            choose_model(client, None)


def test_a_list_of_something_else_is_refused() -> None:
    fault = Fault(content=b'{"data": [{"name": "x"}]}', has_models=False)
    with serving(None, fault=fault) as live, pytest.raises(InputError, match=r"data\.0\.id"):
        choose_model(LiveClient(live.url), None)


def test_an_empty_list_is_no_model() -> None:
    fault = Fault(content=b'{"data": []}', has_models=False)
    with serving(None, fault=fault) as live, pytest.raises(InputError, match="lists no model"):
        choose_model(LiveClient(live.url), None)


def test_ctrl_c_waits_for_no_reply() -> None:
    is_answered = threading.Event()

    def interrupt_a_request() -> None:
        with open_request_pool(2) as pool:
            pool.submit(is_answered.wait, 60)
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupt_a_request()
    assert time.monotonic() - start < 30
    is_answered.set()
