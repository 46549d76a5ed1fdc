"""Compare the server with llama.cpp's under 16 clients: the base, and 8 adapters in turn.

    pip install xllamacpp
    python -m benchmarks.serving.llama RUN ADAPTER.gguf [--rounds N] [--tokens N] [--threads N]

RUN is a finished LoRA run whose base can be a GGUF; ADAPTER.gguf is what llama.cpp's
convert_lora_to_gguf.py makes of `tunesmith export RUN --to peft`. Both servers are processes of
their own, with the same threads, and answer the same prompts (the demo's test rows) greedily over
HTTP, in turn. Ours holds adapters of the run's shape with weights drawn by seed; llama.cpp loads
the run's adapter eight times, which computes as much. Medians of the rounds are compared, by the
clock and by the processor time of the servers. llama.cpp comes compiled for any CPU of its kind,
not for this one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from benchmarks.serving.http import ADAPTERS, CLIENTS, read_prompts, save_adapters

from tunesmith import api
from tunesmith.core.run_dir import read_run_plan
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.hub.resolve import resolve_model

START_SECONDS = 300
CONTEXT_TOKENS = 1024  # of each client
LLAMA = "--llama"  # the first argument of this file as llama.cpp's server


@dataclass
class Side:
    """A server, and how a request for adapter `index` (None: the base) is written."""

    name: str
    url: str
    process: psutil.Process
    build_body: Callable[[list[int], int | None], dict[str, Any]]
    seconds: list[float] = field(default_factory=list[float])
    processor_seconds: list[float] = field(default_factory=list[float])

    def answer(self, prompts: Sequence[list[int]], adapters: Sequence[int | None]) -> None:
        def post(prompt: list[int], adapter: int | None) -> None:
            content = json.dumps(self.build_body(prompt, adapter)).encode()
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(self.url, content, headers)
            with urllib.request.urlopen(request, timeout=1200) as response:
                response.read()

        started, processor = time.perf_counter(), self._read_processor_seconds()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(post, prompts, adapters))
        self.seconds.append(time.perf_counter() - started)
        self.processor_seconds.append(self._read_processor_seconds() - processor)

    def _read_processor_seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


@contextmanager
def started(command: list[str], log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server inside the block; yield the address that it prints, and its process."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            words = log.read_text(errors="replace").split()
            if addresses := [word for word in words if word.startswith("http://")]:
                yield addresses[-1].removesuffix("/v1"), psutil.Process(process.pid)
                return
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(log.read_text(errors="replace")[-2000:])
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- the servers


def serve_llama(model: str, adapter: str, threads: int) -> None:
    """Be llama.cpp's server, with the adapter loaded eight times, until the process is ended."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = CLIENTS
    params.n_ctx = CLIENTS * CONTEXT_TOKENS
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.lora_init_without_apply = True
    infos = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0) for _ in range(ADAPTERS)]
    params.lora_adapters = infos
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(60)


def build_ours(tokens: int, end: int) -> Callable[[list[int], int | None], dict[str, Any]]:
    def build_body(prompt: list[int], adapter: int | None) -> dict[str, Any]:
        return {
            "model": "base" if adapter is None else f"a{adapter}",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "logit_bias": {str(end): -100},
        }

    return build_body


def build_llama(tokens: int) -> Callable[[list[int], int | None], dict[str, Any]]:
    def build_body(prompt: list[int], adapter: int | None) -> dict[str, Any]:
        scales = [{"id": index, "scale": float(index == adapter)} for index in range(ADAPTERS)]
        return {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "lora": scales,
        }

    return build_body


# ---------------------------------------------------------------- report


def print_sides(title: str, ours: Side, other: Side, tokens: int) -> None:
    print(
        f"{title}: {CLIENTS} prompts, {tokens} tokens each, medians of {len(ours.seconds)} rounds"
    )
    for side in (ours, other):
        rate = CLIENTS * tokens / median(side.seconds)
        processor = median(side.processor_seconds)
        print(f"  {side.name:16} {rate:7.1f} tokens/s, {processor:6.2f} s of processor time")
    clock = median(other.seconds) / median(ours.seconds)
    processor = median(other.processor_seconds) / median(ours.processor_seconds)
    print(f"  ours is {clock:.2f}x by the clock, {processor:.2f}x by processor time", flush=True)
    for side in (ours, other):
        side.seconds.clear()
        side.processor_seconds.clear()


def main() -> None:
    if sys.argv[1:2] == [LLAMA]:
        serve_llama(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    base = resolve_model(str(read_run_plan(args.run).model.path))
    renderer = Renderer.from_folder(base, now=datetime.now())
    prompts = read_prompts(renderer)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        api.export(args.run, "gguf", type="bf16", out=folder / "model")
        (folder / "adapters").mkdir()
        settings = {
            "base": str(base),
            "dtype": "bf16",
            "port": 0,
            "auth": False,
            "models": {
                path.name: {"from": str(path), "unproven": True}
                for path in save_adapters(base, folder / "adapters")
            },
        }
        (folder / "serve.yaml").write_text(json.dumps(settings))
        (model,) = (folder / "model").glob("*.gguf")
        threads = str(args.threads)
        ours_command = ["env", f"OMP_NUM_THREADS={threads}", sys.executable, "-m", "tunesmith"]
        ours_command += ["serve", str(folder / "serve.yaml")]
        this = [sys.executable, "-m", "benchmarks.serving.llama", LLAMA]
        llama_command = [*this, str(model), str(args.adapter), threads]
        with (
            started(ours_command, folder / "ours.log") as (our_url, our_process),
            started(llama_command, folder / "llama.log") as (llama_url, llama_process),
        ):
            body = build_ours(args.tokens, renderer.end_ids[0])
            ours = Side("tunesmith serve", f"{our_url}/v1/completions", our_process, body)
            body = build_llama(args.tokens)
            llama = Side("llama.cpp", f"{llama_url}/completion", llama_process, body)
            for title, adapters in (
                ("the base", [None] * CLIENTS),
                (f"{ADAPTERS} adapters in turn", [i % ADAPTERS for i in range(CLIENTS)]),
            ):
                for _ in range(args.rounds):
                    for side in (ours, llama):
                        side.answer(prompts, adapters)
                print_sides(title, ours, llama, args.tokens)


if __name__ == "__main__":
    main()
