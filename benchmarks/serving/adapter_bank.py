"""Measure a decode step with 0 to 16 different adapters in its rows, against the base.

    python -m benchmarks.serving.adapter_bank [--model MODEL] [--rounds N] [--rows 16 64]

All sides run in turn, a few steps each, and medians are compared: a shared machine is slower at one
moment than at another. On a machine that others use, run it with OMP_NUM_THREADS=1 and read the
column of processor time. The adapters have rank 16 on all linears, with B drawn by seed. Sides: the
base in the bank, 1 to 16 adapters in the bank, one adapter as training and evaluation have it
(LoraLinear), and the base without a bank, whose weights are not blocked. Left out: HTTP, sampling,
prompts."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.vs_trl.job import LORA

from tunesmith.model.adapter_bank import AdapterBank, RowRange
from tunesmith.model.adapters import add_lora, find_lora_layers
from tunesmith.model.causal_lm import PackedCausalLM, load_network, wrap_model
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.paged_cache import PagedKVCache
from tunesmith.model.save import save_adapter

MODEL = "smollm2-135m-instruct"
ADAPTERS = (0, 1, 2, 4, 8, 16)
PROMPT_TOKENS = 150
STEPS = 4  # of a turn
DTYPE = torch.bfloat16


@dataclass
class Side:
    """A model with rows that are extended; `adapter_rows` is None without a bank."""

    model: PackedCausalLM
    cache: PagedKVCache
    bank: AdapterBank | None = None
    adapter_rows: Sequence[RowRange] = ()
    seconds: list[float] = field(default_factory=list[float])
    processor_seconds: list[float] = field(default_factory=list[float])

    def run_turn(self) -> None:
        """Time a few steps, and cut the rows back to their prompts."""
        rows = self.cache.rows
        tokens = [7] * len(rows)
        for _ in range(STEPS):
            started = time.perf_counter()
            processor_started = time.process_time()
            use_rows = self.bank.use_rows(self.adapter_rows) if self.bank else None
            with use_rows or contextlib.nullcontext(), torch.no_grad():
                hidden_BH = self.model.decode_step(rows, tokens, self.cache)
                tokens = self.model.head.compute_logits(hidden_BH).argmax(-1).tolist()
            self.seconds.append(time.perf_counter() - started)
            self.processor_seconds.append(time.process_time() - processor_started)
        for row in rows:
            row.length = PROMPT_TOKENS


def draw_adapter(network: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in find_lora_layers(network).values():
        layer.lora_B.data = 0.01 * torch.randn(layer.lora_B.shape, generator=generator)


def open_models(folder: Path) -> tuple[AdapterBank, dict[str, PackedCausalLM]]:
    """Return a bank with all adapters, and the model of each kind of side."""
    plain = wrap_model(load_network(folder, DTYPE), DTYPE)
    bank_model = wrap_model(load_network(folder, DTYPE), DTYPE)
    bank = AdapterBank(bank_model)
    network = load_network(folder, DTYPE)
    add_lora(network, LORA)
    seconds: list[float] = []
    num_bytes = 0
    with tempfile.TemporaryDirectory() as scratch:
        for index in range(max(ADAPTERS)):
            draw_adapter(network, index)
            path = Path(scratch) / "adapter"
            save_adapter(network, path, LORA, folder)
            adapter = read_adapter(path, folder)
            started = time.process_time()
            num_bytes = bank.load(f"adapter-{index}", adapter)
            seconds.append(time.process_time() - started)
    print(
        f"load, median of {len(seconds)} adapters: {median(seconds):.3f} s of the processor, "
        f"{num_bytes / 1e6:.2f} MB an adapter"
    )
    lora_model = wrap_model(network, DTYPE, should_block_weights=True)
    return bank, {"bank": bank_model, "lora": lora_model, "plain": plain}


def build_sides(
    bank: AdapterBank, models: dict[str, PackedCausalLM], num_rows: int
) -> dict[str, Side]:
    caches: dict[str, PagedKVCache] = {}
    for name, model in models.items():
        cache = PagedKVCache(num_rows, num_rows * 4)
        prompts = [[5 + row] * PROMPT_TOKENS for row in range(num_rows)]
        for start in range(0, num_rows, 16):
            new_prompts = prompts[start : start + 16]
            model.prefill([cache.add_row() for _ in new_prompts], new_prompts, cache)
        caches[name] = cache
    sides: dict[str, Side] = {}
    for count in ADAPTERS:
        keys = [f"adapter-{row % count}" if count else "" for row in range(num_rows)]
        rows = [(key, 1.0, 1) for key in keys]
        sides[f"{count} in the bank"] = Side(models["bank"], caches["bank"], bank, rows)
    sides["1, LoraLinear"] = Side(models["lora"], caches["lora"])
    sides["0, without a bank"] = Side(models["plain"], caches["plain"])
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    args = parser.parse_args()
    bank, models = open_models(resolve_model(args.model))
    for num_rows in args.rows:
        sides = build_sides(bank, models, num_rows)
        for side in sides.values():
            side.run_turn()
            side.seconds.clear()
            side.processor_seconds.clear()
        for _ in range(args.rounds):
            for side in sides.values():
                side.run_turn()
        print_table(sides, num_rows)


def print_table(sides: dict[str, Side], num_rows: int) -> None:
    """Print tokens per second of each side, and their ratio to the base in the bank."""
    base = sides["0 in the bank"]
    threads = torch.get_num_threads()
    print(f"{num_rows} rows, medians of {len(base.seconds)} steps, threads: {threads}")
    print("                       tokens/s  of the base   processor ms  of the base")
    for name, side in sides.items():
        seconds = median(side.seconds)
        processor = median(side.processor_seconds)
        ratio = median(base.seconds) / seconds
        processor_ratio = median(base.processor_seconds) / processor
        print(
            f"  {name:18} {num_rows / seconds:10.0f} {ratio:12.2f} {1000 * processor:14.1f} "
            f"{processor_ratio:12.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
