"""Measure the server under 16 clients, on the base (W1) and on 8 adapters (W2), against PEFT.

    python -m benchmarks.serving.http [--model MODEL] [--rounds N] [--tokens N]

Sides, in turn within one run: the server over HTTP, its clients as threads of the same process;
transformers' generate on all 16 prompts at once (W1); PEFT with `set_adapter`, one batch for each
adapter (W2); PEFT with `adapter_names`, all rows in one batch (W2). All are greedy, get the same
prompt ids (the demo's test rows) and write the same number of tokens. Medians of the rounds are
compared, by the clock and by processor time, which counts on a machine that others use. The
adapters have rank 16 on all linears, with B drawn by seed. Left out: arrivals over time, latencies,
llama.cpp (llama.py) and vLLM."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.vs_trl.job import LORA
from peft import PeftModel
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "tests" / "helpers"))

from tiny_server import LiveServer, make_settings, serving
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.adapters import add_lora, get_trainable_parameters
from tunesmith.model.causal_lm import load_network
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.save import save_adapter
from tunesmith.recipe import demo

MODEL = "smollm2-135m-instruct"
CLIENTS = 16
ADAPTERS = 8
PAD = 0


@dataclass
class Side:
    """A way to answer all prompts; `answer` returns the ids of each."""

    name: str
    answer: Callable[[], list[list[int]]]
    seconds: list[float] = field(default_factory=list[float])
    processor_seconds: list[float] = field(default_factory=list[float])
    answers: list[list[int]] = field(default_factory=list[list[int]])

    def run(self) -> None:
        started = time.perf_counter()
        started_processor = time.process_time()
        self.answers = self.answer()
        self.seconds.append(time.perf_counter() - started)
        self.processor_seconds.append(time.process_time() - started_processor)


def save_adapters(base: Path, folder: Path) -> list[Path]:
    paths: list[Path] = []
    for seed in range(ADAPTERS):
        network = load_network(base, torch.bfloat16)
        add_lora(network, LORA)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in get_trainable_parameters(network).items():
            if name.endswith("lora_B"):
                parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        paths.append(folder / f"a{seed}")
        save_adapter(network, paths[-1], LORA, base)
    return paths


def read_prompts(renderer: Renderer) -> list[list[int]]:
    rows = (Path(demo.__file__).parent / "test.jsonl").read_text().splitlines()[:CLIENTS]
    prompts: list[list[int]] = []
    for row in rows:
        messages = [m for m in json.loads(row)["messages"] if m["role"] != "assistant"]
        prompts.append(list(renderer.encode_prompt(messages)))
    return prompts


# ---------------------------------------------------------------- ours


def open_server(base: Path, adapters: Sequence[Path]) -> AbstractContextManager[LiveServer]:
    """Return a server that runs in a thread of this process inside the block."""
    models = {path.name: {"from": str(path), "unproven": True} for path in adapters}
    limits = {"request": "20m", "wait": "1h"}
    return serving(make_settings(models, base=str(base), dtype="bf16", limits=limits))


def answer_over_http(
    url: str, models: Sequence[str], prompts: Sequence[list[int]], num_tokens: int, end: int
) -> list[list[int]]:
    def post(model: str, prompt: list[int]) -> list[int]:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "logit_bias": {str(end): -100},
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(post, models, prompts))


# ---------------------------------------------------------------- transformers and PEFT


def generate_stock(
    network: Any, prompts: Sequence[list[int]], num_tokens: int, **options: Any
) -> list[list[int]]:
    """Answer prompts in one padded batch."""
    longest = max(map(len, prompts))
    ids = [[PAD] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.no_grad():
        out = network.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=PAD,
            **options,
        )
    return out[:, longest:].tolist()


def answer_by_switching(
    peft: Any, names: Sequence[str], prompts: Sequence[list[int]], num_tokens: int
) -> list[list[int]]:
    """Answer the prompts of each adapter in a batch of their own."""
    answers: list[list[int]] = [[] for _ in prompts]
    for name in sorted(set(names)):
        peft.set_adapter(name)
        rows = [index for index, other in enumerate(names) if other == name]
        group = generate_stock(peft, [prompts[index] for index in rows], num_tokens)
        for index, answer in zip(rows, group, strict=True):
            answers[index] = answer
    return answers


def load_peft(base: Path, adapters: Sequence[Path]) -> Any:
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    first, *others = adapters
    peft: Any = PeftModel.from_pretrained(network, first, adapter_name=first.name)
    for path in others:
        peft.load_adapter(path, adapter_name=path.name)
    return peft.to(torch.bfloat16).eval()


# ---------------------------------------------------------------- report


def print_sides(title: str, sides: Sequence[Side], num_tokens: int) -> None:
    ours = sides[0]
    rounds = len(ours.seconds)
    print(f"\n{title}: {CLIENTS} prompts, {num_tokens} tokens each, medians of {rounds} rounds")
    for side in sides:
        seconds = median(side.seconds)
        processor = median(side.processor_seconds)
        ratio = seconds / median(ours.seconds)
        processor_ratio = processor / median(ours.processor_seconds)
        pairs = zip(side.answers, ours.answers, strict=True)
        same = sum(answer == other for answer, other in pairs)
        print(
            f"  {side.name:28} {CLIENTS * num_tokens / seconds:7.1f} tokens/s"
            f"  ours is {ratio:.2f}x by the clock, {processor_ratio:.2f}x by processor time"
            f"  {same} of {CLIENTS} answers as ours"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    base = resolve_model(args.model)
    renderer = Renderer.from_folder(base, now=datetime.now())
    prompts = read_prompts(renderer)
    end = renderer.end_ids[0]
    num_tokens = args.tokens
    base_names = ["base"] * CLIENTS
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    with tempfile.TemporaryDirectory() as scratch:
        adapters = save_adapters(base, Path(scratch))
        names = [adapters[index % ADAPTERS].name for index in range(CLIENTS)]
        peft = load_peft(base, adapters)
        with open_server(base, adapters) as server:
            base_sides = [
                Side(
                    "server",
                    lambda: answer_over_http(server.url, base_names, prompts, num_tokens, end),
                ),
                Side("transformers, one batch", lambda: generate_stock(stock, prompts, num_tokens)),
            ]
            adapter_sides = [
                Side(
                    "server", lambda: answer_over_http(server.url, names, prompts, num_tokens, end)
                ),
                Side(
                    "PEFT set_adapter",
                    lambda: answer_by_switching(peft, names, prompts, num_tokens),
                ),
                Side(
                    "PEFT adapter_names",
                    lambda: generate_stock(peft, prompts, num_tokens, adapter_names=names),
                ),
            ]
            answer_over_http(server.url, names, prompts, 2, end)  # warm
            for _ in range(args.rounds):
                for side in [*base_sides, *adapter_sides]:
                    side.run()
    print_sides("W1, the base", base_sides, num_tokens)
    print_sides(f"W2, {ADAPTERS} adapters in turn", adapter_sides, num_tokens)


if __name__ == "__main__":
    main()
