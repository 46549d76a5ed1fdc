"""How often the 95% intervals hold the true difference: simulated samples of many sizes.

    python -m benchmarks.evaluate.coverage [--trials 4000] [--write docs/results/coverage.md]

Items are drawn from distributions with a known mean, and an interval is made of each sample. `null`
is the share of samples without a true difference that get a verdict, better or worse; `width` is
that of the intervals, relative to Student's t. `by token` are means over all tokens of texts whose
lengths are lognormal; `3 tasks` have as many items each."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tunesmith.evaluate.results import MetricValues, compare_measurements
from tunesmith.evaluate.statistics import (
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


def count_null_verdicts(is_rate: bool, n: int, trials: int) -> float:
    """Return the share of null cases with a verdict."""
    random = np.random.default_rng(n)
    ids = tuple(map(str, range(n)))
    verdicts = 0
    for _ in range(trials):
        sides = random.integers(2, size=(2, n)) if is_rate else random.normal(size=(2, n))
        before = MetricValues("test", "m", ids, tuple(map(float, sides[0])))
        after = MetricValues("test", "m", ids, tuple(map(float, sides[1])))
        verdicts += judge_comparison(compare_measurements(before, after)) in ("better", "worse")
    return verdicts / trials


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
    for name, is_rate in (("null, normal", False), ("null, right or wrong", True)):
        shares = [count_null_verdicts(is_rate, n, trials // 4) for n in SIZES]
        rows.append([name, *(f"{share:.1%}" for share in shares)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def replace_table(page: str, table: str) -> str:
    """Return the page with its first table replaced."""
    before, rule, rest = page.partition("| items |")
    _, end, after = rest.partition("|\n\n")
    assert rule, "the page has no table of intervals"
    assert end, "its table does not end"
    return f"{before}{table}\n{after}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    table = build_table(options.trials)
    print(table)
    if options.write:
        options.write.write_text(replace_table(options.write.read_text(), table))


if __name__ == "__main__":
    main()
