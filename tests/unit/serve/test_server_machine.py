"""Adapters that come, go and are dropped while requests start, end and leave, in any order: each
answer is the one that its adapter gives alone, and leases, pages and memory balance."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tiny_server import LiveServer, make_chat, make_settings, save_toy_adapter, serving, wait_for

CHAT = "/v1/chat/completions"
NAMES = ("one", "two", "three")
SOURCES = ("a0", "a1", "a2", "a3")
PROMPTS = ("hi", "the same long beginning of a prompt " * 4)
SCALES = (1.0, 0.5)
NO_END = {"257": -100, "258": -100}
ROOM = 2  # adapters that fit in memory
MAX_STREAMS = 4


@dataclass
class Stream:
    """A request whose events are not read yet, and the answer that it must have."""

    response: httpx.Response
    text: str
    digest: str


@dataclass
class Lab:
    """A server with little memory, and what each adapter answers alone."""

    live: LiveServer
    http: httpx.Client
    alone: dict[tuple[str, float, str, int], str]  # source, scale, prompt, tokens
    digests: dict[str, str]
    num_bytes: int  # of an adapter


@pytest.fixture(scope="module")
def lab(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    root = tmp_path_factory.mktemp("machine")
    first = save_toy_adapter(root / "a0", writer, seed=10, lora_r=2)
    for index, source in enumerate(SOURCES[1:]):
        save_toy_adapter(root / source, writer, seed=11 + index, lora_r=2)
    file_bytes = (first / "adapter_model.safetensors").stat().st_size
    limits = {"adapters": ROOM * file_bytes + 10, "rows": 3, "wait": "1h"}
    options: Any = {"base": str(writer), "models_dir": root, "limits": limits}
    with serving(make_settings({}, **options)) as live, live.client() as http:
        alone: dict[tuple[str, float, str, int], str] = {}
        digests: dict[str, str] = {}
        for source in SOURCES:
            for scale in SCALES:
                body = {"from": source, "scale": scale}
                added = http.put("/admin/models/alone", json=body).raise_for_status()
                digests[source] = added.json()["root"]
                for prompt in PROMPTS:
                    for tokens in (2, 40):
                        body = make_body("alone", prompt, tokens)
                        answer = http.post(CHAT, json=body).raise_for_status().json()
                        text = answer["choices"][0]["message"]["content"]
                        alone[source, scale, prompt, tokens] = text
                http.delete("/admin/models/alone").raise_for_status()
        yield Lab(live, http, alone, digests, file_bytes)
    shutil.rmtree(root)


def make_body(name: str, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    return make_chat(name, prompt, temperature=0, max_tokens=tokens, logit_bias=NO_END, **more)


class ServerMachine(RuleBasedStateMachine):
    lab: Lab

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, tuple[str, float]] = {}
        self.streams: list[Stream] = []

    @property
    def scheduler(self) -> Any:
        return self.lab.live.server.scheduler

    @rule(
        name=some.sampled_from(NAMES),
        source=some.sampled_from(SOURCES),
        scale=some.sampled_from(SCALES),
        is_pinned=some.booleans(),
    )
    def put(self, name: str, source: str, scale: float, is_pinned: bool) -> None:
        body = {"from": source, "scale": scale, "pin": is_pinned and name == NAMES[0]}
        response = self.lab.http.put(f"/admin/models/{name}", json=body)
        if response.status_code == 503:  # the old one serves on
            assert response.json()["error"]["code"] == "adapters_full"
            return
        assert response.status_code == 200, response.text
        assert response.json()["root"] == self.lab.digests[source]
        self.models[name] = (source, scale)

    @rule(name=some.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        response = self.lab.http.delete(f"/admin/models/{name}")
        assert response.status_code == (204 if name in self.models else 404)
        self.models.pop(name, None)

    @precondition(lambda self: len(self.streams) < MAX_STREAMS)
    @rule(
        name=some.sampled_from(NAMES),
        prompt=some.sampled_from(PROMPTS),
        tokens=some.sampled_from([2, 40]),
    )
    def submit(self, name: str, prompt: str, tokens: int) -> None:
        body = make_body(name, prompt, tokens, stream=True)
        request = self.lab.http.build_request("POST", CHAT, json=body)
        response = self.lab.http.send(request, stream=True)
        if response.status_code != 200:
            error = json.loads(response.read())["error"]
            expected = "server_shutdown" if self.scheduler.is_draining else "adapters_full"
            expected = expected if name in self.models else "model_not_found"
            assert error["code"] == expected, error
            return
        source, scale = self.models[name]
        digest = self.lab.digests[source]
        version = response.headers["x-tunesmith-model"]
        assert version == f"{name}@{scale:g}#{digest[:12]}"
        text = self.lab.alone[source, scale, prompt, tokens]
        self.streams.append(Stream(response, text, digest))

    @precondition(lambda self: self.streams)
    @rule(index=some.integers(0, MAX_STREAMS))
    def finish(self, index: int) -> None:
        stream = self.streams.pop(index % len(self.streams))
        text = ""
        for line in stream.response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        assert text == stream.text

    @precondition(lambda self: self.streams)
    @rule(index=some.integers(0, MAX_STREAMS))
    def leave(self, index: int) -> None:
        self.streams.pop(index % len(self.streams)).response.close()

    @rule()
    def drain(self) -> None:
        """Take nothing new; what runs goes on. The next call of the rule ends it."""
        self.scheduler.is_draining = not self.scheduler.is_draining

    @invariant()
    def check_memory(self) -> None:
        registry = self.lab.live.server.registry
        assert registry.count_bytes() <= ROOM * self.lab.num_bytes + 10
        leases = sum(resident.num_leases for resident in registry._residents.values())
        assert leases <= MAX_STREAMS * 2  # those that just left, too

    def teardown(self) -> None:
        self.scheduler.is_draining = False
        while self.streams:
            self.finish(0)
        registry = self.lab.live.server.registry
        wait_for(lambda: self.scheduler.num_active == 0)
        wait_for(lambda: not any(r.num_leases for r in list(registry._residents.values())))
        for name in list(self.models):
            self.remove(name)
        assert registry._residents == {}
        batch = self.scheduler._batch
        idle = self.lab.live.call(
            self.scheduler.run_between_steps, lambda: (len(batch.rows), batch.bank.keys)
        )
        assert idle == (0, ())
        pool = batch.cache.pool
        assert pool.num_available == pool.num_blocks


@pytest.mark.slow
def test_models_and_requests_in_any_order(lab: Lab) -> None:
    with contextlib.ExitStack() as cleanup:
        ServerMachine.lab = lab
        cleanup.callback(lambda: delattr(ServerMachine, "lab"))
        run_state_machine_as_test(
            ServerMachine,
            settings=settings(
                max_examples=25,
                stateful_step_count=16,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
