"""The learning-rate finder: one start for every rate, a choice on held-out rows, and collapses."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import (
    build_sum_rows,
    make_tiny_recipe,
    select_steps,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith.advise.lr_finder import (
    LRFinderResult,
    LRTrial,
    detect_collapse,
    summarize_trials,
    try_rates,
)
from tunesmith.cli.views.lr_finder import format_trial, render_bar
from tunesmith.core.errors import InputError
from tunesmith.core.events import TrainStep
from tunesmith.core.json_io import parse_as, to_jsonable
from tunesmith.core.types import Plan
from tunesmith.evaluate.results import MetricValues
from tunesmith.session import inputs


def make_inputs(tiny_folder: Path, tmp_path: Path, **changed: Any) -> tuple[Plan, inputs.RunInputs]:
    rows = write_rows(tmp_path / "many.jsonl", build_sum_rows(1, 40))
    files = write_eval_files(tmp_path / "held out")
    held_out = {role: files[role] for role in ("eval_data", "test_data")}
    values = {"data": str(rows), "num_train_epochs": 3, "learning_rate": 0.01, **held_out}
    run_inputs = inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path, **(values | changed)))
    return inputs.make_plan(run_inputs), run_inputs


@pytest.mark.promise
def test_every_rate_starts_from_the_same_weights(tiny_folder: Path, tmp_path: Path) -> None:
    plan, run_inputs = make_inputs(tiny_folder, tmp_path)
    untrained, *trials = try_rates(plan, run_inputs, steps=10)
    assert (untrained.learning_rate, untrained.losses) == (0.0, ())
    assert [trial.learning_rate for trial in trials][:3] == [0.001, 0.0032, 0.01]
    assert len({trial.losses[0] for trial in trials}) == 1, (
        "the first step's loss is of the start, at any rate"
    )
    assert len({trial.losses[-1] for trial in trials}) == len(trials)
    assert all(len(trial.losses) == 10 for trial in trials)
    alone = train(
        make_tiny_recipe(
            tiny_folder, tmp_path / "alone", data=str(tmp_path / "many.jsonl"), batch_size=2
        )
    )
    assert trials[0].losses[0] == pytest.approx(select_steps(alone)[0].loss, rel=1e-5)
    result = summarize_trials(plan, [untrained, *trials])
    assert (result.metric, result.rows, result.steps, result.planned_rate) == ("loss", 3, 10, 0.01)
    assert result.chosen_rate in [trial.learning_rate for trial in trials]
    assert parse_as(LRFinderResult, to_jsonable(result)) == result


def test_it_needs_held_out_rows_and_no_pairs(tiny_folder: Path, tmp_path: Path) -> None:
    plan, run_inputs = make_inputs(tiny_folder, tmp_path, eval_data=(), test_data=())
    with pytest.raises(InputError, match="no held-out rows") as refusal:
        next(try_rates(plan, run_inputs))
    assert "--eval-split" in refusal.value.fix
    pair_config = dataclasses.replace(plan.config, stage="preference")
    with pytest.raises(InputError, match="does not measure preference accuracy"):
        next(try_rates(dataclasses.replace(plan, config=pair_config), run_inputs))


@pytest.mark.promise
def test_texts_are_compared_by_bits_per_byte(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"a text of some words, number {n}. " * 4} for n in range(38)]
    names = ("data", "eval_data", "test_data")
    parts = dict(zip(names, (rows[:30], rows[30:34], rows[34:]), strict=True))
    files = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", part)) for name, part in parts.items()
    }
    plan, run_inputs = make_inputs(
        tiny_folder, tmp_path, stage="cpt", batch_size="auto", batch_tokens=512, **files
    )
    trials = list(try_rates(plan, run_inputs, steps=10))
    assert summarize_trials(plan, trials).metric == "bits_per_byte"


def test_a_rate_whose_held_out_loss_overflows_has_collapsed(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Its only step was sound, and the results of the rates before it stay."""
    changes = {"lora_r": 1, "lora_alpha": 10**19, "learning_rate": 1.0}
    plan, run_inputs = make_inputs(tiny_folder, tmp_path, **changes)
    untrained, *trials = try_rates(plan, run_inputs, steps=1)
    last = trials[-1]
    assert all(map(math.isfinite, last.losses))
    assert (last.held_out, last.collapse_reason) == (None, "non-finite held-out loss")
    assert format_trial(last).endswith("loss none; collapsed: non-finite held-out loss")
    result = summarize_trials(plan, [untrained, *trials])
    assert (result.chosen_rate, result.collapse_rate) == (0.1, 1.0)
    assert [point.loss is None for point in result.points] == [False, False, True]


def make_steps(losses: Sequence[float], norms: Sequence[float] = ()) -> list[TrainStep]:
    pairs = zip(losses, norms or [1.0] * len(losses), strict=True)
    return [
        TrainStep(i, loss, 10, 5, 0.1, 1e-3, norm, 0) for i, (loss, norm) in enumerate(pairs, 1)
    ]


FALLING = [3.0 * 0.9**i for i in range(20)]


@pytest.mark.parametrize(
    ("train_steps", "reason"),
    [
        (make_steps(FALLING), ""),
        (make_steps([2.0, 2.4, 1.6, 2.3, 1.7] * 4), ""),
        (make_steps([0.01, 0.02] * 10), ""),
        (make_steps([*FALLING[:10], *(1.0 + 0.5 * i for i in range(10))]), "the loss rises from"),
        (
            make_steps(FALLING, [1.0] * 12 + [30.0] + [1.0] * 7),
            "the gradient is 30 times the median at step 13",
        ),
        ([], ""),
    ],
    ids=["falls", "noise", "near zero", "rises", "jumps", "none"],
)
def test_a_collapse_shows_in_losses_and_gradients(
    train_steps: list[TrainStep], reason: str
) -> None:
    assert detect_collapse(train_steps).startswith(reason)
    assert bool(detect_collapse(train_steps)) == bool(reason)


def make_trial(rate: float, loss: float, collapsed: str = "") -> LRTrial:
    values = tuple(loss * factor for factor in (0.98, 1.01, 1.01, 0.99, 1.01))
    measured = MetricValues("eval", "loss", tuple("abcde"), values, higher_is_better=False)
    return LRTrial(rate, () if rate == 0 else (2.0, loss), measured, collapsed)


@pytest.fixture
def plan(tiny_folder: Path, tmp_path: Path) -> Plan:
    return make_inputs(tiny_folder, tmp_path)[0]


def test_the_lowest_held_out_loss_is_chosen_and_a_worse_model_has_collapsed(plan: Plan) -> None:
    result = summarize_trials(
        plan,
        [make_trial(0, 2.0), make_trial(1e-4, 1.5), make_trial(1e-3, 1.0), make_trial(1e-2, 2.5)],
    )
    assert (result.base_loss, result.chosen_rate, result.collapse_rate, result.caveats) == (
        pytest.approx(2.0),
        1e-3,
        1e-2,
        (),
    )
    assert "worse than before training" in result.points[2].collapse_reason
    assert result.points[0].difference[0] == pytest.approx(0.5)
    assert result.points[1].difference == ()


def test_edges_ties_and_a_total_collapse_are_caveats(plan: Plan) -> None:
    highest = summarize_trials(
        plan, [make_trial(0, 2.0), make_trial(1e-4, 1.5), make_trial(1e-3, 1.0)]
    )
    assert "a higher one may be better" in highest.caveats[0]
    lowest = summarize_trials(
        plan, [make_trial(0, 2.0), make_trial(1e-4, 1.0), make_trial(1e-3, 1.5)]
    )
    assert "a lower one may be better" in lowest.caveats[0]
    values = (1.1, 0.9, 1.02, 1.0, 0.98)
    near = MetricValues("eval", "loss", tuple("abcde"), values, higher_is_better=False)
    mixed = dataclasses.replace(make_trial(1e-3, 1.0), held_out=near)
    tied = summarize_trials(plan, [make_trial(0, 2.0), make_trial(1e-4, 1.0), mixed])
    assert tied.similar_rates == (1e-3,)
    none = summarize_trials(
        plan,
        [
            make_trial(0, 2.0),
            dataclasses.replace(make_trial(1e-4, 1.0, "loss not finite"), held_out=None),
        ],
    )
    assert (none.chosen_rate, none.collapse_rate) == (None, 1e-4)
    assert "every rate collapsed" in none.caveats[0]


def test_bars_show_the_gain_over_the_untrained_model(plan: Plan) -> None:
    result = summarize_trials(
        plan,
        [make_trial(0, 2.0), make_trial(1e-4, 1.5), make_trial(1e-3, 1.0), make_trial(1e-2, 2.5)],
    )
    assert [len(render_bar(point, result)) for point in result.points] == [13, 32, 0]
