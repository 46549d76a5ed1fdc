"""What training seeds add to the difference between two trained models.

    add_seed_noise(comparison, None)      two models of one seed each: what seeds usually add
    add_seed_noise(comparison, spread)    seeds were measured: their spread in place of the usual

The usual standard deviation, by kind of metric, is that of pairs of runs which differ in nothing
but the seed (seed_noise.json, which benchmarks/evaluate/seed_noise.py writes). Seeds that were
measured are those of a sweep, or of runs in the same folders. Left out: before and after of one
run, whose seed is a part of the result.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.json_io import dump_json, read_json
from tunesmith.core.run_dir import RECORD_FILE, is_staged, read_run_plan, read_run_record
from tunesmith.core.types import Comparison, RunRecord
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.statistics import Z, compute_detectable_difference, compute_t_quantile
from tunesmith.plan.resolved import identify_run

NOISE_FILE = Path(__file__).with_name("seed_noise.json")
MAX_RUNS = 60  # of a folder, that are read for their seeds


@dataclass(frozen=True)
class SeedSpread:
    """The standard deviation of a metric between seeds, pooled over recipes."""

    sd: float
    degrees: int  # seeds less recipes


def compute_spread(families: Iterable[Sequence[float]]) -> SeedSpread | None:
    """Return the spread of values by seed within recipes; None without two seeds of one."""
    repeated = [np.array(values) for values in families if len(values) > 1]
    degrees = sum(len(values) - 1 for values in repeated)
    if not degrees:
        return None
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in repeated)
    return SeedSpread(math.sqrt(squares / degrees), degrees)


def choose_kind(comparison: Comparison) -> str:
    """Return the kind of a metric in the table; all but grades are relative to their value."""
    if comparison.metric == "kl":
        return "kl"
    if comparison.task == GENERAL_TASK and comparison.metric == BITS_PER_BYTE:
        return "general text"
    values = (comparison.before, comparison.after)
    is_share = all(score.low >= 0 and score.high <= 1 for score in values)
    is_grade = comparison.improved is not None or (is_share and comparison.higher_is_better)
    return "grade" if is_grade else "loss"


def add_seed_noise(
    comparison: Comparison, spread: SeedSpread | None, seeds: tuple[int, int] = (1, 1)
) -> Comparison:
    """Return the comparison with the interval that holds for other seeds, too.

    seeds: how many each side is the mean of. The variances of items, or groups, and of seeds have
    their own quantiles of t (Cochran and Cox 1950): with the degrees of Welch and Satterthwaite, 7%
    of equal recipes of two seeds each are called different."""
    if spread is None:
        kind = choose_kind(comparison)
        usual = read_json(NOISE_FILE)["kinds"][kind]["sd"]
        level = (abs(comparison.before.value) + abs(comparison.after.value)) / 2
        sd = usual * (1.0 if kind == "grade" else level)
    else:
        sd = spread.sd * math.sqrt(1 / seeds[0] + 1 / seeds[1])
    ends = (-1.0, 1.0) if choose_kind(comparison) == "grade" else (-math.inf, math.inf)
    half = sd * (Z if spread is None else compute_t_quantile(spread.degrees))
    low = comparison.difference - math.hypot(comparison.difference - comparison.low, half)
    high = comparison.difference + math.hypot(comparison.high - comparison.difference, half)
    return replace(
        comparison,
        seed_low=max(ends[0], low),
        seed_high=min(ends[1], high),
        seed_degrees=None if spread is None else spread.degrees,
        min_detectable=compute_detectable_difference(low, high),
    )


def read_spreads(runs: Sequence[Path]) -> dict[tuple[str, str], SeedSpread]:
    """Return (task, metric) -> spread between seeds, from the finished runs beside these and from
    the sweeps there: runs on the same model and rows whose recipes differ in the seed alone."""
    first = read_run_plan(runs[0])
    values: defaultdict[tuple[str, str], defaultdict[bytes, dict[object, float]]]
    values = defaultdict(lambda: defaultdict(dict))
    for record in _iter_records({run.resolve().parent for run in runs}):
        plan = record.plan
        files = {role: report.fingerprint for role, report in plan.data.items()}
        is_alike = plan.model.name == first.model.name and "data" in first.data
        if is_alike and files.get("data") == first.data["data"].fingerprint:
            family = dump_json(sorted(identify_run(plan, "seed").items()))
            scores = [comparison.after for comparison in record.comparisons]
            for score in (*scores, *record.kl_scores):
                values[score.task, score.metric][family][plan.recipe.get("seed", 0)] = score.value
    spreads: dict[tuple[str, str], SeedSpread] = {}
    for metric, families in values.items():
        if spread := compute_spread([list(by_seed.values()) for by_seed in families.values()]):
            spreads[metric] = spread
    return spreads


def _iter_records(folders: Iterable[Path]) -> Iterable[RunRecord]:
    for folder in sorted(folders):
        for pattern in ("*", "*/trial-*"):
            for file in sorted(folder.glob(f"{pattern}/{RECORD_FILE}"))[:MAX_RUNS]:
                if is_staged(file.parent):
                    continue
                try:
                    yield read_run_record(file.parent)
                except InputError:  # damaged, or of another format
                    continue
