"""Compare tunesmith with TRL + PEFT on the same rows, model, adapter and cores.

    python -m benchmarks.vs_trl.run [--quick] [--only PART ...] [--out FILE.json]

Each side runs in its own process. Prints a table and writes every number to a file. Nothing else
should run on the machine meanwhile. --quick only checks that everything works; its numbers are
meaningless. What is measured and how: docs/results/speed.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.vs_trl.job import count_threads, run_module
from benchmarks.vs_trl.prefix_sharing import prefix
from benchmarks.vs_trl.prepare import MODEL, Bench, log, prepare
from benchmarks.vs_trl.speed import measure_losses, speed
from benchmarks.vs_trl.startup import measure_rendering, measure_startup
from benchmarks.vs_trl.table import table

from tunesmith.core.hardware import measure_machine
from tunesmith.core.json_io import to_jsonable
from tunesmith.core.types import Json

PACKAGES = ("trl", "peft", "transformers", "torch", "accelerate", "datasets")
IDLE_LOAD = 0.5  # a load average above it means that something else is running


def gemm(bench: Bench) -> Json:
    log("matrix products")
    return run_module("benchmarks.vs_trl.gemm", bench.model, str(bench.size.gemm_seconds))


def start(bench: Bench) -> Json:
    log("start to first step")
    return measure_startup(MODEL, bench.rows_file, bench.folder)


def render(bench: Bench) -> Json:
    log("rendering and tokenizing")
    return {"rows_per_second": measure_rendering(bench.model, bench.rows)}


PARTS: dict[str, Callable[[Bench], Json]] = {
    "gemm": gemm,
    "render": render,
    "start": start,
    "speed": speed,
    "loss": measure_losses,
    "prefix": prefix,
}


def about(bench: Bench, load: float) -> Json:
    """Describe the machine, the versions and the rows."""
    return {
        "quick": bench.quick,
        "load_before": load,
        "threads": count_threads(),
        "machine": to_jsonable(measure_machine(bench.folder)),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "rows": bench.describe_rows(),
    }


def write(path: Path, results: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare tunesmith with TRL + PEFT.")
    parser.add_argument("--quick", action="store_true", help="Only check that everything works.")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="Run only these parts."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench.json"), help="File for all numbers."
    )
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    if load > IDLE_LOAD:
        log(f"the load average is {load:.1f}: other programs are running; do not trust the numbers")
    with TemporaryDirectory() as scratch:
        bench = prepare(Path(scratch), quick=args.quick)
        results = about(bench, load)
        for name, part in PARTS.items():
            if name in args.only:
                results[name] = part(bench)
                write(args.out, results)  # after each: a part that fails loses only itself
    print(table(results))
    log(f"all numbers: {args.out}" + (" (a quick run: meaningless)" if args.quick else ""))


if __name__ == "__main__":
    main()
