"""Measure memory and CPU time of continued pretraining on corpora of different sizes.

    python -m benchmarks.data.corpus make ROOT FOLDER --megabytes 2048
    python -m benchmarks.data.corpus run FOLDER SMALL_FOLDER   for docs/results/cpt.md

`make` writes copies of every text, manual page, dictionary and HTML page below ROOT (unpacked
Debian packages) until the size is reached; each copy drops other paragraphs and starts elsewhere,
so no two documents are equal. A third each are .txt files, .md files and rows of .jsonl files.
`run` trains a random two-layer network with SmolLM2's tokenizer, since reading is what is measured.
Each run is a process; one is killed with SIGKILL and resumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import html
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tunesmith.core.events import Event, TrainStep
from tunesmith.core.hardware import read_peak_bytes

MAX_STEPS = 24
SAVE_STEPS = 6
KILL_STEP = 15
MAX_CHARS = 2_000_000  # per document
MIN_CHARS = 200
MARKUP = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)
ROFF = re.compile(r"^\.\\\".*\n|^\.[A-Za-z]{1,2}\b *|\\f[A-Z]|\\&", re.MULTILINE)


# ---------------------------------------------------------------- the texts


def read_text(path: Path) -> str | None:
    """Return the plain text of a file, or None if it is not a text."""
    is_manual = "man" in path.parts
    is_packed_text = path.suffix == ".gz" and (is_manual or ".txt" in path.suffixes)
    if path.suffix == ".dz" or is_packed_text:
        text = gzip.decompress(path.read_bytes()).decode(errors="replace")
    elif path.suffix in (".txt", ".html", ".pod", ".rst"):
        text = path.read_text("utf-8", errors="replace")
    else:
        return None
    if path.suffix == ".html":
        text = html.unescape(MARKUP.sub("", text))
    if is_manual:
        text = ROFF.sub("", text)
    return re.sub(r"\n\s*\n+", "\n\n", text).replace("\0", "")


def iter_texts(root: Path) -> Iterator[str]:
    """Yield every text below a folder; long ones are split."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        text = read_text(path) or ""
        for start in range(0, len(text), MAX_CHARS):
            part = text[start : start + MAX_CHARS].strip()
            if len(part) >= MIN_CHARS:
                yield part


def vary_text(text: str, copy: int, rng: random.Random) -> str:
    """Drop a tenth of the paragraphs and rotate the rest, so that each copy differs."""
    paragraphs = [part for part in text.split("\n\n") if rng.random() > 0.1] or [text]
    start = rng.randrange(len(paragraphs))
    return f"Edition {copy}.\n\n" + "\n\n".join(paragraphs[start:] + paragraphs[:start])


def make_corpus(root: Path, folder: Path, size: int) -> None:
    """Write a corpus of `size` bytes into `folder`."""
    rng = random.Random(0)
    written = 0
    number = 0
    originals = list(iter_texts(root))
    rng.shuffle(originals)
    for copy in count():
        copy_dir = folder / f"copy-{copy}"
        copy_dir.mkdir(parents=True)
        with (copy_dir / "rows.jsonl").open("w") as rows:
            for original in originals:
                text = vary_text(original, copy, rng)
                written += len(text.encode())
                number += 1
                if number % 3 == 0:
                    rows.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                else:
                    suffix = "txt" if number % 3 == 1 else "md"
                    (copy_dir / f"{number:06}.{suffix}").write_text(text)
                if written >= size:
                    print(f"{number:,} documents, {written:,} bytes, {copy + 1} copies")
                    return


# ---------------------------------------------------------------- runs


def make_model(folder: Path) -> Path:
    """Write a random two-layer network with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tunesmith.model.hub.resolve import resolve_model

    base = resolve_model("smollm2-135m-instruct")
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig.from_pretrained(base)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    config.update(sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def make_recipe(model: Path, corpus: Path, output_dir: Path) -> dict[str, Any]:
    rows = [str(path) for path in sorted(corpus.rglob("*.jsonl"))]
    return {
        "model": str(model),
        "stage": "cpt",
        "data": [str(corpus), *rows],
        "output_dir": str(output_dir),
        "method": "lora",
        "dtype": "fp32",
        "lora_r": 8,
        "max_length": 512,
        "batch_tokens": 1024,
        "max_steps": MAX_STEPS,
        "save_steps": SAVE_STEPS,
    }


def print_line(name: str, start: float, **values: Any) -> None:
    """Print a line of JSON with the time and the peak memory so far."""
    line = {
        "run": name,
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time(),
        "peak": read_peak_bytes(),
    }
    print(json.dumps(line | values), flush=True)


def print_steps(events: Iterable[Event], name: str, start: float) -> None:
    for event in events:
        if isinstance(event, TrainStep):
            print_line(name, start, step=event.step)


def run_child(model: Path, corpus: Path, output: Path) -> None:
    """Train the run `straight` to its end, then `killed`, which the parent kills; or resume it."""
    from tunesmith.recipe.schema import Recipe
    from tunesmith.session import inputs, planner
    from tunesmith.train import run

    start = time.perf_counter()
    killed_dir = output / "killed"
    if (killed_dir / "plan.json").exists():
        print_steps(run.resume(killed_dir), "resumed", start)
        return
    recipe = Recipe.model_validate(make_recipe(model, corpus, output / "straight"))
    run_inputs = inputs.load_inputs(recipe)
    tokens = planner.build_data_reports(run_inputs)["data"].tokens
    print_line("read", start, windows=len(run_inputs.corpus or ()), tokens=tokens)
    print_steps(run.train(planner.make_plan(run_inputs), run_inputs), "straight", start)
    killed_recipe = recipe.model_copy(update={"output_dir": killed_dir})
    run_inputs = dataclasses.replace(run_inputs, output_dir=killed_dir, recipe=killed_recipe)
    print_steps(run.train(planner.make_plan(run_inputs), run_inputs), "killed", start)


def follow_child(command: list[str]) -> list[dict[str, Any]]:
    """Return the lines that the child prints; kill it in the middle of its second run."""
    lines: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            lines.append(json.loads(line))
            sys.stderr.write(line)
            if lines[-1]["run"] == "killed" and lines[-1]["step"] == KILL_STEP:
                os.kill(process.pid, signal.SIGKILL)
    return lines


def hash_adapter(run_dir: Path) -> str:
    path = run_dir / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure_corpus(model: Path, corpus: Path, output: Path) -> str:
    """Train on a corpus and return the table row."""
    paths = [str(model), str(corpus), str(output)]
    command = [sys.executable, "-m", "benchmarks.data.corpus", "child", *paths]
    first_lines = follow_child(command)
    resumed_lines = follow_child(command)
    straight = hash_adapter(output / "straight")
    resumed = hash_adapter(output / "killed")
    outcome = "equal" if straight == resumed else "DIFFERENT"
    read = first_lines[0]
    size = sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file())
    straight_peak = max(line["peak"] for line in first_lines if line["run"] == "straight")
    cells = (
        f"{size / 1e6:,.0f} MB",
        f"{read['tokens']:,}",
        f"{read['cpu']:,.0f} s",
        f"{read['peak'] / 1e6:,.0f} MB",
        f"{straight_peak / 1e6:,.0f} MB",
        f"{resumed_lines[-1]['peak'] / 1e6:,.0f} MB",
        f"{outcome}, {straight[:12]} and {resumed[:12]}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("make", "run", "child"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--megabytes", type=int, default=2048)
    args = parser.parse_args()
    if args.command == "make":
        make_corpus(args.paths[0], args.paths[1], args.megabytes * 10**6)
    elif args.command == "child":
        run_child(args.paths[0], args.paths[1], args.paths[2])
    else:
        print("| texts | tokens | CPU to read | peak then | peak | peak, resumed | adapters |")
        print("|---|---|---|---|---|---|---|")
        with TemporaryDirectory(dir="/var/tmp") as scratch:
            model = make_model(Path(scratch) / "model")
            for number, corpus in enumerate(args.paths):
                print(measure_corpus(model, corpus, Path(scratch) / str(number)), flush=True)


if __name__ == "__main__":
    main()
