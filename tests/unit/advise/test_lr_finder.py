"""Short runs: one start for every run, a choice on held-out rows, and collapses."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tiny_runs import build_sum_rows, make_tiny_recipe, write_eval_files, write_rows
from tunesmith.advise.lr_finder import (
    ShortRun,
    ShortRuns,
    ShortRunTable,
    choose_rate,
    find_learning_rate,
)
from tunesmith.cli.views.learning_rates import render_rates, report_rates
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import parse_as, to_jsonable
from tunesmith.core.types import Plan
from tunesmith.evaluate.results import MetricValues
from tunesmith.session import inputs, planner


def make_inputs(tiny_folder: Path, tmp_path: Path, **changed: Any) -> tuple[Plan, inputs.RunInputs]:
    rows = write_rows(tmp_path / "many.jsonl", build_sum_rows(1, 30))
    files = write_eval_files(tmp_path / "held out")
    held_out = {role: files[role] for role in ("eval_data", "test_data")}
    values = {"data": str(rows), "batch_size": 2, "learning_rate": 0.01, **held_out}
    run_inputs = inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path, **(values | changed)))
    return planner.make_plan(run_inputs), run_inputs


@pytest.fixture(scope="module")
def plan_and_inputs(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, inputs.RunInputs]:
    return make_inputs(tiny_folder, tmp_path_factory.mktemp("short"))


@pytest.fixture
def plan(plan_and_inputs: tuple[Plan, inputs.RunInputs]) -> Plan:
    return plan_and_inputs[0]


@pytest.fixture
def run_inputs(plan_and_inputs: tuple[Plan, inputs.RunInputs]) -> inputs.RunInputs:
    return plan_and_inputs[1]


def render(table: ShortRunTable) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(render_rates(table))
    return console.export_text()


# ---------------------------------------------------------------- runs


def test_every_run_starts_from_the_same_weights(plan: Plan, run_inputs: inputs.RunInputs) -> None:
    *runs, table = find_learning_rate(plan, run_inputs, steps=3)
    assert isinstance(table, ShortRunTable)
    names = ["0.001", "0.0032", "0.01", "0.032", "0.1"]
    assert [row.name for row in table.rows] == names[: len(table.rows)]
    assert [run.name for run in runs if isinstance(run, ShortRun)] == ["", *names[: len(runs) - 1]]
    assert (table.metric, table.items, table.steps) == ("loss", 3, 3)
    assert parse_as(ShortRunTable, to_jsonable(table)) == table
    short = ShortRuns(plan, run_inputs)
    again = [short.train("", plan.config, 3) for _ in range(2)]
    assert again[0].loss == again[1].loss == table.rows[2].loss


def test_held_out_rows_are_needed_and_no_pairs(tiny_folder: Path, tmp_path: Path) -> None:
    plan, run_inputs = make_inputs(tiny_folder, tmp_path, eval_data=(), test_data=())
    with pytest.raises(InputError, match="no held-out rows") as refusal:
        next(find_learning_rate(plan, run_inputs))
    assert "--eval-split" in refusal.value.fix
    with pytest.raises(InputError, match="does not measure preference accuracy"):
        next(find_learning_rate(make_preference(plan), run_inputs))


def make_preference(plan: Plan) -> Plan:
    stage = plan.settings["stage"]
    return plan.with_settings(stage=type(stage)("preference", stage.decided_by, stage.reason))


@pytest.mark.promise
def test_texts_are_compared_by_bits_per_byte(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"a text of some words, number {n}. " * 4} for n in range(38)]
    names = ("data", "eval_data", "test_data")
    parts = dict(zip(names, (rows[:30], rows[30:34], rows[34:]), strict=True))
    files = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", part)) for name, part in parts.items()
    }
    changed = {"stage": "cpt", "batch_size": "auto", "batch_tokens": 512, **files}
    *_, table = find_learning_rate(*make_inputs(tiny_folder, tmp_path, **changed), steps=3)
    assert isinstance(table, ShortRunTable)
    assert table.metric == "bits_per_byte"


def test_a_rate_whose_held_out_loss_overflows_has_collapsed(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its only step was sound, and the results of the rates before it stay."""
    changes = {"lora_r": 1, "lora_alpha": 10**19, "learning_rate": 1.0}
    plan, run_inputs = make_inputs(tiny_folder, tmp_path, **changes)
    table = report_rates(find_learning_rate(plan, run_inputs, steps=1))
    assert table.rows[-1].problem
    assert table.reference != table.rows[-1].name
    assert "before training: held-out loss" in capsys.readouterr().err
    assert "collapsed" in render(table)


# ---------------------------------------------------------------- tables


def make_run(name: str, *values: float, problem: str = "") -> ShortRun:
    ids = tuple("abcdef"[: len(values)])
    held_out = MetricValues("eval", "loss", ids, values, higher_is_better=False)
    return ShortRun(name, held_out, problem)


BASE = make_run("", 3, 3, 3, 3, 3, 3)


def test_the_lowest_held_out_loss_is_chosen(plan: Plan) -> None:
    low = make_run("0.0001", 1.5, 1.6, 1.4, 1.5, 1.5, 1.5)
    middle = make_run("0.001", 1.0, 1.1, 0.9, 1.0, 1.05, 1.01)
    worse = make_run("0.01", 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, problem="non-finite loss")
    table = choose_rate(plan, BASE, [low, middle, worse], 3)
    assert (table.base_loss, table.reference) == (pytest.approx(3), "0.001")
    assert [row.verdict for row in table.rows] == ["seed noise unknown", "", ""]
    assert table.rows[0].comparison is not None
    assert table.rows[0].comparison.difference == pytest.approx(0.49)
    assert table.notes[0].startswith("the model collapses at 0.01")
    assert "chosen" in render(table)
    highest = choose_rate(plan, BASE, [low, middle], 3)
    assert "a higher one may be better" in highest.notes[0]
    lowest = choose_rate(plan, BASE, [middle, low], 3)
    assert "a lower one may be better" in lowest.notes[0]
    none = choose_rate(plan, BASE, [worse], 3)
    assert none.reference is None
    assert "every rate collapsed" in none.notes[0]
