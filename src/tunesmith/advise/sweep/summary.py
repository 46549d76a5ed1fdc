"""From finished trials to a SweepRecord: the winner, what differs from it, and its test.

The winner is the configuration with the best mean on eval_data over the seeds that all have run
with. The others are compared with it item by item, over the seeds that both have, and corrected for
all pairs (Holm): the winner was chosen by the same items. Its own value on eval_data is the best of
several, so it is no result: test_data is, which is read once for a winner. All winners that were
measured on it are counted, since only the first interval is of unseen rows. Left out: running
trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from tunesmith.advise.sweep.records import (
    ConfigurationRecord,
    SweepRecord,
    TrialRecord,
    TrialSpec,
    TrialState,
)
from tunesmith.advise.sweep.trial_process import make_trial_recipe
from tunesmith.advise.sweep.trial_study import STATES, TrialStudy, make_spec
from tunesmith.core.atomic import write_file
from tunesmith.core.errors import GateError
from tunesmith.core.events import TrainStep
from tunesmith.core.formatting import format_count
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.run_dir import (
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    is_run,
    read_all_events,
    read_run_plan,
    read_run_record,
)
from tunesmith.core.sealed_json import read_sealed_as
from tunesmith.core.types import Comparison, Plan
from tunesmith.data.dataset import Dataset
from tunesmith.evaluate.items import build_eval_items
from tunesmith.evaluate.measure import measure_items
from tunesmith.evaluate.results import (
    EvalResults,
    MetricValues,
    average_measurements,
    compare_measurements,
    compare_results,
    compute_score,
)
from tunesmith.evaluate.run_verdict import describe_cost, get_general
from tunesmith.evaluate.seed_noise import SeedSpread, add_seed_noise, compute_spread
from tunesmith.evaluate.statistics import (
    MIN_ITEMS,
    SEEDS_UNKNOWN,
    TOO_FEW_ITEMS,
    adjust_p_values,
    compute_p_value,
    compute_t_quantile,
    count_pairs,
    judge_comparisons,
)
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.machine_errors import machine_errors
from tunesmith.recipe.load import dump_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.recipe.sweep import SweepConfig, ValueRange
from tunesmith.session.inputs import RunInputs, load_starting_adapter
from tunesmith.session.reopen import load_plan_and_inputs, load_trained_model
from tunesmith.session.session import load_starting_model, open_eval_session
from tunesmith.train.signals import GracefulStop

TEST_FILE = "test.json"
WINNER_FILE = "winner.yaml"  # the recipe with the winner's values
MAX_NAMED = 3  # configurations that a note names
STATE_NAMES: dict[optuna.trial.TrialState, TrialState] = {
    STATES["complete"]: "complete",
    STATES["pruned"]: "pruned",
    STATES["failed"]: "failed",
}


def summarize(
    study: TrialStudy,
    metric: str,
    tasks: Sequence[str],
    inputs: RunInputs,
    folder: Path,
    *,
    allow_code: bool = False,
) -> SweepRecord:
    """Select the winner, measure it on test_data, and write its recipe. Raises GateError if every
    trial failed."""
    trials = tuple(build_trial(folder, trial) for trial in study.list_trials())
    measured = MeasuredTrials.read(folder, trials, metric, tasks)
    configurations, winner = build_configurations(measured)
    if winner is None and trials and all(trial.state == "failed" for trial in trials):
        raise GateError(f"every trial failed; the first: {trials[0].reason}", where=str(folder))
    record = SweepRecord(
        model=inputs.model.name,
        metric=metric,
        higher_is_better=study.higher_is_better,
        search=study.sweep.search,
        pruner=study.sweep.pruner,
        seeds=study.seeds,
        planned_configurations=study.num_configurations,
        rows=len(next(iter(measured.values.values())).ids) if measured.values else 0,
        base_value=read_base_value(folder, metric, tasks),
        trials=trials,
        configurations=tuple(configurations),
        winner=winner,
        winner_trial=None,
        test=(),
        test_reads=0,
        caveats=(),
        folder=str(folder),
    )
    if winner is not None:
        number = choose_trial(measured, winner)
        test_rows = inputs.datasets["test_data"]
        test, reads = measure_winner(folder, trials[number], test_rows, allow_code=allow_code)
        write_winner(folder, inputs.recipe, trials[number])
        record = replace(record, winner_trial=number, test=test, test_reads=reads)
    caveats = (*list_caveats(record, study.sweep), *list_forgetting(record))
    return replace(record, caveats=caveats)


# ---------------------------------------------------------------- trials


def build_trial(folder: Path, trial: FrozenTrial) -> TrialRecord:
    """Return a trial with what its folder says about it."""
    spec = make_spec(trial)
    path = folder / spec.name
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
            file = folder / trial.folder / EVAL_AFTER_FILE
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
    spread = compute_spread([each.seed_values for each in records.values()])
    compare = partial(compare_configurations, measured, spread, winner)
    comparisons = [compare(each.number) for each in others]
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
            p_value=None if verdict in (TOO_FEW_ITEMS, SEEDS_UNKNOWN) else p_value,
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


def compare_configurations(
    measured: MeasuredTrials, spread: SeedSpread | None, first: int, second: int
) -> Comparison:
    """Return `second` minus `first`, paired by item, over the seeds that both have; with what the
    seeds of the sweep add to its variance, or else seeds usually."""
    first_seeds = measured.list_seeds(first)
    second_seeds = measured.list_seeds(second)
    shared = [seed for seed in first_seeds if seed in second_seeds]
    comparison = compare_measurements(
        measured.average([first_seeds[seed] for seed in shared]),
        measured.average([second_seeds[seed] for seed in shared]),
    )
    return add_seed_noise(comparison, spread, (len(shared), len(shared)))


# ---------------------------------------------------------------- the winner on test_data


@dataclass(frozen=True)
class WinnerTest:
    """The winner's trial and its results on test_data."""

    trial: int
    comparisons: tuple[Comparison, ...]


def measure_winner(
    folder: Path, trial: TrialRecord, test_rows: Dataset, *, allow_code: bool = False
) -> tuple[tuple[Comparison, ...], int]:
    """Return before and after on test_data, and how many winners were measured on it by now."""
    file = folder / TEST_FILE
    measured: list[WinnerTest] = []
    if file.exists():
        measured = list(parse_as(tuple[WinnerTest, ...], read_json(file), where=str(file)))
    for measurement in measured:
        if measurement.trial == trial.number:
            return measurement.comparisons, len(measured)
    with GracefulStop("continue with the same command") as stop, stop.immediate():
        comparisons = _measure_test(folder / trial.folder, test_rows, allow_code=allow_code)
    measured.append(WinnerTest(trial.number, comparisons))
    write_file(file, dump_json(tuple(measured)))
    return comparisons, len(measured)


def _measure_test(path: Path, test_rows: Dataset, *, allow_code: bool) -> tuple[Comparison, ...]:
    plan, run_inputs = load_plan_and_inputs(path)
    datasets = {**run_inputs.datasets, "test_data": test_rows}
    eval_inputs = replace(run_inputs, datasets=datasets)
    items = build_eval_items(plan, eval_inputs, allow_code=allow_code)

    def measure(model: PackedCausalLM, step: int) -> EvalResults:
        return measure_items(open_eval_session(plan, eval_inputs, model), items, step=step)

    with machine_errors():
        adapter = load_starting_adapter(plan, run_inputs.model.path)
        start = replace(run_inputs, adapter=adapter)
        before = measure(load_starting_model(plan, start), 0)
        after = measure(load_trained_model(path, plan, run_inputs), plan.steps)
    return compare_results(before, after, step=plan.steps)


def write_winner(folder: Path, recipe: Recipe, trial: TrialRecord) -> None:
    """Write the recipe with the winner's values and seed, without its sweep."""
    spec = TrialSpec(trial.number, trial.configuration, trial.seed, trial.settings)
    winner = make_trial_recipe(recipe, spec, output_dir="auto")
    head = f"# The winner of the sweep in {folder.name}, trained as {trial.folder}.\n"
    write_file(folder / WINNER_FILE, (head + dump_recipe(winner)).encode())


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
        selection = f"the winner was selected among {compared} on eval_data"
        yield f"{selection}: its {record.metric} there is optimistic; that on test_data is not"
    if record.test_reads > 1:
        yield f"test_data was read for {record.test_reads} winners, so it is no longer unseen"


def _list_limits(record: SweepRecord, winner: ConfigurationRecord) -> Iterator[str]:
    """Yield what the rows and the seeds are too few to show."""
    if record.rows < MIN_ITEMS:
        rows = f"{record.rows} rows of eval_data"
        yield f"{rows} are too few to compare configurations: use at least {MIN_ITEMS}"
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
    spread = compute_spread([each.seed_values for each in record.configurations])
    if spread is None:
        yield "one seed: no difference is shown by it alone; set seeds: 3"
        return
    values = ", ".join(f"{value:.3f}" for value in winner.seed_values)
    chance = f"{compute_t_quantile(spread.degrees) * spread.sd * math.sqrt(2):.2g} by chance"
    yield f"{record.metric} of the winner by seed: {values}; two runs differ by {chance}"


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
    run_record = read_run_record(Path(record.folder) / record.trials[trial].folder)
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


def read_eval_values(file: Path, metric: str, tasks: Sequence[str]) -> MetricValues | None:
    """Return the values of a metric on eval_data, item by item, from a file of results."""
    results = read_sealed_as(EvalResults, file)
    for measurement in results.measurements:
        if measurement.metric == metric and measurement.task in tasks:
            return measurement
    return None
