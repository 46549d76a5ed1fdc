"""Compare the planned memory with the measured peak, for the built-in model and other shapes.

    python -m benchmarks.train.memory_model [SHAPE ...]

Each run is two steps in its own process, on rows of equal length, without evaluation; the other
shapes have random weights and the built-in model's tokenizer. Corrections from earlier runs are not
used. Prints the predicted peak, those of the steps and of preflight before them, the ratio of the
first two, and the predicted parts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

import tunesmith
from tunesmith.core.events import CheckResult, TrainStep
from tunesmith.core.hardware import read_peak_bytes, reset_peak
from tunesmith.core.types import Plan
from tunesmith.model.hub.resolve import resolve_model

BASE = "smollm2-135m-instruct"
SIZES: dict[str, Any] = {
    "vocab_size": 49_152,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(
        **SIZES,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=12,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "llama": LlamaConfig(
        **SIZES,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    ),
}
# layers of other kinds, 4 of 512: (model type, sizes)
SMALL: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "delta": (
        "qwen3_5_text",
        {
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "conv": ("lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "mamba2": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 1536,
            "mamba_n_heads": 16,
            "mamba_d_head": 64,
            "mamba_d_state": 64,
            "mamba_n_groups": 1,
        },
    ),
    "experts": (
        "qwen3_moe",
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 384},
    ),
    "between": (  # dense layers between those with experts
        "qwen3_moe",
        {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 384,
            "mlp_only_layers": [1, 2],
        },
    ),
}
# shape -> what its recipe has beside
SETTINGS: dict[str, dict[str, Any]] = {"between": {"lora_target_modules": "experts"}}
for name, (model_type, sizes) in HYBRIDS.items():
    SHAPES[name] = AutoConfig.for_model(model_type, **SIZES, **SMALL, **sizes)
METHODS = ("lora", "qlora", "full")
ROWS = ((100, 3), (700, 1))  # (words per row, rows per step); a step is one pack
HEAD = 20  # factor of the initial head weights


def write_model(shape: str, folder: Path) -> None:
    """Write a model with random weights.

    The head's are large, or preflight could not tell tokens apart.
    """
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
    network.get_output_embeddings().weight.data.mul_(HEAD)
    network.save_pretrained(folder)
    for file in resolve_model(BASE).iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder)


def measure_run(model: str, method: str, words: int, batch: int) -> None:
    with TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        text = " ".join(f"word{i % 97}" for i in range(words))
        with rows.open("w") as file:
            for number in range(12):
                turns = [
                    ("user", f"{number} {text}"),
                    ("assistant", f"{number} " + text[: len(text) // 4]),
                ]
                row = {"messages": [{"role": role, "content": content} for role, content in turns]}
                file.write(json.dumps(row) + "\n")
        recipe = {
            "model": model,
            "data": str(rows),
            "method": method,
            "batch_size": batch,
            "max_steps": 2,
        }
        recipe |= {"share_prefixes": False, "output_dir": f"{scratch}/run"}
        recipe |= SETTINGS.get(Path(model).name, {})
        plan = tunesmith.plan(recipe)
        assert isinstance(plan, Plan), "one stage"
        preflight = 0
        peak = 0
        for event in tunesmith.train(plan):
            if isinstance(event, CheckResult):
                preflight = max(preflight, read_peak_bytes())
                assert reset_peak(), "the kernel does not reset peaks"
            elif isinstance(event, TrainStep):
                peak = max(peak, event.peak_bytes)
    result = {"peak": peak, "preflight": preflight, "parts": plan.memory_bytes}
    print(json.dumps(result | {"tokens": plan.data["data"].length_percentiles["p50"]}))


def run_case(model: str, method: str, words: int, batch: int) -> dict[str, Any]:
    """Return the bytes that `measure_run` prints in a process of its own."""
    arguments = ["--measure", model, method, str(words), str(batch)]
    command = [sys.executable, "-m", "benchmarks.train.memory_model", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compute_ratio(result: dict[str, Any]) -> float:
    """Return predicted by measured, without what earlier runs of this machine corrected."""
    parts = result["parts"]
    return (parts["peak"] - parts.get("correction", 0)) / result["peak"]


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure_run(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
        return
    print(
        "| model | method | tokens per row | predicted | steps | ratio | preflight | parts, MB |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for shape in sys.argv[1:] or (BASE, *SHAPES):
        with TemporaryDirectory() as folder:
            if shape in SHAPES:
                write_model(shape, Path(folder) / shape)
            model = f"{folder}/{shape}" if shape in SHAPES else shape
            for method in METHODS:
                if method == "full" and shape in ("experts", "between"):
                    continue  # refused
                for words, batch in ROWS:
                    result = run_case(model, method, words, batch)
                    parts, peak = result["parts"], result["peak"]
                    ratio = compute_ratio(result)
                    preflight = result["preflight"] / 1e9
                    predicted = parts.pop("peak") - parts.pop("correction", 0)
                    shown = ", ".join(f"{k} {v / 1e6:.0f}" for k, v in parts.items() if v)
                    print(
                        f"| {shape} | {method} | {result['tokens']} "
                        f"| {predicted / 1e9:.2f} GB | {peak / 1e9:.2f} GB "
                        f"| {ratio:.2f} | {preflight:.2f} GB | {shown} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
