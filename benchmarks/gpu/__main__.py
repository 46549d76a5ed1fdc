"""Measure training on this GPU in ten minutes, without a network.

    python -m benchmarks.gpu [--minutes 10] [--config config.json] [--device cpu] [--pack 8192]

It prints tokens per second, model FLOPs utilization, kernels of a step, and the peak of memory
beside the predicted one, for 8B LoRA and QLoRA at 350, 2,048 and 4,096 tokens and for 135M; then
TRL and Unsloth on the same ids where they are installed, with the ratio. `--config` measures
another model. What the time did not suffice for is named. `--device cpu` is for a tiny config: it
shows that the benchmark runs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarks.gpu.work import QWEN3_8B, SMOLLM2_135M, Result, Work

LENGTHS = (350, 2048, 4096)
MEASURED_SECONDS = 8.0  # of steps, per side
COLUMNS = ("work", "side", "tokens/s", "ratio", "MFU", "kernels", "peak GB", "predicted GB")
WIDTHS = (28, 10, 10, 6, 6, 8, 8, 12)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--config", type=Path, help="a config.json; default: 8B and 135M")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--pack", type=int, default=8192, help="tokens of a pack")
    parser.add_argument("--seconds", type=float, default=MEASURED_SECONDS)
    return parser.parse_args()


def list_works(options: argparse.Namespace, folder: Path) -> Iterator[Work]:
    """Yield the lines of the table, with a folder for each model that holds its config.json."""
    configs = {"8B": QWEN3_8B, "135M": SMOLLM2_135M}
    if options.config:
        configs = {options.config.parent.name or "model": json.loads(options.config.read_text())}
    for name, config in configs.items():
        model_folder = folder / name
        model_folder.mkdir()
        (model_folder / "config.json").write_text(json.dumps(config))
        for method in ("lora",) if name == "135M" else ("lora", "qlora"):
            for length in LENGTHS[:1] if name == "135M" else LENGTHS:
                if length <= options.pack:
                    yield Work(
                        name,
                        method,
                        document_tokens=length,
                        pack_tokens=options.pack,
                        folder=str(model_folder),
                        device=options.device,
                        seconds=options.seconds,
                    )


def list_sides() -> list[str]:
    """Return tunesmith and the peers that are installed. Unsloth needs a GPU to be imported."""
    return ["tunesmith", *(name for name in ("trl", "unsloth") if find_spec(name))]


def run_side(side: str, work: Work, seconds: float) -> Result:
    """Run a side in a process of its own, which may take so many seconds."""
    module = ["benchmarks.gpu.tunesmith_side"]
    if side != "tunesmith":
        module = ["benchmarks.gpu.peer_side", side]
        save_weights(Path(work.folder))
    command = [sys.executable, "-W", "ignore", "-m", *module, json.dumps(asdict(work))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(seconds, 1)
        )
    except subprocess.TimeoutExpired:
        return Result(problem="the time was used up")
    if done.returncode:
        return Result(problem=(done.stderr.strip().splitlines() or ["?"])[-1])
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def save_weights(folder: Path) -> None:
    """Write random weights, which peers load from a folder."""
    if any(folder.glob("*.safetensors")):
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(folder)


def describe(work: Work, side: str, result: Result, ours: Result | None) -> str:
    """Return a line of the table."""
    if result.problem:
        return f"{work.title:28} {side:10} {result.problem[:80]}"
    ratio = ours.tokens_per_second / result.tokens_per_second if ours else 0.0
    values = (
        f"{result.tokens_per_second:,.0f}",
        f"{ratio:.2f}" if ratio else "",
        f"{result.utilization:.0%}" if result.utilization else "",
        f"{result.kernels:,}" if result.kernels else "",
        f"{result.peak_bytes / 1e9:.1f}" if result.peak_bytes else "",
        f"{result.predicted_bytes / 1e9:.1f}" if result.predicted_bytes else "",
    )
    cells = [f"{value:>{width}}" for value, width in zip(values, WIDTHS[2:], strict=True)]
    return " ".join([f"{work.title:28}", f"{side:10}", *cells])


def main() -> int:
    options = parse_arguments()
    deadline = time.monotonic() + 60 * options.minutes
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device; `tunesmith doctor` says why", file=sys.stderr)
        return 3
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {options.seconds:g} s of steps per side")
    print("The ratio is tunesmith's rate to the peer's.")
    print(" ".join(f"{column:{width}}" for column, width in zip(COLUMNS, WIDTHS, strict=True)))
    failed = False
    with TemporaryDirectory() as scratch:
        works = list(list_works(options, Path(scratch)))
        results: dict[str, Result] = {}
        # all of ours first: peers take what time is left
        for side in list_sides():
            for work in works:
                seconds = deadline - time.monotonic()
                result = Result(problem="the time was used up")
                if seconds > 0:
                    result = run_side(side, work, seconds)
                if side == "tunesmith":
                    results[work.title] = result
                    failed |= bool(result.problem)
                ours = results[work.title] if side != "tunesmith" else None
                print(describe(work, side, result, ours), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
