"""Lines L3 to L8 of the server's benchmark: each runs both of its sides and prints their ratio.

    with open_lab(base, folder, ...) as lab: print_latencies(lab)

In: a server in this process with 8 adapters of rank 16, B drawn by seed.
Times include the clients, which are threads of this process; in L6 and L7 they have their own. Left
out: tokens per second against PEFT (http.py), a decode step by its adapters (adapter_bank.py)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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

from tiny_server import LiveServer, make_settings, read_metric, save_toy_adapter, serving, wait_for
from tunesmith.core.types import GenerationRequest, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.verify.verification import MAX_TIE_NATS
from tunesmith.model.hub.adapter_config import ADAPTER_CONFIG_FILE
from tunesmith.model.paged_cache import BLOCK_TOKENS
from tunesmith.serve.settings import BASE_NAME
from tunesmith.session.identity import PROVENANCE_FILE

ADAPTERS = 8
RANK = 16
NUM_ADDED = 10
NUM_REPLACED = 100
NUM_COLD = 64
NUM_WARM = 16  # that fit in the memory for adapters
COLD_TOKENS = 24
LONG_PROMPT = 4000
REPLACED = ("first", "second")
REPLACED_TOKENS = 24
NUM_REGISTERED = 1000
NUM_FLOODED = 200
NUM_QUIET = 40


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
        return self.live.server.registry.base.renderer

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
    print_arrival(lab)


def print_arrival(lab: Lab) -> None:
    """W6: a long prompt arrives while all clients are answered."""
    chats = lab.make_chats([BASE_NAME], CLIENTS)
    context_length = lab.live.server.registry.base.context_length
    prompt = [7] * min(LONG_PROMPT, context_length // 2)
    body = {"model": BASE_NAME, "prompt": prompt, "max_tokens": 1}

    def send_prompt() -> None:
        time.sleep(0.5)  # into the answers
        response = httpx.post(f"{lab.url}/v1/completions", json=body, timeout=TIMEOUT_SECONDS)
        response.raise_for_status()

    def find_longest_gap() -> float:
        return max(max(timing.gaps) for timing in ask_together(lab.url, chats)) * 1000

    before = find_longest_gap()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send_prompt)
        beside = find_longest_gap()
        sent.result()
    print(f"   longest gap of {CLIENTS} streams {before:.0f} ms; beside a prompt of {len(prompt)}")
    print(f"   tokens that arrives {beside:.0f} ms")


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
    times: list[float] = []
    with Load(lab.url, lab.make_chats([BASE_NAME], CLIENTS)):
        for index in range(NUM_ADDED):
            times.append(put_new(f"added{index}"))
    p95 = compute_quantile(times, 0.95) * 1000
    print(f"L4 an adapter added while {CLIENTS} clients ask, p95 of {NUM_ADDED}: {p95:.0f} ms")
    print_replacements(lab, client, put)
    client.close()


def print_replacements(lab: Lab, client: httpx.Client, put: Callable[[str, str], float]) -> None:
    """Replace an adapter while clients ask it; judge of which one each answer is."""
    sources: dict[str, str] = {}
    for seed, source in enumerate(REPLACED):
        size = 0.5 if lab.dtype == "fp32" else 0.05  # so large that their answers differ
        save_toy_adapter(lab.folder / source, lab.base, seed=seed, size=size, lora_r=RANK)
        put("swap", source)
        sources[client.get("/admin/models/swap").json()["tunesmith"]["digest"][:12]] = source
    chat = Chat("swap", REPLACED_TOKENS, lab.end_ids, has_ids=True)
    with Load(lab.url, [chat] * ADAPTERS) as load:
        for index in range(NUM_REPLACED):
            put("swap", REPLACED[index % 2])
            while len(load.timings) < index:  # at least one answer for each
                time.sleep(0.01)
    served = [timing for timing in load.timings if timing.status == 200]
    same_gaps: list[float] = []
    other_gaps: list[float] = []
    for source in REPLACED:
        put("swap", source)
        for timing in served:
            is_same = sources[timing.version.partition("#")[2]] == source
            gaps = same_gaps if is_same else other_gaps
            gaps.append(measure_worst_choice(client, lab, timing))
    mixed = sum(gap > MAX_TIE_NATS for gap in same_gaps)
    num_apart = sum(gap > MAX_TIE_NATS for gap in other_gaps)
    print(f"   {NUM_REPLACED} replacements under load: {len(load.timings)} answers,")
    print(
        f"   {len(load.timings) - len(served)} failed, {mixed} mixed: the worst token is", end=" "
    )
    print(f"{max(same_gaps):.2f} nats below its adapter's first choice;")
    print(f"   by the other adapter, {num_apart} of {len(other_gaps)} answers are told apart")
    if num_apart < len(other_gaps) / 2:
        print("   so nothing was judged: most answers could be of either adapter")


def measure_worst_choice(client: httpx.Client, lab: Lab, timing: Timing) -> float:
    """Return how many nats an answer's worst token is below the first choice of the model `swap`,
    without end tokens. Batches of other sizes round otherwise, so a greedy answer has ties."""
    ends = [lab.renderer.decode([end]) for end in lab.end_ids]
    prompt = [*timing.prompt_ids, *timing.token_ids]
    body = {"model": "swap", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    response = client.post("/v1/completions", json={**body, "echo": True, "logprobs": 5})
    logprobs = response.raise_for_status().json()["choices"][0]["logprobs"]
    worst = 0.0
    for position in range(len(timing.prompt_ids), len(prompt)):
        listed = logprobs["top_logprobs"][position].items()
        best = max(value for text, value in listed if text not in ends)
        worst = max(worst, best - logprobs["token_logprobs"][position])
    return worst


def save_added_adapter(lab: Lab, index: int) -> None:
    """Save an adapter that the server does not hold."""
    size = 0.5 if lab.dtype == "fp32" else 0.01
    path = lab.folder / f"added{index}"
    save_toy_adapter(path, lab.base, seed=100 + index, size=size, lora_r=RANK)


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


def print_cold(lab: Lab) -> None:
    """W3: more adapters than fit in memory, against all in memory: 64 asked for by Zipf's law, and
    twice as many as fit asked for alike. They share files, and differ in their factor."""
    registry = lab.live.server.registry
    num_bytes = registry.count_bytes() // ADAPTERS
    names: list[str] = []
    models: dict[str, object] = {}
    for index in range(NUM_COLD):
        path = lab.folder / f"cold{index}"
        path.mkdir()
        for file in (lab.folder / "a0").iterdir():
            if file.is_file() and file.name not in (PROVENANCE_FILE, ADAPTER_CONFIG_FILE):
                os.link(file, path / file.name)
        config = json.loads((lab.folder / "a0" / ADAPTER_CONFIG_FILE).read_text())
        config["lora_alpha"] *= 1 + index / 1000
        (path / ADAPTER_CONFIG_FILE).write_text(json.dumps(config))
        names.append(path.name)
        models[path.name] = {"from": str(path), "unproven": True}
    draw = random.Random(0)
    weights = [1 / rank for rank in range(1, NUM_COLD + 1)]
    requested = {
        "64 by Zipf's law": draw.choices(names, weights, k=8 * CLIENTS),
        "32 alike": draw.choices(names[: 2 * NUM_WARM], k=8 * CLIENTS),
    }
    rates: dict[tuple[str, int], float] = {}
    for num_fitting in (NUM_WARM, NUM_COLD):
        budget = (num_fitting + 1) * num_bytes
        limits = {"adapters": budget, "request": "20m", "wait": "1h", "waiting": 1024}
        settings = make_settings(models, base=str(lab.base), dtype=lab.dtype, limits=limits)
        with serving(settings) as live:
            for label, chosen in requested.items():
                chats = [Chat(name, COLD_TOKENS, lab.end_ids, n) for n, name in enumerate(chosen)]
                started = time.perf_counter()
                timings = ask_together(live.url, chats)
                seconds = time.perf_counter() - started
                assert all(timing.status == 200 for timing in timings)
                rates[label, num_fitting] = sum(t.num_tokens for t in timings) / seconds
    print(f"W3 adapters with memory for {NUM_WARM}, against all in memory:")
    for label in requested:
        few = rates[label, NUM_WARM]
        many = rates[label, NUM_COLD]
        print(f"   {label}: {few:.1f} and {many:.1f} tokens/s, {few / many:.2f}x")


def print_overhead(lab: Lab) -> None:
    """L6: processor time for a token over HTTP, against the engine's batch alone. The thread of
    the event loop does HTTP, events, logs and metrics; what else the server takes over the batch is
    that the engine's threads wait for each other while clients have their cores."""
    scheduler = lab.live.server.scheduler
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
    started = lab.live.call(time.thread_time)
    served = min(measure(run_clients) for _ in "123")
    num_tokens = 3 * CLIENTS * lab.num_tokens
    event_loop = (lab.live.call(time.thread_time) - started) / num_tokens * 1000
    print(f"L6 processor time of the server for a token of {CLIENTS} streams, best of three:")
    print(f"   engine {engine:.3f} ms, with clients {served:.3f} ms: {served / engine:.3f}x")
    print(
        f"   the event loop's thread {event_loop:.3f} ms: {event_loop / engine:.1%} of the engine's"
    )


def print_fairness(lab: Lab) -> None:
    """L7: one model is flooded from a process of its own, and another is asked by a single client.
    Steps tell waiting for a row from sharing the steps with other rows."""
    quiet = [Chat("a0", COLD_TOKENS, lab.end_ids, number) for number in range(NUM_QUIET)]
    alone, alone_steps = ask_counting_steps(lab, quiet)
    ends = [str(end) for end in lab.end_ids]
    words = [lab.url, BASE_NAME, str(lab.num_tokens), *ends, "--flood", str(NUM_FLOODED)]
    command = [sys.executable, "-m", "benchmarks.serving.clients", *words]
    limits = lab.live.server.scheduler._limits
    with subprocess.Popen(command, stdin=subprocess.PIPE) as flood:
        wait_for(lambda: read_metric(lab.live, "waiting") > NUM_FLOODED // 2)
        beside, beside_steps = ask_counting_steps(lab, quiet)
        assert flood.stdin is not None
        flood.stdin.close()
    slow = compute_quantile([timing.total for timing in beside], 0.95)
    fast = compute_quantile([timing.total for timing in alone], 0.95)
    print(f"L7 one client beside {NUM_FLOODED} of another model, {limits.rows} rows, p95 of")
    print(f"   {NUM_QUIET} answers of {COLD_TOKENS} tokens:")
    print(f"   alone {fast:.2f} s, beside them {slow:.2f} s: {slow / fast:.2f}x;")
    print(f"   steps of an answer {alone_steps:.1f} and {beside_steps:.1f}")


def ask_counting_steps(lab: Lab, chats: Sequence[Chat]) -> tuple[list[Timing], float]:
    """Ask one after another; return the times and the mean steps of the server for an answer."""
    before = read_metric(lab.live, "step_seconds_count")
    timings = ask_in_turn(lab.url, chats)
    steps = read_metric(lab.live, "step_seconds_count") - before
    return timings, steps / len(chats)


def print_soak(lab: Lab, minutes: float) -> None:
    """L8: 80% of the capacity for some time: memory, descriptors, tokens."""
    chats = lab.make_chats(lab.adapters, 3 * CLIENTS)
    rate = 0.8 * measure_capacity(lab, chats)
    count = max(1, int(rate * minutes * 60))
    ask_at_rate(lab.url, chats[:CLIENTS], rate)  # warm
    memory = read_resident_bytes()
    cached = read_cached_bytes(lab)
    descriptors = len(os.listdir("/proc/self/fd"))
    counted = read_metric(lab.live, "tokens_total", kind="answer")
    timings = ask_at_rate(lab.url, lab.make_chats(lab.adapters, count), rate)
    grown = read_resident_bytes() - memory
    filled = read_cached_bytes(lab) - cached  # up to limits.keys_and_values, and no further
    opened = len(os.listdir("/proc/self/fd")) - descriptors
    received = sum(timing.num_tokens for timing in timings)
    counted = read_metric(lab.live, "tokens_total", kind="answer") - counted
    failed = sum(timing.status != 200 for timing in timings)
    print(f"L8 {minutes:g} minutes at 80%, {count} requests:")
    print(f"   {failed} failed; {received} tokens received, {counted:.0f} counted")
    print(f"   memory {grown / memory:+.1%}, {filled / memory:+.1%} of it the cache that fills up,")
    print(f"   else {(grown - filled) / memory:+.1%}; descriptors {opened:+d}")


def read_cached_bytes(lab: Lab) -> int:
    """Return the bytes of the blocks of keys and values that were used since the start."""
    batch = lab.live.server.scheduler._batch
    return batch.cache.pool._num_used * BLOCK_TOKENS * batch.model.cache_bytes_per_token
