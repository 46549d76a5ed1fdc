"""Compare packed steps of a Qwen3.5-0.8B-shaped model with TRL + PEFT on padded batches.

    python -m benchmarks.train.hybrid_speed [LAYERS]

Weights are random, with the sizes of the model's layers and the built-in model's vocabulary: rows
are rendered with its tokenizer. The rows are those of benchmarks.vs_trl. Padding is the only
correct way of TRL on a CPU, where transformers cannot keep packed documents apart. Each side runs
in its own process, in turns; prints tokens per second, peak memory and their ratios to each setting
of TRL, and which one is its fastest. LAYERS is 8 unless given, of 24, so that TRL fits in a few
gigabytes.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarks.vs_trl.job import run_module, write_documents
from benchmarks.vs_trl.prepare import Size, prepare
from benchmarks.vs_trl.speed import (
    GROUPED,
    Setting,
    run_trl,
    run_tunesmith,
    take_median,
    tokens_per_second,
)
from transformers import AutoConfig, AutoModelForCausalLM

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
        ours = [run_tunesmith(bench)]
        theirs = [[run_trl(bench, setting)] for setting in SETTINGS]
        for _ in range(SIZE.rounds - 1):
            ours.append(run_tunesmith(bench))
            for setting, runs in zip(SETTINGS, theirs, strict=True):
                runs.append(run_trl(bench, setting))
        report(ours, theirs)


def report(ours: list, theirs: list) -> None:
    print("| | tokens/s | peak memory | tunesmith's speed | tunesmith's memory |")
    print("|---|---|---|---|---|")
    speed = take_median(ours)["tokens_per_second"]
    peak = max(run["peak_bytes"] for run in ours)
    print(f"| tunesmith, packed | {speed:.0f} | {peak / 1e9:.2f} GB | | |")
    best = max(theirs, key=lambda runs: tokens_per_second(take_median(runs)))
    for runs in theirs:
        other = take_median(runs)
        other_peak = max(run["peak_bytes"] for run in runs)
        print(
            f"| TRL, {other['name']}{', its fastest' if runs is best else ''} "
            f"| {other['tokens_per_second']:.0f} | {other_peak / 1e9:.2f} GB "
            f"| {speed / other['tokens_per_second']:.2f}x | {peak / other_peak:.2f}x |"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 8)
