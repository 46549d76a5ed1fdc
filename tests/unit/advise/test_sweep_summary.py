"""What follows from the trials of a sweep: the winner, verdicts and caveats."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fake_runs
from tunesmith.advise.sweep.records import SweepRecord, TrialRecord, TrialState
from tunesmith.advise.sweep.summary import (
    MeasuredTrials,
    build_configurations,
    list_caveats,
    list_forgetting,
)
from tunesmith.evaluate.results import MetricValues
from tunesmith.recipe.sweep import SweepConfig

RATES = (0.001, 0.002, 0.003)
NUM_NULL_SWEEPS = 60
Trial = tuple[int, int, float | None]  # configuration, seed, loss; None: failed


def measure_trials(
    trials: Sequence[Trial], *, num_rows: int = 12, rates: Sequence[float] = RATES
) -> MeasuredTrials:
    records: list[TrialRecord] = []
    values: dict[int, MetricValues] = {}
    for number, (configuration, seed, loss) in enumerate(trials):
        state: TrialState = "failed" if loss is None else "complete"
        settings = {"learning_rate": rates[configuration]}
        folder = f"trial-{number:03d}"
        records.append(TrialRecord(number, configuration, seed, settings, state, folder, loss))
        if loss is not None:
            items = tuple(
                loss + 0.05 * ((7 * item + configuration) % 5) for item in range(num_rows)
            )
            ids = tuple(map(str, range(num_rows)))
            values[number] = MetricValues("eval", "loss", ids, items, higher_is_better=False)
    return MeasuredTrials(tuple(records), values)


def list_notes(measured: MeasuredTrials, seeds: int, num_rows: int = 12) -> str:
    record = make_record(measured, seeds, num_rows)
    return "\n".join(list_caveats(record, SweepConfig.model_validate({"learning_rate": RATES})))


def make_record(
    measured: MeasuredTrials, seeds: int, num_rows: int = 12, folder: Path = Path()
) -> SweepRecord:
    configurations, winner = build_configurations(measured)
    return SweepRecord(
        model="tiny",
        metric="loss",
        higher_is_better=False,
        search="grid",
        pruner="none",
        seeds=tuple(range(seeds)),
        planned_configurations=len(configurations),
        rows=num_rows,
        base_value=None,
        trials=measured.trials,
        configurations=tuple(configurations),
        winner=winner,
        winner_trial=0,
        test=(),
        test_reads=1,
        caveats=(),
        folder=str(folder),
    )


def test_a_winner_that_forgets_too_much_is_told_with_those_that_do_not(tmp_path: Path) -> None:
    measured = measure_trials([(0, 0, 0.1), (1, 0, 0.3), (2, 0, 0.2)])
    kept = fake_runs.make_comparison(
        "bits_per_byte", 0.9, 0.91, 0.02, task="general text", higher_is_better=False
    )
    for trial, general in zip(measured.trials, (fake_runs.FORGOT, kept, kept), strict=True):
        record = fake_runs.make_record(comparisons=(general,))
        fake_runs.write_run(tmp_path / trial.folder, record=record)
    record = make_record(measured, 1, folder=tmp_path)
    assert list(list_forgetting(record)) == [
        "winner: General text got 11.1% worse (0.900 -> 1.000 bits per byte): 5.0 times the limit "
        "of 0.02; within the limit: no. 2 (0.308), no. 1 (0.400)"
    ]
    assert list(list_forgetting(replace(record, winner_trial=1))) == []
    assert list(list_forgetting(replace(record, winner_trial=None))) == []


def test_more_seeds_alone_do_not_win() -> None:
    """A sweep that stopped after the first configuration's second seed selects by the first."""
    measured = measure_trials([(0, 0, 2.0), (1, 0, 1.0), (2, 0, 1.5), (0, 1, 2.0)])
    assert build_configurations(measured)[1] == 1
    assert "not all ran with every seed" in list_notes(measured, 2)


def test_a_configuration_that_failed_with_a_seed_comes_after_the_others() -> None:
    trials: list[Trial] = [(0, 0, 2.0), (1, 0, 1.0), (0, 1, 2.2), (1, 1, None)]
    measured = measure_trials(trials)
    assert build_configurations(measured)[1] == 0
    notes = list_notes(measured, 2)
    assert "1 trial failed" in notes
    assert "not all ran" not in notes
    assert "loss of the winner by seed: 2.092, 2.292; two runs differ by 2.5 by chance" in notes


def test_one_seed_of_each_shows_no_difference() -> None:
    """However far apart; with three seeds that hardly differ it is shown."""
    one = measure_trials([(0, 0, 3.0), (1, 0, 1.0)])
    (other, _), _ = build_configurations(one)
    assert (other.verdict, other.p_value) == ("seed noise unknown", None)
    assert "one seed: no difference is shown by it alone" in list_notes(one, 1)
    near = [(c, s, 3.0 - 2 * c + 0.01 * s) for s in range(3) for c in range(2)]
    (other, _), _ = build_configurations(measure_trials(near))
    assert other.verdict == "worse"
    far = [(c, s, 3.0 - 0.2 * c + 0.5 * s) for s in range(3) for c in range(2)]
    (other, _), _ = build_configurations(measure_trials(far))
    assert other.verdict == "no difference shown"


@pytest.mark.parametrize(("num_rows", "is_judged"), [(5, False), (6, True)])
def test_too_few_rows_get_no_verdict_and_no_p(num_rows: int, is_judged: bool) -> None:
    trials = [(0, 0, 3.0), (1, 0, 1.0), (0, 1, 3.01), (1, 1, 1.01), (0, 2, 3.02), (1, 2, 1.02)]
    measured = measure_trials(trials, num_rows=num_rows)
    (other, _), _ = build_configurations(measured)
    assert (other.verdict == "worse") == is_judged
    assert (other.p_value is not None) == is_judged
    assert (
        "are too few to compare configurations" in list_notes(measured, 1, num_rows)
    ) != is_judged


@pytest.mark.promise
def test_choosing_the_best_of_many_shows_no_difference_where_there_is_none() -> None:
    """Compared with the best of equal ones, some are worse by chance: 24 comparisons would be
    corrected too little."""
    rng = np.random.default_rng(0)
    shown = 0
    for _ in range(NUM_NULL_SWEEPS):
        measured = measure_trials([(index, 0, 0.0) for index in range(24)], rates=range(24))
        for number, values in measured.values.items():
            items = tuple(rng.normal(size=len(values.ids)))
            measured.values[number] = replace(values, values=items)
        configurations, _ = build_configurations(measured)
        shown += any(configuration.verdict == "worse" for configuration in configurations)
    assert shown / NUM_NULL_SWEEPS < 0.1
