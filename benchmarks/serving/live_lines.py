"""Lines L3 to L8 of the server's benchmark: each runs both of its sides and prints their ratio.

    with open_lab(base, folder, ...) as lab: print_latencies(lab)

In: a server in this process with 8 adapters of rank 16, B drawn by seed, proven by golden answers.
Times include the clients, which are threads of this process but in L6. Left out: tokens per second
against PEFT (http.py) and a decode step by its adapters (adapter_bank.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from benchmarks.serving.clients import (
    CLIENTS,
    TIMEOUT_SECONDS,
    Chat,
    Load,
    Timing,
    ask_at_rate,
    ask_in_turn,
    ask_together,
    compute_quantile,
)

sys.path.append(str(Path(__file__).parents[2] / "tests" / "helpers"))

from serve_lab import LiveServer, make_settings, read_metric, save_toy_adapter, serving
from tunesmith.core.types import GenerationRequest, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.serve.settings import BASE_NAME
from tunesmith.session.provenance import PROVENANCE_FILE

ADAPTERS = 8
RANK = 16
NUM_ADDED = 10
NUM_REPLACED = 100
NUM_REGISTERED = 1000
NUM_FLOODED = 200


@dataclass(frozen=True)
class Lab:
    """A running server, the folder of its adapters, and how long answers are."""

    live: LiveServer
    base: Path
    folder: Path
    num_tokens: int
    dtype: str

    @property
    def url(self) -> str:
        return self.live.url

    @property
    def renderer(self) -> Renderer:
        return self.live.server.engine.registry.base.renderer

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.renderer.end_ids

    def make_chats(self, models: Sequence[str], count: int) -> list[Chat]:
        """Return `count` chats of the models in turn."""
        chats: list[Chat] = []
        for number in range(count):
            model = models[number % len(models)]
            chats.append(Chat(model, self.num_tokens, self.end_ids, number))
        return chats

    @property
    def adapters(self) -> list[str]:
        return [f"a{index}" for index in range(ADAPTERS)]


@contextmanager
def open_lab(base: Path, folder: Path, *, num_tokens: int, dtype: str) -> Iterator[Lab]:
    """Save adapters of a base and serve them inside the block."""
    models: dict[str, object] = {}
    for seed in range(ADAPTERS):
        name = f"a{seed}"
        size = 0.5 if dtype == "fp32" else 0.01
        models[name] = str(save_toy_adapter(folder / name, base, seed=seed, size=size, lora_r=RANK))
    limits = {"request": "20m", "wait": "1h", "waiting": 1024}
    settings = make_settings(
        models, base=str(base), dtype=dtype, limits=limits, models_dir=str(folder)
    )
    with serving(settings) as live:
        lab = Lab(live, base, folder, num_tokens, dtype)
        ask_together(lab.url, lab.make_chats(lab.adapters, CLIENTS))  # warm
        yield lab


def read_resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_capacity(lab: Lab, chats: Sequence[Chat]) -> float:
    """Return the answers per second that CLIENTS connections get."""
    started = time.perf_counter()
    ask_together(lab.url, chats)
    return len(chats) / (time.perf_counter() - started)


def describe_times(timings: Sequence[Timing]) -> str:
    firsts = [timing.first for timing in timings]
    p50 = compute_quantile(firsts, 0.5) * 1000
    p95 = compute_quantile(firsts, 0.95) * 1000
    return f"first token p50 {p50:.0f} ms, p95 {p95:.0f} ms"


# ---------------------------------------------------------------- the lines


def print_latencies(lab: Lab) -> None:
    """L3: first tokens and gaps when requests arrive at 60% of the capacity, against one client."""
    chats = lab.make_chats(lab.adapters, 3 * CLIENTS)
    rate = 0.6 * measure_capacity(lab, chats)
    alone = ask_in_turn(lab.url, chats[:CLIENTS])
    loaded = ask_at_rate(lab.url, chats, rate)
    gaps = [gap for timing in loaded for gap in timing.gaps]
    ratio = compute_quantile([t.first for t in loaded], 0.95)
    ratio /= compute_quantile([t.first for t in alone], 0.95)
    print(f"L3 {len(chats)} arrivals at {rate:.2f}/s, 60% of what 16 closed clients get:")
    print(f"   one client: {describe_times(alone)}")
    print(f"   arrivals:   {describe_times(loaded)}, {ratio:.2f}x at p95")
    print(f"   between tokens: p99 {compute_quantile(gaps, 0.99) * 1000:.0f} ms")


def print_changes(lab: Lab) -> None:
    """L4: adapters added and replaced while all clients ask."""
    client = httpx.Client(base_url=lab.url, timeout=TIMEOUT_SECONDS)

    def put(name: str, source: str, **more: bool) -> float:
        started = time.perf_counter()
        response = client.put(f"/admin/models/{name}", json={"from": source, **more})
        assert response.status_code == 200, response.text
        return time.perf_counter() - started

    def put_new(source: str, **more: bool) -> float:
        """Return the time of an adapter that the server does not hold."""
        seconds = put("new", source, **more)
        client.delete("/admin/models/new").raise_for_status()
        return seconds

    for index in range(NUM_ADDED):
        save_added_adapter(lab, index)
    without: list[float] = []
    proven: list[float] = []
    with Load(lab.url, lab.make_chats([BASE_NAME], CLIENTS)):
        for index in range(NUM_ADDED):
            without.append(put_new(f"unproven{index}", unproven=True))
            proven.append(put_new(f"proven{index}"))
    slow = compute_quantile(proven, 0.95)
    fast = compute_quantile(without, 0.95)
    print(f"L4 an adapter added while {CLIENTS} clients ask the base, p95 of {NUM_ADDED}:")
    print(f"   without golden run {fast * 1000:.0f} ms, with it {slow * 1000:.0f} ms")
    put("swap", "a0")
    expected: dict[str, str] = {}
    for source in ("a0", "a1"):
        put("swap", source)
        (solo,) = ask_in_turn(lab.url, lab.make_chats(["swap"], 1))
        expected[solo.version.partition("#")[2] or solo.version] = solo.text
    first_chat = lab.make_chats(["swap"], 1)[0]
    with Load(lab.url, [first_chat] * ADAPTERS) as load:
        for index in range(NUM_REPLACED):
            put("swap", f"a{index % 2}")
    failed = sum(timing.status != 200 for timing in load.timings)
    mixed = 0
    for timing in load.timings:
        version = timing.version.partition("#")[2] or timing.version
        mixed += timing.status == 200 and timing.text != expected.get(version)
    print(f"   {NUM_REPLACED} replacements under load: {len(load.timings)} answers,")
    print(f"   {failed} failed, {mixed} mixed")
    client.close()


def save_added_adapter(lab: Lab, index: int) -> None:
    """Save an adapter with golden answers, and the same without."""
    size = 0.5 if lab.dtype == "fp32" else 0.01
    path = lab.folder / f"proven{index}"
    save_toy_adapter(path, lab.base, seed=100 + index, size=size, lora_r=RANK)
    copy = lab.folder / f"unproven{index}"
    copy.mkdir()
    for file in path.iterdir():
        if file.is_file() and file.name != PROVENANCE_FILE:
            os.link(file, copy / file.name)


def print_registered(lab: Lab) -> None:
    """L5: 1,000 adapters registered, against two. They share files, so that they fit on a disk."""

    def measure(count: int) -> tuple[float, float, float]:
        models: dict[str, object] = {}
        for index in range(count):
            folder = lab.folder / f"many-{count}-{index}"
            folder.mkdir()
            for file in (lab.folder / "a2").iterdir():
                os.link(file, folder / file.name)
            models[f"m{index}"] = str(folder)
        before = read_resident_bytes()
        started = time.perf_counter()
        with serving(make_settings(models, base=str(lab.base), dtype=lab.dtype)) as live:
            ready = time.perf_counter() - started
            grown = read_resident_bytes() - before
            with live.client() as client:
                started = time.perf_counter()
                assert len(client.get("/v1/models").json()["data"]) == count + 1
                listed = time.perf_counter() - started
        return ready, grown / 2**20, listed * 1000

    measure(1)  # imports
    few = measure(2)
    many = measure(NUM_REGISTERED)
    print(f"L5 {NUM_REGISTERED} adapters registered, against 2:")
    print(
        f"   ready in {many[0]:.1f} s, {few[0]:.1f} s; memory {many[1]:+.0f} MiB, {few[1]:+.0f} MiB"
    )
    print(f"   GET /v1/models {many[2]:.0f} ms, {few[2]:.0f} ms")


def print_overhead(lab: Lab) -> None:
    """L6: processor time for a token over HTTP, against the engine's batch alone."""
    scheduler = lab.live.server.engine.scheduler
    bodies: list[Json] = [chat.to_body() for chat in lab.make_chats([BASE_NAME], CLIENTS)]
    biases = tuple((end, -100.0) for end in lab.end_ids)
    prompts = [lab.renderer.encode_prompt(body["messages"]) for body in bodies]

    def run_batch() -> int:
        batch = scheduler._batch
        rows = []
        for prompt in prompts:
            request = GenerationRequest(prompt, lab.num_tokens, logit_bias=biases, cache_salt="x")
            rows.append(batch.submit(request))
        while batch.has_work:
            batch.step()
        return sum(len(row.tokens) for row in rows)

    def run_clients() -> int:
        ends = [str(end) for end in lab.end_ids]
        words = [lab.url, BASE_NAME, str(lab.num_tokens), *ends]
        command = [sys.executable, "-m", "benchmarks.serving.clients", *words]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def measure(run: Callable[[], int]) -> float:
        started = time.process_time()
        num_tokens = run()
        return (time.process_time() - started) / num_tokens * 1000

    engine = min(
        measure(lambda: lab.live.call(scheduler.run_between_steps, run_batch)) for _ in "123"
    )
    served = min(measure(run_clients) for _ in "123")
    print(f"L6 processor time of the server for a token of {CLIENTS} streams, best of three:")
    print(f"   engine {engine:.3f} ms, HTTP {served:.3f} ms: {served / engine:.3f}x")


def print_fairness(lab: Lab) -> None:
    """L7: one model is flooded, and another is asked by a single client."""
    quiet = lab.make_chats(["a0"], CLIENTS)
    alone = ask_in_turn(lab.url, quiet)
    flood = lab.make_chats([BASE_NAME], NUM_FLOODED)
    with Load(lab.url, flood):
        beside = ask_in_turn(lab.url, quiet)
    slow = compute_quantile([timing.total for timing in beside], 0.95)
    fast = compute_quantile([timing.total for timing in alone], 0.95)
    print(f"L7 one client beside {NUM_FLOODED} of another model, p95 of {CLIENTS} answers:")
    print(f"   alone {fast:.2f} s, beside them {slow:.2f} s: {slow / fast:.2f}x")


def print_soak(lab: Lab, minutes: float) -> None:
    """L8: 80% of the capacity for some time: memory, descriptors, tokens."""
    chats = lab.make_chats(lab.adapters, 3 * CLIENTS)
    rate = 0.8 * measure_capacity(lab, chats)
    count = max(1, int(rate * minutes * 60))
    ask_at_rate(lab.url, chats[:CLIENTS], rate)  # warm
    memory = read_resident_bytes()
    descriptors = len(os.listdir("/proc/self/fd"))
    counted = read_metric(lab.live, "tokens_total", kind="answer")
    timings = ask_at_rate(lab.url, lab.make_chats(lab.adapters, count), rate)
    grown = read_resident_bytes() / memory - 1
    opened = len(os.listdir("/proc/self/fd")) - descriptors
    received = sum(timing.num_tokens for timing in timings)
    counted = read_metric(lab.live, "tokens_total", kind="answer") - counted
    failed = sum(timing.status != 200 for timing in timings)
    print(f"L8 {minutes:g} minutes at 80%, {count} requests:")
    print(f"   {failed} failed; {received} tokens received, {counted:.0f} counted")
    print(f"   memory {grown:+.1%}, descriptors {opened:+d}")
