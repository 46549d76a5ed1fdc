"""Adapters come, go and are dropped while streams start, end and leave, in any order: each answer
is the one that its adapter gives alone, and leases, pages and memory balance."""

from __future__ import annotations

import json
import random
from pathlib import Path

import httpx

from tiny_server import LiveServer, make_chat, make_settings, save_toy_adapter, serving, wait_for

LONG = {"temperature": 0, "max_tokens": 30, "logit_bias": {"257": -100, "258": -100}}


def _read_text(response: httpx.Response) -> str:
    lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines)


def _ask(http: httpx.Client, name: str) -> httpx.Response:
    body = make_chat(name, stream=True, **LONG)
    return http.send(http.build_request("POST", "/v1/chat/completions", json=body), stream=True)


def _check_empty(live: LiveServer) -> None:
    """Compare with a server that no request has reached."""
    scheduler = live.server.scheduler
    batch = scheduler._batch
    pool = batch.cache.pool

    def count() -> tuple[object, ...]:
        return len(batch.rows), batch.bank.keys, pool.num_blocks - pool.num_available

    assert live.call(scheduler.run_between_steps, count) == (0, (), 0)


def test_models_and_requests_in_any_order(writer: Path, tmp_path: Path) -> None:
    folders = [
        save_toy_adapter(tmp_path / f"a{n}", writer, seed=10 + n, lora_r=2) for n in (0, 1, 2)
    ]
    room = 2 * (folders[0] / "adapter_model.safetensors").stat().st_size + 10
    limits = {"adapters": room, "rows": 3, "wait": "1h"}
    settings = make_settings({}, base=str(writer), models_dir=tmp_path, limits=limits)
    draw = random.Random(0)
    with serving(settings) as live, live.client() as http:
        alone: dict[str, str] = {}
        for folder in folders:
            http.put("/admin/models/alone", json={"from": folder.name}).raise_for_status()
            alone[folder.name] = _read_text(_ask(http, "alone"))
        http.delete("/admin/models/alone").raise_for_status()
        models: dict[str, str] = {}
        streams: list[tuple[httpx.Response, str]] = []
        for _ in range(60):
            name = draw.choice(["one", "two"])
            action = draw.choice(["put", "remove", "ask", "ask", "finish", "leave"])
            if action == "put":
                source = draw.choice(folders).name
                if http.put(f"/admin/models/{name}", json={"from": source}).is_success:
                    models[name] = source  # else its memory is in use: the old one serves on
            elif action == "remove":
                is_there = models.pop(name, None) is not None
                assert http.delete(f"/admin/models/{name}").is_success == is_there
            elif action == "ask" and len(streams) < 4:
                response = _ask(http, name)
                if response.is_success:
                    streams.append((response, alone[models[name]]))
            elif streams:
                response, text = streams.pop(draw.randrange(len(streams)))
                assert action == "leave" or _read_text(response) == text
                response.close()
            assert live.server.registry.count_bytes() <= room
        assert all(_read_text(response) == text for response, text in streams)
        wait_for(lambda: live.server.scheduler.num_active == 0)
        for name in models:
            http.delete(f"/admin/models/{name}").raise_for_status()
        wait_for(lambda: live.server.registry.count_bytes() == 0)
        _check_empty(live)
