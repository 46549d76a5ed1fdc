"""Clients that leave, queues that are full, weights that break, and an engine that dies."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from uvicorn.server import ServerState

from tiny_server import (
    START_SECONDS,
    LiveServer,
    break_adapter,
    make_chat,
    make_settings,
    pausing_engine,
    read_events,
    read_metric,
    serving,
    wait_for,
)
from tunesmith.serve import formats
from tunesmith.serve import server as serve_server
from tunesmith.serve.server import TimedProtocol
from tunesmith.serve.settings import ServeSettings

pytestmark = pytest.mark.promise


NO_END = {"257": -100, "258": -100}
CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"max_tokens": 250, "logit_bias": NO_END}


@pytest.fixture
def narrow(writer: Path, adapters: dict[str, Path]) -> Iterator[LiveServer]:
    """Return a server with two rows and three places to wait."""
    limits = {"rows": 2, "waiting": 3, "wait": "1h", "request": "1h"}
    models = {"small": adapters["small"], "large": adapters["large"]}
    with serving(make_settings(models, base=str(writer), limits=limits)) as server:
        yield server


def count_active(live: LiveServer) -> int:
    return live.server.scheduler.num_active


def count_rows(live: LiveServer) -> int:
    return live.call(_count_rows, live)


async def _count_rows(live: LiveServer) -> int:
    scheduler = live.server.scheduler
    batch = scheduler._batch
    return await scheduler.run_between_steps(lambda: len(batch.rows) + len(batch.waiting))


# ---------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(is_stream: bool, narrow: LiveServer) -> None:
    host, port = narrow.url.removeprefix("http://").split(":")
    body = json.dumps(make_chat("small", stream=is_stream, n=2, **LONG)).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + body)
    wait_for(lambda: count_rows(narrow) == 2)
    connection.close()
    wait_for(lambda: count_active(narrow) == 0)
    assert count_rows(narrow) == 0
    registry = narrow.server.registry
    assert all(resident.num_leases == 0 for resident in registry._residents.values())


def test_a_client_that_leaves_while_it_waits(narrow: LiveServer) -> None:
    state = narrow.server.scheduler._state
    with ThreadPoolExecutor(2) as pool:
        with pausing_engine(narrow):  # both begin at once
            running = [pool.submit(post_long, narrow) for _ in range(2)]
            wait_for(lambda: count_active(narrow) == 2)
        wait_for(lambda: len(state.running) == 2)
        with pausing_engine(narrow):
            with pytest.raises(httpx.ReadTimeout):
                post_long(narrow, timeout=httpx.Timeout(START_SECONDS, read=0.5))
            wait_for(lambda: count_active(narrow) == 2)
        assert [row.result().status_code for row in running] == [200, 200]
    wait_for(lambda: count_active(narrow) == 0)


@pytest.mark.parametrize("has_asked", [False, True], ids=["first", "after an answer"])
@pytest.mark.parametrize("sent", ["", "GET /v1/mod"])
def test_a_connection_without_a_request_is_closed(
    narrow: LiveServer, sent: str, has_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_server, "HEAD_SECONDS", 0.3)
    # uvicorn closes idle connections, too, after an answer
    monkeypatch.setattr(TimedProtocol, "timeout_keep_alive_handler", lambda _: None)
    host, port = narrow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=START_SECONDS) as connection:
        if has_asked:
            connection.sendall(f"GET /health HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
        connection.sendall(sent.encode())
        while connection.recv(10_000):
            pass


@contextmanager
def answering_nobody(live: LiveServer, *bodies: Any) -> Iterator[socket.socket]:
    """Send requests on one connection, whose answers are not read."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((host, int(port)))
        for body in bodies:
            content = json.dumps(body).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
        yield connection


@pytest.fixture
def unbuffered(writer: Path, adapters: dict[str, Path]) -> Iterator[LiveServer]:
    """Return a server whose connections hold little that a client has not read."""
    settings = make_settings({"small": adapters["small"]}, base=str(writer))
    prepare = serve_server.prepare_server

    def prepare_with_small_buffers(settings: ServeSettings) -> serve_server.PreparedServer:
        prepared = prepare(settings)
        prepared.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return prepared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_server, "prepare_server", prepare_with_small_buffers)
        with serving(settings) as server:
            yield server


LARGE = make_chat("base", logprobs=True, top_logprobs=20, max_tokens=150, logit_bias=NO_END)


@pytest.mark.parametrize("is_left", [True, False], ids=["left", "stays"])
def test_a_stream_that_cannot_begin_holds_nothing(
    unbuffered: LiveServer, is_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its response waits for an earlier one on the connection that the client does not read."""
    if not is_left:
        monkeypatch.setattr(formats, "WRITE_SECONDS", 0.1)
    registry = unbuffered.server.registry
    stream = make_chat("small", stream=True, **LONG)
    with answering_nobody(unbuffered, LARGE, stream) as connection:
        wait_for(lambda: any(r.num_leases for r in registry._residents.values()))
        if is_left:
            connection.close()
        wait_for(lambda: not any(r.num_leases for r in registry._residents.values()))
    wait_for(lambda: count_rows(unbuffered) == 0)


def test_an_answer_that_is_not_read_is_thrown_away(
    unbuffered: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_server, "HEAD_SECONDS", 0.5)
    is_lost = threading.Event()
    lose = TimedProtocol.connection_lost

    def note_loss(protocol: TimedProtocol, error: Exception | None) -> None:
        lose(protocol, error)
        is_lost.set()

    monkeypatch.setattr(TimedProtocol, "connection_lost", note_loss)
    with answering_nobody(unbuffered, LARGE) as connection:
        wait_for(lambda: read_metric(unbuffered, "requests_total", code="200") == 1)
        connection.settimeout(START_SECONDS)
        assert is_lost.wait(START_SECONDS)
        num_bytes = 0
        with suppress(ConnectionResetError):
            while part := connection.recv(2**20):
                num_bytes += len(part)
    assert num_bytes < 50_000  # of 170,000: what the system had taken already


class StubLoop:
    """Keeps the last callback, for a test to call when it is time."""

    def call_later(self, _seconds: float, callback: Callable[..., None], *arguments: Any) -> None:
        self.pass_time = functools.partial(callback, *arguments)


class StubTransport(asyncio.Transport):
    unsent = 0
    was_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self.was_aborted = True


@pytest.mark.parametrize(
    ("sizes", "is_aborted"),
    [((900, 900, 700, 700, 800), False), ((900, 800, 800, 800), True), ((0,) * 5, False)],
)
def test_a_slow_client_is_not_cut_off_for_a_size_that_comes_again(
    sizes: tuple[int, ...], is_aborted: bool
) -> None:
    """A long stream fills up what a slow client takes, so one equal size may be chance."""
    loop: Any = StubLoop()
    transport = StubTransport()
    config = uvicorn.Config(Starlette(), log_config=None)
    protocol = serve_server.TimedProtocol(config, ServerState(), {}, loop)
    protocol.connection_made(transport)
    answering: Any = SimpleNamespace(response_complete=False)
    protocol.cycle = answering
    for size in sizes:
        assert not transport.was_aborted
        transport.unsent = size
        loop.pass_time()
    assert transport.was_aborted == is_aborted


# ---------------------------------------------------------------- too much work


def test_a_full_queue_is_429_with_a_time(narrow: LiveServer) -> None:
    with ThreadPoolExecutor(12) as pool:
        with pausing_engine(narrow):
            posted = [pool.submit(post_long, narrow) for _ in range(12)]
            wait_for(lambda: count_active(narrow) + count_done(posted) == 12)
        responses = [future.result() for future in posted]
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200] * 5 + [429] * 7  # two rows and three places
    for response in responses:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full"
    assert count_active(narrow) == 0
    state = narrow.server.scheduler._state
    assert state.backlog.waiting_tokens == 0


def post_long(live: LiveServer, **more: Any) -> httpx.Response:
    with live.client() as http:
        return http.post(CHAT, json=make_chat("base", **LONG), **more)


def count_done(futures: Sequence[Future[Any]]) -> int:
    return sum(future.done() for future in futures)


def test_a_request_has_a_deadline(writer: Path) -> None:
    settings = make_settings({}, base=str(writer), limits={"request": 0.05})
    with serving(settings) as live, live.client() as http:
        response = http.post(CHAT, json=make_chat("base", **LONG))
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        streamed = http.post(CHAT, json=make_chat("base", stream=True, **LONG))
        assert streamed.status_code == 200
        last = json.loads(read_events(streamed.text.splitlines())[-1])
        assert last["error"]["code"] == "timeout"
        assert "[DONE]" not in streamed.text
        wait_for(lambda: count_rows(live) == 0)


# ---------------------------------------------------------------- what breaks


def test_a_broken_adapter_fails_alone(narrow: LiveServer) -> None:
    greedy = {"temperature": 0, "max_tokens": 20, "logit_bias": NO_END}
    with narrow.client() as http:
        expected = http.post(CHAT, json=make_chat("large", **greedy)).json()["choices"]
        http.post(CHAT, json=make_chat("small", **greedy))
        break_adapter(narrow, "small")
        with ThreadPoolExecutor(2) as pool:
            healthy = pool.submit(http.post, CHAT, json=make_chat("large", **greedy))
            response = http.post(CHAT, json=make_chat("small", **greedy))
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "model_not_finite"
            assert healthy.result().json()["choices"] == expected
        assert http.post(CHAT, json=make_chat("large", **greedy)).json()["choices"] == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_seen_at_once(narrow: LiveServer) -> None:
    scheduler = narrow.server.scheduler

    def die() -> None:
        raise ZeroDivisionError("on purpose")

    with narrow.client() as http:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(http.post, CHAT, json=make_chat("base", **LONG))
            wait_for(lambda: count_active(narrow) == 1)
            scheduler.put_command(die)
            assert running.result().status_code == 503
        wait_for(lambda: not scheduler.is_alive)
        assert http.get("/health").status_code == 500
        assert http.get("/ready").status_code == 503
        response = http.post(CHAT, json=make_chat("base"))
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_stopped"
    assert scheduler.has_died.is_set()


def test_a_drain_takes_nothing_new_and_finishes_what_runs(narrow: LiveServer) -> None:
    with narrow.client() as http, ThreadPoolExecutor(1) as pool:
        with pausing_engine(narrow):
            running = pool.submit(post_long, narrow)
            wait_for(lambda: count_active(narrow) == 1)
            assert http.post("/admin/drain", json={}).json() == {"active": 1}
            refused = http.post(CHAT, json=make_chat("base"))
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert http.get("/ready").json() == {"state": "draining"}
            assert http.get("/health").status_code == 200
        assert running.result().status_code == 200


def test_every_token_is_accounted(live: LiveServer) -> None:
    def read_counts() -> dict[str, float]:
        with live.client() as http:
            text = http.get("/metrics").text
        start = 'tunesmith_tokens_total{kind="'
        return {
            line.removeprefix(start).split('"')[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith(start) and 'model="large"' in line
        }

    before = read_counts()
    usage = {"prompt": 0, "answer": 0}
    for seed in range(8):
        with live.client() as http:
            answer = http.post(CHAT, json=make_chat("large", seed=seed, n=2, max_tokens=9)).json()
        usage["prompt"] += answer["usage"]["prompt_tokens"]
        usage["answer"] += answer["usage"]["completion_tokens"]
    after = read_counts()
    for kind, count in usage.items():
        assert after[kind] - before.get(kind, 0) == count


def test_many_clients_of_many_adapters_get_each_its_own(live: LiveServer) -> None:
    """120 answers to 24 clients, each as it is alone."""
    models = ("small", "large", "dora")

    def ask(http: httpx.Client, model: str) -> str:
        response = http.post(CHAT, json=make_chat(model, temperature=0, max_tokens=2))
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    with live.client() as http:
        alone = {model: ask(http, model) for model in models}
    assert len(set(alone.values())) == 3
    asked = random.Random(1).choices(models, k=120)

    def ask_some(start: int) -> list[bool]:
        with live.client() as http:
            return [ask(http, model) == alone[model] for model in asked[start::24]]

    with ThreadPoolExecutor(24) as pool:
        same = list(itertools.chain.from_iterable(pool.map(ask_some, range(24))))
    assert same == [True] * 120
