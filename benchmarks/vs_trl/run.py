"""tunesmith beside TRL + PEFT on the same work: the same rows, model, adapter and cores, each side
in its own process.

    python -m benchmarks.vs_trl.run [--quick] [--only PART ...] [--out FILE.json]

Prints one table and writes every number to a file. Nothing else should run on the machine
meanwhile. --quick shows that everything works; its numbers mean nothing. What is measured and how:
docs/results/speed.md."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.vs_trl.job import call, threads
from benchmarks.vs_trl.prefix_sharing import prefix
from benchmarks.vs_trl.prepare import MODEL, Bench, note, prepare
from benchmarks.vs_trl.speed import losses, speed
from benchmarks.vs_trl.startup import rows_per_second, seconds_to_first_step
from benchmarks.vs_trl.table import table

from tunesmith.core.hardware import measure_machine
from tunesmith.core.json_io import to_jsonable
from tunesmith.core.types import Json

PACKAGES = ("trl", "peft", "transformers", "torch", "accelerate", "datasets")
IDLE_LOAD = 0.5  # a load average above it means that something else is running


def gemm(bench: Bench) -> Json:
    note("matrix products")
    return call("benchmarks.vs_trl.gemm", bench.model, str(bench.size.gemm_seconds))


def start(bench: Bench) -> Json:
    note("start to first step")
    return seconds_to_first_step(MODEL, bench.rows_file, bench.folder)


def render(bench: Bench) -> Json:
    note("rendering and tokenising")
    return {"rows_per_second": rows_per_second(bench.model, bench.rows)}


PARTS: dict[str, Callable[[Bench], Json]] = {
    "gemm": gemm,
    "render": render,
    "start": start,
    "speed": speed,
    "loss": losses,
    "prefix": prefix,
}


def about(bench: Bench, load: float) -> Json:
    """What the numbers belong to."""
    return {
        "quick": bench.quick,
        "load_before": load,
        "threads": threads(),
        "machine": to_jsonable(measure_machine(bench.folder)),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "rows": bench.about_rows(),
    }


def write(path: Path, results: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="tunesmith beside TRL + PEFT on the same work")
    parser.add_argument(
        "--quick", action="store_true", help="show that everything works, in a few minutes"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench.json"), help="where all numbers go"
    )
    wish = parser.parse_args(words)
    load = os.getloadavg()[0]
    if load > IDLE_LOAD:
        note(f"the load average is {load:.1f}: something else is running, do not trust the numbers")
    with TemporaryDirectory() as scratch:
        bench = prepare(Path(scratch), quick=wish.quick)
        results = about(bench, load)
        for name, part in PARTS.items():
            if name in wish.only:
                results[name] = part(bench)
                write(wish.out, results)  # after each: a part that fails loses only itself
    print(table(results))
    note(f"all numbers: {wish.out}" + (" (a quick run: they mean nothing)" if wish.quick else ""))


if __name__ == "__main__":
    main()
