"""Compare packed steps of a Qwen3.5-0.8B-shaped model with TRL + PEFT on padded batches.

    python -m benchmarks.train.hybrid_speed [LAYERS]

Weights are random, with the sizes of the model's layers and the built-in model's vocabulary: rows
are rendered with its tokenizer. The rows are those of benchmarks.vs_trl. Padding is the only
correct way of TRL on a CPU, where transformers cannot keep packed documents apart. Each side runs
in its own process, in turns; prints tokens per second, peak memory and their ratios to each setting
of TRL, and which one is its fastest. tunesmith takes 8 rows per step, as its plan decides, and 4
and 2, for the memory of steps that small. LAYERS is 8 unless given, of 24, so that TRL fits in a
few gigabytes.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarks.vs_trl.job import run_module, write_documents
from benchmarks.vs_trl.prepare import OUR_BATCH, Size, prepare
from benchmarks.vs_trl.speed import GROUPED, Setting, run_trl, run_tunesmith, take_median
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.core.types import Json
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_spec

BASE = "smollm2-135m-instruct"
SIZES = {
    "vocab_size": 49_152,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PERIOD = ["linear_attention"] * 3 + ["full_attention"]
SIZE = Size(
    rows=64,
    more_rows=100,
    seconds=20,
    rounds=3,
    round_seconds=20,
    gemm_seconds=0,
    loss_steps=0,
)
OUR_BATCHES = (OUR_BATCH, 4, 2)  # rows per step
# the fastest number formats of vs_trl, in bf16 throughout; one row at a time has no padding, and
# rows grouped by length have little
SETTINGS = (
    Setting(1, autocast=False, fp32_adapter=False),
    Setting(2, autocast=False, fp32_adapter=False),
    Setting(4, autocast=False, fp32_adapter=False),
    Setting(4, GROUPED, autocast=False, fp32_adapter=False),
)


def write_model(folder: Path, layers: int) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_5_text", num_hidden_layers=layers, layer_types=PERIOD * (layers // 4), **SIZES
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in resolve_model(BASE).iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder)


def main(layers: int) -> None:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "qwen3.5"
        write_model(model, layers)
        bench = prepare(folder, quick=True)
        bench = replace(bench, spec=read_spec(model), size=SIZE)
        write_documents(bench.documents_file, bench.documents)
        run_module("benchmarks.vs_trl.tunesmith_side", "start", bench.model, bench.job.adapter)
        ours: list[list[Json]] = [[] for _ in OUR_BATCHES]
        theirs: list[list[Json]] = [[] for _ in SETTINGS]
        for _ in range(SIZE.rounds):
            for batch, runs in zip(OUR_BATCHES, ours, strict=True):
                runs.append(run_tunesmith(bench, batch))
            for setting, runs in zip(SETTINGS, theirs, strict=True):
                runs.append(run_trl(bench, setting))
        report(ours, theirs)


def report(ours: list[list[Json]], theirs: list[list[Json]]) -> None:
    """Print a row per setting; the ratios are those of tunesmith, per number of its rows."""
    names = [f"{kind}, {batch} rows" for batch in OUR_BATCHES for kind in ("speed", "memory")]
    print(f"| | tokens/s | peak memory | {' | '.join(names)} |")
    print("|---" * (3 + len(names)) + "|")
    empty = " |" * (1 + len(names))
    measured = [measure(runs) for runs in ours]
    for batch, (speed, peak) in zip(OUR_BATCHES, measured, strict=True):
        print(f"| tunesmith, {batch} rows, packed | {speed:.0f} | {peak / 1e9:.2f} GB{empty}")
    fastest = max(theirs, key=lambda runs: measure(runs)[0])
    for runs in theirs:
        other_speed, other_peak = measure(runs)
        name = f"TRL, {runs[0]['name']}{', its fastest' if runs is fastest else ''}"
        ratios = [f"{s / other_speed:.2f}x | {p / other_peak:.2f}x" for s, p in measured]
        print(f"| {name} | {other_speed:.0f} | {other_peak / 1e9:.2f} GB | {' | '.join(ratios)} |")


def measure(runs: list[Json]) -> tuple[float, int]:
    """Return the median of tokens per second, and the highest peak in bytes."""
    return take_median(runs)["tokens_per_second"], max(run["peak_bytes"] for run in runs)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 8)
