"""How often the 95% intervals hold the true difference: simulated samples of many sizes.

    python -m benchmarks.evaluate.coverage [--trials 4000] [--write docs/results/coverage.md]

Items are drawn from distributions with a known mean, and an interval is made of each sample.
`width` is that of the intervals, relative to Student's t. `by token` are means over all tokens of
texts whose lengths are lognormal; `3 tasks` have as many items each. Then items in groups:
coverage, and the share of false verdicts; and pairs of trained models that differ in the seed
(seed_noise.py)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from benchmarks.evaluate import seed_noise

from tunesmith.core.types import Comparison
from tunesmith.evaluate.results import MetricValues, compare_measurements
from tunesmith.evaluate.statistics import (
    MIN_ITEMS,
    compute_mean_interval,
    compute_padded_interval,
    compute_t_quantile,
    compute_wilson_interval,
    judge_comparison,
)

SIZES = (2, 3, 4, 5, 6, 8, 10, 20, 50, 100, 200, 500)
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
DRAWS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda r, size: r.normal(size=size), 0.0),
    "t, 3 degrees": (lambda r, size: r.standard_t(3, size), 0.0),
    "uniform": (lambda r, size: r.random(size), 0.5),
    "gamma, skewness 1.4": (lambda r, size: r.gamma(2.0, size=size), 2.0),
    "exponential, 2": (lambda r, size: r.exponential(size=size), 1.0),
    "gamma, 2.8": (lambda r, size: r.gamma(0.5, size=size), 0.5),
    "lognormal, 1.75": (lambda r, size: r.lognormal(0, 0.5, size), math.exp(0.125)),
    "lognormal, 6.2": (lambda r, size: r.lognormal(0, 1, size), math.exp(0.5)),
}
PAIRS = {  # shares of gained and lost items
    "gained 20%, lost 20%": (0.2, 0.2),
    "gained 30%, lost 10%": (0.3, 0.1),
    "gained 45%, lost 45%": (0.45, 0.45),
    "gained 50%, lost 50%": (0.5, 0.5),
    "gained 10%, lost 0%": (0.1, 0.0),
}
WIDTHS = ("normal", "exponential, 2", "lognormal, 6.2")
LENGTH_SPREAD = (
    0.8  # of the logarithm of the tokens; the longest of 100 texts has 6 times the median
)
# loss per token of a text, as a function of its relative length, and the power that it falls with
LOSSES: dict[str, tuple[Callable[[np.random.Generator, np.ndarray], np.ndarray], float]] = {
    "by token, normal": (lambda r, length: 1 + r.normal(size=length.shape), 0.0),
    "by token, exponential": (lambda r, length: r.exponential(size=length.shape), 0.0),
    "by token, long texts vary less": (
        lambda r, length: 1 + r.normal(size=length.shape) / np.sqrt(length),
        0.0,
    ),
    "by token, long texts have less": (
        lambda r, length: r.gamma(2.0, 0.5, length.shape) * length**-0.3,
        0.3,
    ),
}
TASK_SPREADS = (1.0, 2.0, 4.0)
TASKS = {"3 tasks, normal": "normal", "3 tasks, exponential": "exponential, 2"}
RATES = {"rate 10%": 0.1, "rate 50%": 0.5, "rate 80%": 0.8}


def measure_values(name: str, n: int, trials: int) -> float:
    draw, truth = DRAWS[name]
    hits = 0
    for values in draw(np.random.default_rng(n), (trials, n)):
        low, high = compute_mean_interval(values, np.ones(n), [np.arange(n)])
        hits += low <= truth <= high
    return hits / trials


def measure_width(name: str, n: int, trials: int) -> float:
    """Return the median width of the intervals, relative to those of Student's t."""
    draw, _ = DRAWS[name]
    ratios: list[float] = []
    for values in draw(np.random.default_rng(n), (trials // 4, n)):
        low, high = compute_mean_interval(values, np.ones(n), [np.arange(n)])
        error = float(values.std(ddof=1)) / math.sqrt(n)
        ratios.append((high - low) / (2 * compute_t_quantile(n - 1) * error))
    return float(np.median(ratios))


def measure_losses(name: str, n: int, trials: int) -> float:
    """Return the coverage of the mean over tokens: the texts are sampled, their lengths too."""
    draw, power = LOSSES[name]
    random = np.random.default_rng(n)
    # E[length ** (1 - power)] / E[length]
    truth = math.exp(((1 - power) ** 2 - 1) * LENGTH_SPREAD**2 / 2)
    hits = 0
    for length in random.lognormal(0, LENGTH_SPREAD, (trials, n)):
        low, high = compute_mean_interval(draw(random, length), length, [np.arange(n)])
        hits += low <= truth <= high
    return hits / trials


def measure_tasks(name: str, n: int, trials: int) -> float:
    """Return the coverage of the mean over tasks with n items each and different spreads."""
    draw, mean = DRAWS[TASKS[name]]
    count = len(TASK_SPREADS)
    truth = mean * sum(TASK_SPREADS) / count
    groups = np.split(np.arange(count * n), count)
    hits = 0
    for values in draw(np.random.default_rng(n), (trials, count * n)):
        scaled = values * np.repeat(TASK_SPREADS, n)
        low, high = compute_mean_interval(scaled, np.ones(count * n), groups)
        hits += low <= truth <= high
    return hits / trials


def measure_pairs(name: str, n: int, trials: int) -> float:
    gained, lost = PAIRS[name]
    shares = [gained, lost, max(0.0, 1 - gained - lost)]
    hits = 0
    for counts in np.random.default_rng(n).multinomial(n, shares, trials):
        changes = np.repeat([1.0, -1.0, 0.0], counts)
        low, high = compute_padded_interval(changes, np.ones(n), [np.arange(n)], (-1.0, 1.0))
        hits += low - 1e-9 <= gained - lost <= high + 1e-9
    return hits / trials


def measure_rates(name: str, n: int, trials: int) -> float:
    hits = 0
    for successes in np.random.default_rng(n).binomial(n, RATES[name], trials).tolist():
        low, high = compute_wilson_interval(successes, n)
        hits += low <= RATES[name] <= high
    return hits / trials


@dataclass(frozen=True)
class Design:
    """How many items, in groups of how many (0: of 1 to 8), with which correlation in a group."""

    n: int
    group_size: int
    correlation: float

    def draw_groups(self, random: np.random.Generator) -> np.ndarray:
        """Return the group of each item."""
        size = self.group_size
        lengths = random.integers(1, 9, self.n) if size == 0 else np.full(self.n, size)
        return np.repeat(np.arange(self.n), lengths)[: self.n]


def draw_changes(kind: str, random: np.random.Generator, count: int, is_null: bool) -> np.ndarray:
    """Return changes of a kind, whose mean is 0 if `is_null`, else that of MEANS."""
    if kind == "skewed":
        return random.gamma(0.5, size=count) - 0.5 * is_null
    share = 0.4 if kind == "binary" else 0.1
    sizes = np.ones(count) if kind == "binary" else random.choice([1 / 3, 2 / 3], count)
    signs = np.where(random.random(count) < (0.5 if is_null else 0.75), 1, -1)
    return (random.random(count) < share) * sizes * signs


MEANS = {"binary": 0.2, "sparse": 0.025, "skewed": 0.5}
GROUP_SIZES = (1, 2, 4, 8, 0)
CORRELATIONS = (0.0, 0.3, 0.75)
GROUPED_ITEMS = (20, 50, 100, 200, 500)


def compare_grouped(
    kind: str, design: Design, random: np.random.Generator, *, is_null: bool
) -> Comparison:
    """Compare drawn values in which an item has its group's change with the root of the
    correlation as probability."""
    group_N = design.draw_groups(random)
    shared = draw_changes(kind, random, design.n, is_null)[group_N]
    alone = draw_changes(kind, random, design.n, is_null)
    change = np.where(random.random(design.n) < math.sqrt(design.correlation), shared, alone)
    start = np.full(design.n, 7.0) if kind == "skewed" else (change < 0).astype(float)
    ids = tuple(map(str, range(design.n)))
    groups = tuple(map(str, group_N.tolist()))
    before, after = (
        MetricValues("test", "m", ids, tuple(each.tolist()), groups=groups)
        for each in (start, start + change)
    )
    return compare_measurements(before, after)


def measure_design(kind: str, design: Design, trials: int) -> tuple[float, float]:
    """Return the coverage of a difference, and the share of verdicts where there is none."""
    random = np.random.default_rng([design.n, design.group_size, int(100 * design.correlation)])
    hits = verdicts = 0
    for _ in range(trials):
        comparison = compare_grouped(kind, design, random, is_null=False)
        hits += comparison.low - 1e-9 <= MEANS[kind] <= comparison.high + 1e-9
        null = compare_grouped(kind, design, random, is_null=True)
        verdicts += judge_comparison(null) in ("better", "worse")
    return hits / trials, verdicts / trials


def list_designs() -> list[Design]:
    """Return the designs with enough groups for a verdict; items alone have no correlation."""
    designs: list[Design] = []
    for n in GROUPED_ITEMS:
        for size in GROUP_SIZES:
            for correlation in CORRELATIONS if size != 1 else (0.0,):
                if n / (size or 4.5) >= MIN_ITEMS:
                    designs.append(Design(n, size, correlation))
    return designs


def measure_all(trials: int) -> dict[tuple[str, Design], tuple[float, float]]:
    keys = [(kind, design) for kind in MEANS for design in list_designs()]
    arguments = [(kind, design, trials) for kind, design in keys]
    with Pool() as pool:
        return dict(zip(keys, pool.starmap(measure_design, arguments, chunksize=1), strict=True))


def build_group_table(trials: int) -> str:
    """Return coverage and false verdicts, a row for each kind, group size and correlation."""
    measured = measure_all(trials)
    rows = [["changes", "groups of", "correlation", *map(str, GROUPED_ITEMS)]]
    rows.append(["---"] * len(rows[0]))
    for kind in MEANS:
        for size in GROUP_SIZES:
            for correlation in CORRELATIONS if size != 1 else (0.0,):
                cells: list[str] = []
                for n in GROUPED_ITEMS:
                    result = measured.get((kind, Design(n, size, correlation)))
                    cells.append("-" if result is None else f"{result[0]:.1%}, {result[1]:.1%}")
                rows.append([kind, str(size or "1 to 8"), f"{correlation:g}", *cells])
    coverage = np.array([result[0] for result in measured.values()])
    verdicts = np.array([result[1] for result in measured.values()])
    shares = ((coverage < 0.93).mean(), (coverage > 0.975).mean(), (verdicts > 0.06).mean())
    worst = (coverage.min(), coverage.max(), verdicts.max())
    totals = ", ".join(f"{share:.0%} ({end:.1%})" for share, end in zip(shares, worst, strict=True))
    rows.append([f"cells below 93%, above 97.5%, over 6% (the most): {totals}", *[""] * 7])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def build_table(trials: int) -> str:
    head = ["items", *map(str, SIZES)]
    rows = [head, ["---"] * len(head)]
    measures = (
        (DRAWS, measure_values, trials),
        (LOSSES, measure_losses, trials // 2),
        (TASKS, measure_tasks, trials // 2),
        (PAIRS, measure_pairs, trials),
        (RATES, measure_rates, trials),
    )
    for names, measure, count in measures:
        for name in names:
            rows.append([name, *(f"{measure(name, n, count):.1%}" for n in SIZES)])
    for name in WIDTHS:
        ratios = [measure_width(name, n, trials) for n in SIZES]
        rows.append([f"width: {name}", *(f"x{ratio:.2f}" for ratio in ratios)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def replace_table(page: str, table: str) -> str:
    """Return the page with the table replaced that has the same first column."""
    head = table[: table.index("|", 1) + 1]
    before, rule, rest = page.partition(head)
    _, end, after = rest.partition("|\n\n")
    assert rule, f"the page has no table {head}"
    assert end, f"the table {head} does not end"
    return f"{before}{table}\n{after}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=4000, help="of each cell; of groups a tenth")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    seeds = "".join(f"| {' | '.join(row)} |\n" for row in seed_noise.build_table())
    tables = [build_table(options.trials), build_group_table(options.trials // 10), seeds]
    print(*tables, sep="\n")
    if options.write:
        page = options.write.read_text()
        for table in tables:
            page = replace_table(page, table)
        options.write.write_text(page)


if __name__ == "__main__":
    main()
