"""What seeds usually add: pairs of runs of the book of claims that differ in the seed alone.

    python -m benchmarks.evaluate.seed_noise [--write]

A pair counts as called different if its verdict is better or worse. `held out` leaves each
experiment out in turn, and counts the intervals of its pairs that do not hold 0. Arms of the guard
end early or collapse on purpose, and are left out."""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from experiments.arms import RUN_TASK, ArmRun

from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.types import Comparison
from tunesmith.evaluate.pairing import pair_measurements
from tunesmith.evaluate.results import EvalResults, compare_measurements
from tunesmith.evaluate.seed_noise import NOISE_FILE, add_seed_noise, choose_kind
from tunesmith.evaluate.statistics import Z, compute_standard_error, judge_comparison

RESULTS = sorted(Path("experiments").glob("*/results.json"))
Pair = tuple[str, Comparison]  # experiment, second seed minus the first


def iter_pairs() -> Iterator[Pair]:
    for file in RESULTS:
        if file.parent.name.startswith("guard") or file.parent.name == "relearning":
            continue
        arms: defaultdict[bytes, dict[int, ArmRun]] = defaultdict(dict)
        for entry in read_json(file):
            recipe = {k: v for k, v in entry["settings"]["recipe"].items() if k != "seed"}
            key = dump_json([entry["arm"], {**entry["settings"], "recipe": recipe}])
            arms[key][entry["seed"]] = parse_as(ArmRun, entry["run"])
        for seeds in arms.values():
            for first, second in itertools.combinations(sorted(seeds), 2):
                results = [EvalResults(seeds[seed].after) for seed in (first, second)]
                for pair in pair_measurements(*results)[0]:
                    if pair[0].task != RUN_TASK:
                        yield file.parent.name, compare_measurements(*pair)


def estimate_sd(pairs: Sequence[Pair]) -> float:
    """Return the larger of the sd with which 95% of the intervals hold 0, and of the root mean
    square of what the differences have beyond the variance of the items."""
    needed: list[float] = []
    excesses: list[float] = []
    for _, comparison in pairs:
        level = compute_level(comparison)
        end = comparison.low if comparison.difference > 0 else comparison.high
        square = comparison.difference**2
        needed.append(math.sqrt(max(0.0, square - (comparison.difference - end) ** 2)) / Z / level)
        error = compute_standard_error(comparison.low, comparison.high)
        excesses.append(max(0.0, square - error**2) / level**2)
    return max(float(np.quantile(needed, 0.95)), math.sqrt(float(np.mean(excesses))))


def compute_level(comparison: Comparison) -> float:
    if choose_kind(comparison) == "grade":
        return 1.0
    return max(1e-9, abs(comparison.before.value) + abs(comparison.after.value)) / 2


def count_outside(pairs: Sequence[Pair], sd: float) -> int:
    """Return the pairs whose interval with the seeds' part does not hold 0."""
    outside = 0
    for _, comparison in pairs:
        end = comparison.low if comparison.difference > 0 else comparison.high
        half = math.hypot(comparison.difference - end, Z * sd * compute_level(comparison))
        outside += abs(comparison.difference) > half
    return outside


def build_table() -> list[list[str]]:
    by_kind = group_pairs()
    rows = [["metric", "pairs", "by items alone", "by compare", "sd of seeds", "held out"]]
    rows.append(["---"] * len(rows[0]))
    sums = np.zeros(4, dtype=int)
    for kind, pairs in by_kind.items():
        alone = sum(judge_comparison(each) in ("better", "worse") for _, each in pairs)
        noisy = [add_seed_noise(each, None) for _, each in pairs]
        called = sum(judge_comparison(each) in ("better", "worse") for each in noisy)
        held_out = 0
        for name in sorted({name for name, _ in pairs}):
            others = [pair for pair in pairs if pair[0] != name]
            tested = [pair for pair in pairs if pair[0] == name]
            held_out += count_outside(tested, estimate_sd(others or tested))
        sd = f"{estimate_sd(pairs):.3f}" + ("" if kind == "grade" else " of the value")
        rows.append([kind, *map(str, (len(pairs), alone, called)), sd, str(held_out)])
        sums += (len(pairs), alone, called, held_out)
    rows.append(["all", *map(str, sums[:3]), "", str(sums[3])])
    return rows


def group_pairs() -> dict[str, list[Pair]]:
    by_kind: dict[str, list[Pair]] = {}
    for pair in iter_pairs():
        by_kind.setdefault(choose_kind(pair[1]), []).append(pair)
    return by_kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="the table that compare reads")
    options = parser.parse_args()
    if options.write:
        kinds = {
            kind: {"sd": round(estimate_sd(pairs), 4), "pairs": len(pairs)}
            for kind, pairs in group_pairs().items()
        }
        source = "python -m benchmarks.evaluate.seed_noise --write"
        NOISE_FILE.write_bytes(dump_json({"source": source, "kinds": kinds}, indent=1) + b"\n")
    for row in build_table():
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
