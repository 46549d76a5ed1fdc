"""Continued pretraining on a folder of 2 GB beside one of 20 MB: memory, processor time until read,
and a killed run.

    python -m benchmarks.data.corpus make ROOT FOLDER --megabytes 2048    real texts of Debian packages, unpacked below ROOT
    python -m benchmarks.data.corpus run FOLDER SMALL_FOLDER              prints the table of docs/guides/cpt.md

`make` takes every text, manual page, dictionary and HTML page below ROOT, and writes copies of them
until the size is reached; each copy leaves out other paragraphs and begins elsewhere, so no two
documents are equal. Of three documents one is a .txt file, one a .md file, one a row of a .jsonl
file. `run` trains a random network of two layers, with SmolLM2's tokenizer: what is measured is
reading. Each run is a process of its own; the killed one gets SIGKILL."""

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
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

STEPS, SAVE, KILLED_AT = 24, 6, 15
LONGEST, FEWEST = 2_000_000, 200  # characters of a document
MARKUP = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)
ROFF = re.compile(r"^\.\\\".*\n|^\.[A-Za-z]{1,2}\b *|\\f[A-Z]|\\&", re.MULTILINE)


# ---------------------------------------------------------------- the texts


def texts(root: Path) -> Iterator[str]:
    """Every text below a folder, long ones in parts."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        if path.suffix in (".gz", ".dz") and (
            path.suffix == ".dz" or "man" in path.parts or ".txt" in path.suffixes
        ):
            text = gzip.decompress(path.read_bytes()).decode(errors="replace")
        elif path.suffix in (".txt", ".html", ".pod", ".rst"):
            text = path.read_text("utf-8", errors="replace")
        else:
            continue
        text = html.unescape(MARKUP.sub("", text)) if path.suffix == ".html" else text
        text = ROFF.sub("", text) if "man" in path.parts else text
        text = re.sub(r"\n\s*\n+", "\n\n", text).replace("\0", "")
        for start in range(0, len(text), LONGEST):
            if len(part := text[start : start + LONGEST].strip()) >= FEWEST:
                yield part


def changed(text: str, copy: int, chance: random.Random) -> str:
    """The text as this copy has it."""
    paragraphs = [one for one in text.split("\n\n") if chance.random() > 0.1] or [text]
    start = chance.randrange(len(paragraphs))
    return f"Edition {copy}.\n\n" + "\n\n".join(paragraphs[start:] + paragraphs[:start])


def make(root: Path, folder: Path, size: int) -> None:
    chance, written, number = random.Random(0), 0, 0
    originals = list(texts(root))
    chance.shuffle(originals)
    for copy in count():
        place = folder / f"copy-{copy}"
        place.mkdir(parents=True)
        with (place / "rows.jsonl").open("w") as rows:
            for text in originals:
                text = changed(text, copy, chance)
                written, number = written + len(text.encode()), number + 1
                if number % 3 == 0:
                    rows.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                else:
                    (place / f"{number:06}.{'txt' if number % 3 == 1 else 'md'}").write_text(text)
                if written >= size:
                    print(
                        f"{number:,} documents, {written:,} bytes, {copy + 1} copies of {len(originals):,} texts"
                    )
                    return


# ---------------------------------------------------------------- runs


def small_model(folder: Path) -> Path:
    """SmolLM2's tokenizer on a random network of two layers."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tunesmith.model.hub.resolve import resolve_model

    base = resolve_model("smollm2-135m-instruct")
    shutil.copytree(
        base, folder, ignore=lambda _, names: [one for one in names if one.endswith(".safetensors")]
    )
    config = LlamaConfig.from_pretrained(base)
    config.update(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
    )
    config.update({"num_key_value_heads": 1, "head_dim": 32})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def recipe(model: Path, corpus: Path, output: Path) -> dict[str, Any]:
    rows = [str(path) for path in sorted(corpus.rglob("*.jsonl"))]
    sizes = {"max_length": 512, "batch_tokens": 1024, "max_steps": STEPS, "save_steps": SAVE}
    method = {"method": "lora", "dtype": "fp32", "lora_r": 8}
    return (
        {
            "model": str(model),
            "stage": "cpt",
            "data": [str(corpus), *rows],
            "output_dir": str(output),
        }
        | method
        | sizes
    )


def peak() -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def told(events: Iterator[Any], name: str, begun: float) -> None:
    """Each step, as a line of JSON, as it is done."""
    for event in events:
        if type(event).__name__ == "StepResult":
            seconds, processor = time.perf_counter() - begun, time.process_time()
            line = {
                "run": name,
                "step": event.step,
                "seconds": seconds,
                "processor": processor,
                "peak": peak(),
            }
            print(json.dumps(line), flush=True)


def child(model: Path, corpus: Path, output: Path) -> None:
    """One run to its end, then another one of the same facts, which whoever reads along ends; or
    goes on with it."""
    from tunesmith.recipe.schema import Recipe
    from tunesmith.session import inputs
    from tunesmith.train import run

    begun = time.perf_counter()
    if (output / "killed" / "plan.json").exists():
        told(run.resume(output / "killed"), "resumed", begun)
        return
    known = inputs.load_inputs(Recipe.model_validate(recipe(model, corpus, output / "straight")))
    found = {
        "windows": len(known.corpus or ()),
        "tokens": inputs.build_data_reports(known)["data"].tokens,
    }
    found |= {
        "run": "read",
        "seconds": time.perf_counter() - begun,
        "processor": time.process_time(),
        "peak": peak(),
    }
    print(json.dumps(found), flush=True)
    told(run.train(inputs.make_plan(known), known), "straight", begun)
    again = dataclasses.replace(
        known,
        output_dir=output / "killed",
        recipe=known.recipe.model_copy(update={"output_dir": output / "killed"}),
    )
    told(run.train(inputs.make_plan(again), again), "killed", begun)


def followed(command: list[str]) -> list[dict[str, Any]]:
    """What the child says; it is killed in the middle of its second run."""
    lines: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            lines.append(json.loads(line))
            sys.stderr.write(line)
            if lines[-1]["run"] == "killed" and lines[-1]["step"] == KILLED_AT:
                os.kill(process.pid, signal.SIGKILL)
    return lines


def measure(model: Path, corpus: Path, output: Path) -> str:
    """A line of the table."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.data.corpus",
        "child",
        str(model),
        str(corpus),
        str(output),
    ]
    first, second = followed(command), followed(command)
    shas = [
        hashlib.sha256(
            (output / name / "adapter" / "adapter_model.safetensors").read_bytes()
        ).hexdigest()
        for name in ("straight", "killed")
    ]
    read, last = first[0], second[-1]
    size = sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file())
    end = max(one["peak"] for one in first if one["run"] == "straight")
    same = "equal" if shas[0] == shas[1] else "DIFFERENT"
    return (
        f"| {size / 1e6:,.0f} MB | {read['tokens']:,} | {read['processor']:,.0f} s | {read['peak'] / 1e6:,.0f} MB | "
        f"{end / 1e6:,.0f} MB | {last['peak'] / 1e6:,.0f} MB | {same}, {shas[0][:12]} and {shas[1][:12]} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "run", "child"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--megabytes", type=int, default=2048)
    wish = parser.parse_args()
    if wish.what == "make":
        return make(wish.paths[0], wish.paths[1], wish.megabytes * 10**6)
    if wish.what == "child":
        return child(wish.paths[0], wish.paths[1], wish.paths[2])
    print(
        "| texts | tokens | processor until read | peak then | peak, straight | peak, resumed | adapter |"
    )
    print("|---|---|---|---|---|---|---|")
    with TemporaryDirectory(dir="/var/tmp") as scratch:
        model = small_model(Path(scratch) / "model")
        for number, corpus in enumerate(wish.paths):
            print(measure(model, corpus, Path(scratch) / str(number)), flush=True)
    return None


if __name__ == "__main__":
    main()
