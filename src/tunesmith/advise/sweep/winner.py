"""Measure the winner on test_data, once, and write its recipe.

In: the winner's trial and the rows of test_data. Out: before/after comparisons, stored in the
folder of the sweep, so that the same winner is not measured twice. A sweep with more trials may
have another winner: all are counted, since only the first interval is of unseen rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tunesmith.advise.sweep.run_trial import find_trial_folder, make_trial_recipe
from tunesmith.core.atomic import write_file
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.sweep_record import WINNER_FILE, TrialSpec
from tunesmith.core.types import Comparison
from tunesmith.data.dataset import Dataset
from tunesmith.evaluate.items import build_eval_items
from tunesmith.evaluate.measure import measure_items
from tunesmith.evaluate.results import EvalResults, compare_results
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.machine_errors import machine_errors
from tunesmith.recipe.load import dump_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session.inputs import load_starting_adapter
from tunesmith.session.reopen import load_plan_and_inputs, load_trained_model
from tunesmith.session.session import load_starting_model, open_eval_session
from tunesmith.train.signals import GracefulStop

TEST_FILE = "test.json"


@dataclass(frozen=True)
class WinnerTest:
    """The winner's trial and its results on test_data."""

    trial: int
    comparisons: tuple[Comparison, ...]


def measure_winner(
    folder: Path, trial: int, test_rows: Dataset, *, allow_code: bool = False
) -> tuple[tuple[Comparison, ...], int]:
    """Return before and after on test_data, and how many winners were measured on it by now."""
    file = folder / TEST_FILE
    measured: list[WinnerTest] = []
    if file.exists():
        measured = list(parse_as(tuple[WinnerTest, ...], read_json(file), where=str(file)))
    for measurement in measured:
        if measurement.trial == trial:
            return measurement.comparisons, len(measured)
    with GracefulStop("continue with the same command") as stop, stop.immediate():
        comparisons = _measure_test(folder, trial, test_rows, allow_code=allow_code)
    measured.append(WinnerTest(trial, comparisons))
    write_file(file, dump_json(tuple(measured)))
    return comparisons, len(measured)


def _measure_test(
    folder: Path, trial: int, test_rows: Dataset, *, allow_code: bool
) -> tuple[Comparison, ...]:
    path = find_trial_folder(folder, trial)
    plan, run_inputs = load_plan_and_inputs(path)
    datasets = {**run_inputs.datasets, "test_data": test_rows}
    eval_inputs = dataclasses.replace(run_inputs, datasets=datasets)
    items = build_eval_items(plan, eval_inputs, allow_code=allow_code)

    def measure(model: PackedCausalLM, step: int) -> EvalResults:
        return measure_items(open_eval_session(plan, eval_inputs, model), items, step=step)

    with machine_errors():
        adapter = load_starting_adapter(plan, run_inputs.model.path)
        start = dataclasses.replace(run_inputs, adapter=adapter)
        before = measure(load_starting_model(plan, start), 0)
        after = measure(load_trained_model(path, plan, run_inputs), plan.steps)
    return compare_results(before, after, step=plan.steps)


def write_winner(folder: Path, recipe: Recipe, spec: TrialSpec) -> Path:
    """Write the recipe with the winner's values and seed, without its sweep; return the file."""
    winner = make_trial_recipe(recipe, spec, output_dir="auto")
    path = folder / WINNER_FILE
    trial = find_trial_folder(folder, spec.number).name
    head = f"# The winner of the sweep in {folder.name}, trained as {trial}.\n"
    write_file(path, (head + dump_recipe(winner)).encode())
    return path
