"""Measure the server, line by line (L1 to L8): on a tiny model in minutes, or on a real one.

    python -m benchmarks.serving [--model MODEL] [--lines L3 L4 ...] [--minutes N]

The tiny model has random weights, and its numbers say that the lines work, not how fast anything
is. L1 (http.py) and L2 (adapter_bank.py) need a real model, and are left out without one."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.serving.live_lines import (
    open_lab,
    print_changes,
    print_cold,
    print_fairness,
    print_latencies,
    print_overhead,
    print_registered,
    print_soak,
)

sys.path.append(str(Path(__file__).parents[2] / "tests" / "helpers"))

from tiny_runs import save_writer_folder
from tunesmith.model.hub.resolve import resolve_model

LINES = {
    "L3": print_latencies,
    "L4": print_changes,
    "L5": print_registered,
    "W3": print_cold,
    "L6": print_overhead,
    "L7": print_fairness,
}
SOAK = "L8"
REAL = {"L1": "benchmarks.serving.http", "L2": "benchmarks.serving.adapter_bank"}
ALL_LINES = [*REAL, *LINES, SOAK]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a tiny one by default")
    parser.add_argument("--lines", nargs="+", choices=ALL_LINES, default=ALL_LINES)
    parser.add_argument("--tokens", type=int, help="of an answer; 24, or 96 with --model")
    parser.add_argument("--minutes", type=float, default=0.2, help="of L8; 30 for a verdict")
    args = parser.parse_args()
    for line in [line for line in args.lines if line in REAL]:
        if args.model:
            print(f"{line}:", flush=True)
            subprocess.run([sys.executable, "-m", REAL[line], "--model", args.model], check=True)
        else:
            print(f"{line} needs --model")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = resolve_model(args.model) if args.model else save_writer_folder(folder / "base")
        dtype = "bf16" if args.model else "fp32"
        num_tokens = args.tokens or (96 if args.model else 24)
        (folder / "adapters").mkdir()
        with open_lab(base, folder / "adapters", num_tokens=num_tokens, dtype=dtype) as lab:
            for line in args.lines:
                if line == SOAK:
                    print_soak(lab, args.minutes)
                elif line in LINES:
                    LINES[line](lab)


if __name__ == "__main__":
    main()
