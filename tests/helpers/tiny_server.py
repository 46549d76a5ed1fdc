"""A server on a free port of this machine, with tiny models, for tests of `serve`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import torch

from tiny_models import LORA
from tunesmith.core.atomic import hash_file
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.adapters import add_lora, get_trainable_parameters
from tunesmith.model.causal_lm import load_network
from tunesmith.model.hub.adapter_config import ADAPTER_WEIGHTS_FILE
from tunesmith.model.hub.validate import read_model_json
from tunesmith.model.save import save_adapter, save_serving_files
from tunesmith.serve import server as serve_server
from tunesmith.serve.exchange import Server
from tunesmith.serve.settings import ServeSettings, check_settings
from tunesmith.session.identity import build_provenance, hash_weight_files, write_provenance

START_SECONDS = 300  # of a hang


def save_toy_adapter(
    path: Path,
    base: Path,
    *,
    seed: int = 1,
    size: float = 0.5,
    template: Path | None = None,
    schema: Any = None,
    **settings: Any,
) -> Path:
    """Save an adapter as a run would, with weights drawn from `seed`."""
    network = load_network(base, torch.float32)
    merged = LORA | {"lora_dropout": 0.0} | settings
    add_lora(network, merged)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in get_trainable_parameters(network).items():
        if "magnitude" not in name:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    now = datetime(2026, 1, 2)
    renderer = Renderer.from_folder(base, template=template, now=now)
    sources = {name: chat_template.source for name, chat_template in renderer.templates.items()}
    save_adapter(network, path, merged, base)
    save_serving_files(path, base, templates=sources, end_ids=renderer.end_ids)
    config = read_model_json(base / "config.json")
    hashes = hash_weight_files(base)
    provenance = build_provenance(
        str(base),
        hashes,
        config,
        renderer,
        now.isoformat(),
        schema=schema,
        weights_sha256=hash_file(path / ADAPTER_WEIGHTS_FILE),
    )
    write_provenance(path, provenance)
    return path


def make_settings(models: dict[str, Any], **changes: Any) -> ServeSettings:
    """Return settings for a free port, without keys unless they are set."""
    sources = {
        name: model if isinstance(model, dict) else {"from": str(model)}
        for name, model in models.items()
    }
    values = {"models": sources, "port": 0, "dtype": "fp32", "auth": "keys" in changes}
    settings = ServeSettings.model_validate(values | changes)
    check_settings(settings)
    return settings


@dataclass
class LiveServer:
    """A server that runs in a thread of its own."""

    url: str  # without /v1
    server: Server
    loop: asyncio.AbstractEventLoop
    new_key: str = ""
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def call(self, function: Any, *args: Any) -> Any:
        """Run a function on the event loop of the server and return its result."""
        result = asyncio.run_coroutine_threadsafe(_call(function, *args), self.loop)
        return result.result(START_SECONDS)

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=START_SECONDS, **more)


async def _call(function: Any, *args: Any) -> Any:
    result = function(*args)
    return await result if asyncio.iscoroutine(result) else result


@contextmanager
def serving(settings: ServeSettings) -> Iterator[LiveServer]:
    """Run a server inside the block."""
    prepared = serve_server.prepare_server(settings)
    started = threading.Event()
    running: list[LiveServer] = []

    async def run() -> None:
        server = serve_server.build_server(prepared)
        url = prepared.url.removesuffix("/v1")
        live = LiveServer(url, server, asyncio.get_running_loop(), prepared.new_key)
        running.append(live)
        server.scheduler.start(live.loop)
        await serve_server.load_models(server.registry, prepared.models)
        web = serve_server.make_web_server(server, prepared)
        serving_task = asyncio.ensure_future(web.serve(sockets=[prepared.socket]))
        while not web.started:
            await asyncio.sleep(0.01)
        started.set()
        await live.stop.wait()
        await server.scheduler.stop()
        web.should_exit = True
        await serving_task
        await server.routes.close()

    def run_thread() -> None:
        with prepared.base.scratch:
            asyncio.run(run())

    thread = threading.Thread(target=run_thread, daemon=True)
    thread.start()
    assert started.wait(START_SECONDS)
    live = running[0]
    try:
        yield live
    finally:
        live.loop.call_soon_threadsafe(live.stop.set)
        thread.join(START_SECONDS)
        assert not thread.is_alive()


@contextmanager
def pausing_engine(live: LiveServer) -> Iterator[None]:
    """Let the engine wait between two steps inside the block, while requests come and go."""
    is_waiting = threading.Event()
    go_on = threading.Event()

    def wait() -> None:
        is_waiting.set()
        go_on.wait()

    live.server.scheduler.put_command(wait)
    try:
        assert is_waiting.wait(START_SECONDS)
        yield
    finally:
        go_on.set()


def make_chat(model: str, text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def read_events(lines: Sequence[str]) -> list[str]:
    """Return the data of server-sent events."""
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def read_metric(live: LiveServer, name: str, **labels: str) -> float:
    """Return the sum of a metric over the series with these labels."""
    total = 0.0
    for family in live.server.metrics.registry.collect():
        for sample in family.samples:
            if sample.name == f"tunesmith_{name}" and labels.items() <= sample.labels.items():
                total += sample.value
    return total


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def break_adapter(live: LiveServer, name: str) -> None:
    """Turn the numbers of a published adapter in memory to NaN."""
    registry = live.server.registry
    adapter = registry._bank._adapters[registry._models[name].digest]
    num_broken = 0
    for factors in adapter._factors.values():
        for tensor in vars(factors).values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(torch.nan)
                num_broken += 1
    assert num_broken
