"""From finished trials to a SweepRecord: the winner, what differs from it, and what mattered.

The winner is the configuration with the best mean on eval_data over the seeds that all have run
with. The others are compared with it item by item, over the seeds that both have, and corrected for
all pairs (Holm): the winner was chosen by the same items. Its own value on eval_data is the best of
several, so it is no result: test_data is (winner.py). Left out: running trials.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from tunesmith.advise.data_ablation import average_measurements
from tunesmith.advise.sweep.run_trial import find_trial_folder, read_eval_values
from tunesmith.advise.sweep.trial_study import STATES, make_spec
from tunesmith.core.events import TrainStep
from tunesmith.core.formatting import format_count, format_value
from tunesmith.core.run_dir import (
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    is_run,
    read_all_events,
    read_run_plan,
    read_run_record,
)
from tunesmith.core.sweep_record import (
    ConfigurationRecord,
    LevelEffect,
    SweepRecord,
    TrialRecord,
    TrialState,
)
from tunesmith.core.types import Comparison, Json, Plan
from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score
from tunesmith.evaluate.run_verdict import describe_cost, get_general
from tunesmith.evaluate.statistics import (
    ALPHA,
    MIN_ITEMS,
    NO_DIFFERENCE,
    TOO_FEW_ITEMS,
    Z,
    adjust_p_values,
    compute_p_value,
    count_pairs,
    judge_comparisons,
)
from tunesmith.recipe.sweep import SweepConfig, ValueRange

MIN_CORRELATED = 8  # configurations
MAX_CORRELATION = 1 - 1e-12  # Fisher's z of 1 is infinite
MAX_NAMED = 3  # configurations that a note names
STATE_NAMES: dict[optuna.trial.TrialState, TrialState] = {
    STATES["complete"]: "complete",
    STATES["pruned"]: "pruned",
    STATES["failed"]: "failed",
}


def build_trial(folder: Path, trial: FrozenTrial) -> TrialRecord:
    """Return a trial with what its folder says about it."""
    spec = make_spec(trial)
    path = find_trial_folder(folder, trial.number)
    steps = planned_steps = 0
    seconds = 0.0
    if is_run(path):
        planned_steps = read_run_plan(path).steps
        logged = read_all_events(path)
        trained = [each.event.step for each in logged if isinstance(each.event, TrainStep)]
        steps = max(trained, default=0)
        seconds = _sum_seconds([(each.attempt, each.time) for each in logged])
    return TrialRecord(
        number=trial.number,
        configuration=spec.configuration,
        seed=spec.seed,
        settings=spec.settings,
        state=STATE_NAMES.get(trial.state, "unfinished"),
        folder=path.name,
        value=trial.value if trial.state == STATES["complete"] else None,
        curve=tuple(sorted(trial.intermediate_values.items())),
        steps=steps,
        planned_steps=planned_steps,
        seconds=seconds,
        reason=trial.user_attrs.get("reason", ""),
    )


def _sum_seconds(times: Sequence[tuple[int, float]]) -> float:
    """Return the time from the first event of each attempt to its last."""
    by_attempt: dict[int, list[float]] = {}
    for attempt, time in times:
        by_attempt.setdefault(attempt, []).append(time)
    return sum(max(moments) - min(moments) for moments in by_attempt.values())


@dataclass(frozen=True)
class MeasuredTrials:
    """The complete trials of a sweep and their values on eval_data, item by item, by number."""

    trials: tuple[TrialRecord, ...]
    values: dict[int, MetricValues]

    @classmethod
    def read(
        cls, folder: Path, trials: Sequence[TrialRecord], metric: str, tasks: Sequence[str]
    ) -> MeasuredTrials:
        values: dict[int, MetricValues] = {}
        for trial in trials:
            file = find_trial_folder(folder, trial.number) / EVAL_AFTER_FILE
            if trial.state == "complete" and (measured := read_eval_values(file, metric, tasks)):
                values[trial.number] = measured
        return cls(tuple(trials), values)

    def list_seeds(self, configuration: int) -> dict[int, int]:
        """Return seed -> number of each complete trial of a configuration."""
        return {
            trial.seed: trial.number
            for trial in self.trials
            if trial.configuration == configuration and trial.number in self.values
        }

    def list_run_seeds(self, configuration: int) -> set[int]:
        """Return the seeds whose trial has ended, in failure too."""
        return {
            trial.seed
            for trial in self.trials
            if trial.configuration == configuration and trial.state != "unfinished"
        }

    def average(self, numbers: Sequence[int]) -> MetricValues:
        return average_measurements([self.values[number] for number in numbers])


# ---------------------------------------------------------------- configurations


def build_configurations(measured: MeasuredTrials) -> tuple[list[ConfigurationRecord], int | None]:
    """Return every configuration that was tried, and the number of the winner."""
    settings = {trial.configuration: trial.settings for trial in measured.trials}
    records: dict[int, ConfigurationRecord] = {}
    for number in sorted(settings):
        seeds = measured.list_seeds(number)
        record = ConfigurationRecord(number, settings[number], tuple(seeds.values()))
        if seeds:
            score = compute_score(measured.average(record.trials))
            by_seed = [compute_score(measured.values[trial]).value for trial in record.trials]
            record = replace(
                record,
                value=score.value,
                low=score.low,
                high=score.high,
                seed_values=tuple(by_seed),
            )
        records[number] = record
    winner = choose_winner(measured)
    if winner is None:
        return list(records.values()), None
    others = [r for r in records.values() if r.trials and r.number != winner]
    comparisons = [compare_configurations(measured, winner, record.number) for record in others]
    num_pairs = count_pairs(len(others) + 1)  # any of them might have been the winner
    p_values = [compute_p_value(comparison) for comparison in comparisons]
    adjusted = adjust_p_values(p_values, num_pairs)
    verdicts = judge_comparisons(comparisons, num_pairs)
    for record, comparison, p_value, verdict in zip(
        others, comparisons, adjusted, verdicts, strict=True
    ):
        records[record.number] = replace(
            record,
            comparison=comparison,
            p_value=None if verdict == TOO_FEW_ITEMS else p_value,
            verdict=verdict,
        )
    return list(records.values()), winner


def choose_winner(measured: MeasuredTrials) -> int | None:
    """Return the configuration with the best mean over the seeds that all have run with.

    Those for which such a seed failed come after the others. None if no trial is complete."""
    candidates = sorted({measured.trials[number].configuration for number in measured.values})
    if not candidates:
        return None
    run_seeds = [measured.list_run_seeds(candidate) for candidate in candidates]
    shared = set.intersection(*run_seeds)
    is_better_higher = next(iter(measured.values.values())).higher_is_better

    def get_rank(candidate: int) -> tuple[int, float]:
        seeds = measured.list_seeds(candidate)
        complete = [number for seed, number in seeds.items() if seed in shared]
        value = compute_score(measured.average(complete)).value
        return -len(complete), -value if is_better_higher else value

    return min(candidates, key=get_rank)


def choose_trial(measured: MeasuredTrials, configuration: int) -> int:
    """Return the trial of a configuration whose seed is the best on eval_data."""
    numbers = list(measured.list_seeds(configuration).values())
    sign = -1 if measured.values[numbers[0]].higher_is_better else 1
    return min(numbers, key=lambda number: sign * compute_score(measured.values[number]).value)


def compare_configurations(measured: MeasuredTrials, first: int, second: int) -> Comparison:
    """Return `second` minus `first`, paired by item, over the seeds that both have."""
    return _compare_pairs(measured, _pair_seeds(measured, first, second))


# ---------------------------------------------------------------- what mattered


def list_effects(
    sweep: SweepConfig, measured: MeasuredTrials, winner: int
) -> Iterator[LevelEffect]:
    """Yield the effect of each listed value against the winner's value of its key, corrected for
    all pairs of values (Holm), the values whose trials all stopped early, and the correlation of
    each range."""
    settings = {
        trial.configuration: trial.settings
        for trial in measured.trials
        if trial.number in measured.values
    }
    levels: list[tuple[str, Any, int]] = []  # key, value, pairs
    comparisons: list[Comparison] = []
    stopped: list[LevelEffect] = []
    for key, values in sweep.space.items():
        best = settings[winner][key]
        for level in () if isinstance(values, ValueRange) else values:
            if level == best:
                continue
            if pairs := _list_pairs(key, level, best, settings, measured):
                levels.append((key, level, len(pairs)))
                comparisons.append(_compare_pairs(measured, pairs))
            elif num_stopped := _count_stopped(key, level, measured):
                verdict = f"not compared: {num_stopped} stopped early"
                words = (key, format_value(level), format_value(best))
                stopped.append(LevelEffect(*words, 0, None, None, None, verdict))
    counts = Counter(key for key, _, _ in levels)
    num_pairs = sum(count_pairs(count + 1) for count in counts.values())
    verdicts = judge_comparisons(comparisons, num_pairs)
    for (key, level, count), change, verdict in zip(levels, comparisons, verdicts, strict=True):
        best = format_value(settings[winner][key])
        interval = (change.difference, change.low, change.high)
        yield LevelEffect(key, format_value(level), best, count, *interval, verdict)
    yield from stopped
    ranges = [key for key, values in sweep.space.items() if isinstance(values, ValueRange)]
    yield from _list_correlations(ranges, measured)


def _count_stopped(key: str, level: Any, measured: MeasuredTrials) -> str:
    """Return how many of the trials with a value stopped early, "" if none did, or if one reached
    its end."""
    states = [trial.state for trial in measured.trials if trial.settings[key] == level]
    count = 0 if "complete" in states else states.count("pruned")
    return f"{count} of {format_count(len(states), 'trial')}" if count else ""


def _list_pairs(
    key: str, level: Any, best: Any, settings: Mapping[int, Json], measured: MeasuredTrials
) -> list[tuple[int, int]]:
    """Return the pairs of trials that differ in the key alone: the best value, and this one."""
    pairs: list[tuple[int, int]] = []
    for first, first_settings in settings.items():
        for second, second_settings in settings.items():
            is_pair = first_settings[key] == best and second_settings == {
                **first_settings,
                key: level,
            }
            if is_pair:
                pairs += _pair_seeds(measured, first, second)
    return pairs


def _compare_pairs(measured: MeasuredTrials, pairs: Sequence[tuple[int, int]]) -> Comparison:
    return compare_measurements(
        measured.average([first for first, _ in pairs]),
        measured.average([second for _, second in pairs]),
    )


def _pair_seeds(measured: MeasuredTrials, first: int, second: int) -> list[tuple[int, int]]:
    first_seeds = measured.list_seeds(first)
    second_seeds = measured.list_seeds(second)
    return [(first_seeds[seed], second_seeds[seed]) for seed in first_seeds if seed in second_seeds]


def _list_correlations(keys: Sequence[str], measured: MeasuredTrials) -> Iterator[LevelEffect]:
    """Yield the rank correlation (Spearman) of each key's value with the metric over the complete
    configurations, corrected together (Holm)."""
    settings: dict[int, Json] = {}
    values: dict[int, list[float]] = {}  # one list a configuration: seeds are no further evidence
    for trial in measured.trials:
        if trial.value is not None:
            settings[trial.configuration] = trial.settings
            values.setdefault(trial.configuration, []).append(trial.value)
    means = {configuration: fmean(by_seed) for configuration, by_seed in values.items()}
    count = len(means)
    results: dict[str, tuple[float, float, float, float]] = {}
    for key in keys:
        pairs = [(settings[number][key], mean) for number, mean in means.items()]
        results[key] = _compute_correlation(np.array(pairs, dtype=float))
    adjusted = adjust_p_values([p_value for *_, p_value in results.values()])
    for (key, (correlation, low, high, _)), p_value in zip(results.items(), adjusted, strict=True):
        verdict = "correlated" if p_value < ALPHA else NO_DIFFERENCE
        verdict = TOO_FEW_ITEMS if count < MIN_CORRELATED else verdict
        yield LevelEffect(key, "", "", count, correlation, low, high, verdict)


def _compute_correlation(pairs_N2: np.ndarray) -> tuple[float, float, float, float]:
    """Return Spearman's correlation, its 95% interval and p by Fisher's z, with the variance of
    Bonett and Wright (2000); (0, -1, 1, 1) for too few pairs and where one value never changes."""
    count = len(pairs_N2)
    correlation = _compute_spearman(pairs_N2) if count >= MIN_CORRELATED else math.nan
    if math.isnan(correlation):
        return 0.0, -1.0, 1.0, 1.0
    z = math.atanh(max(-MAX_CORRELATION, min(MAX_CORRELATION, correlation)))
    error = math.sqrt((1 + correlation**2 / 2) / (count - 3))
    low, high = (math.tanh(z + sign * Z * error) for sign in (-1, 1))
    return correlation, low, high, math.erfc(abs(z) / error / math.sqrt(2))


def _compute_spearman(pairs_N2: np.ndarray) -> float:
    """Return the correlation of ranks, NaN where one of both is constant."""
    ranks = [_rank(pairs_N2[:, 0]), _rank(pairs_N2[:, 1])]
    deviations = [values - values.mean() for values in ranks]
    spread = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float(deviations[0] @ deviations[1]) / spread if spread else float("nan")


def _rank(values_N: np.ndarray) -> np.ndarray:
    """Return ranks, tied values with the mean of theirs."""
    smaller_N = (values_N[:, None] > values_N[None, :]).sum(axis=1)
    equal_N = (values_N[:, None] == values_N[None, :]).sum(axis=1)
    return smaller_N + (equal_N - 1) / 2


# ---------------------------------------------------------------- caveats


def list_caveats(record: SweepRecord, sweep: SweepConfig) -> Iterator[str]:
    """Yield what a reader must know before using the result."""
    tried = len(record.configurations)
    if tried < record.planned_configurations:
        planned = format_count(record.planned_configurations, "configuration")
        yield f"{tried} of {planned} tried"
    if failed := record.count_trials("failed"):
        yield f"{format_count(failed, 'trial')} failed: see the reasons"
    if pruned := record.count_trials("pruned"):
        trials = format_count(pruned, "trial")
        yield f"{trials} stopped early: whether one of them would have won was not measured"
    if record.winner is None:
        yield "no trial reached its end, so nothing was selected"
        return
    winner = record.configurations[record.winner]
    yield from _list_limits(record, winner)
    yield from _list_edges(sweep, winner)
    compared = sum(bool(each.trials) for each in record.configurations)
    if compared > 1:
        yield (
            f"the winner was selected among {compared} on eval_data, so its {record.metric} there "
            "is optimistic; that on test_data is not"
        )
    if record.test_reads > 1:
        yield (
            f"test_data was read for {record.test_reads} winners of this sweep, so it is no longer "
            "unseen"
        )


def _list_limits(record: SweepRecord, winner: ConfigurationRecord) -> Iterator[str]:
    """Yield what the rows and the seeds are too few to show."""
    if record.rows < MIN_ITEMS:
        rows = format_count(record.rows, "row")
        yield f"{rows} of eval_data are too few to compare configurations: use at least {MIN_ITEMS}"
    similar = [each for each in record.configurations if is_similar(each)]
    if similar:
        names = ", ".join(str(each.number) for each in similar)
        yield f"not shown to be worse than the winner: configuration {names}"
    ended = {
        (each.configuration, each.seed) for each in record.trials if each.state != "unfinished"
    }
    complete = [each.number for each in record.configurations if each.trials]
    if any((number, seed) not in ended for number in complete for seed in record.seeds):
        yield "not all ran with every seed: the winner is the best over the seeds that all have"
    if len(winner.trials) == 1:
        yield "one seed: the intervals do not cover seed-to-seed variation"
    else:
        values = ", ".join(f"{value:.3f}" for value in winner.seed_values)
        yield (
            f"{record.metric} of the winner by seed: {values}; the intervals do not cover "
            "seed-to-seed variation"
        )


def is_similar(configuration: ConfigurationRecord) -> bool:
    """Return whether a configuration is not shown to be worse than the winner."""
    return bool(configuration.comparison) and configuration.verdict not in ("worse", TOO_FEW_ITEMS)


def _list_edges(sweep: SweepConfig, winner: ConfigurationRecord) -> Iterator[str]:
    """Yield the keys whose winning value is the lowest or highest of at least three numbers."""
    for key, values in sweep.space.items():
        if isinstance(values, ValueRange) or len(values) < 3:
            continue
        if not all(type(value) in (int, float) for value in values):
            continue
        numbers = sorted(float(value) for value in values)
        value = winner.settings[key]
        if value == numbers[0]:
            yield f"{key}: the lowest value won; a lower one may be better"
        if value == numbers[-1]:
            yield f"{key}: the highest value won; a higher one may be better"


def list_forgetting(record: SweepRecord) -> Iterator[str]:
    """Yield what general text lost by the winner, if that is over the limit of its plan, and which
    configurations stay within it: the metric that selects does not show it."""
    if record.winner_trial is None:
        return
    comparisons, plan = _read_comparisons(record, record.winner_trial)
    if _is_within_limit(comparisons, plan):
        return
    within = [
        f"no. {each.number} ({each.value:.3f})"
        for each in record.list_ranked()
        if each.trials and _is_within_limit(*_read_comparisons(record, each.trials[0]))
    ]
    names = ", ".join(within[:MAX_NAMED]) or "none"
    yield f"winner: {describe_cost(comparisons, plan)}; within the limit: {names}"


def _read_comparisons(record: SweepRecord, trial: int) -> tuple[tuple[Comparison, ...], Plan]:
    run_record = read_run_record(find_trial_folder(Path(record.folder), trial))
    return run_record.comparisons, run_record.plan


def _is_within_limit(comparisons: Sequence[Comparison], plan: Plan) -> bool:
    general = get_general(comparisons)
    return general is None or general.difference <= plan.config.forgetting_margin


def read_base_value(folder: Path, metric: str, tasks: Sequence[str]) -> float | None:
    """Return the metric on eval_data before training."""
    for path in sorted(folder.glob("trial-*")):
        if (path / EVAL_BEFORE_FILE).exists():
            measured = read_eval_values(path / EVAL_BEFORE_FILE, metric, tasks)
            return None if measured is None else compute_score(measured).value
    return None
