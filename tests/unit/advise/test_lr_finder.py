"""The learning-rate test: the same start for every rate, picked by held-out rows, and what a
collapse looks like."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tiny_runs import measured_files, recipe, steps_of, sums, train, write_rows
from tunesmith.advise.lr_finder import (
    LRFinderResult,
    LRTrial,
    detect_collapse,
    summarize_trials,
    try_rates,
)
from tunesmith.advise.lr_plot import render_bar, render_svg
from tunesmith.core.errors import InputError
from tunesmith.core.events import TrainStep
from tunesmith.core.json_io import parse_as, to_jsonable
from tunesmith.core.types import Plan
from tunesmith.evaluate.results import MetricValues
from tunesmith.session import inputs


def wish(tiny_folder: Path, tmp_path: Path, **changed: Any) -> tuple[Plan, inputs.RunInputs]:
    rows = write_rows(tmp_path / "many.jsonl", sums(1, 40))
    files = measured_files(tmp_path / "held out")
    held_out = {role: files[role] for role in ("eval_data", "test_data")}
    values = {"data": str(rows), "num_train_epochs": 3, "learning_rate": 0.01, **held_out}
    known = inputs.load_inputs(recipe(tiny_folder, tmp_path, **(values | changed)))
    return inputs.make_plan(known), known


def test_every_rate_starts_from_the_same_weights(tiny_folder: Path, tmp_path: Path) -> None:
    plan, known = wish(tiny_folder, tmp_path)
    untrained, *tried = try_rates(plan, known, steps=10)
    assert (untrained.learning_rate, untrained.losses) == (0.0, ())
    assert [trial.learning_rate for trial in tried][:3] == [0.001, 0.0032, 0.01]
    assert len({trial.losses[0] for trial in tried}) == 1, (
        "the first step's loss is of the start, at any rate"
    )
    assert len({trial.losses[-1] for trial in tried}) == len(tried)
    assert all(len(trial.losses) == 10 for trial in tried)
    alone = train(
        recipe(tiny_folder, tmp_path / "alone", data=str(tmp_path / "many.jsonl"), batch_size=2)
    )
    assert tried[0].losses[0] == pytest.approx(steps_of(alone)[0].loss, rel=1e-5)
    test = summarize_trials(plan, [untrained, *tried])
    assert (test.metric, test.rows, test.steps, test.planned_rate) == ("loss", 3, 10, 0.01)
    assert test.chosen_rate in [trial.learning_rate for trial in tried]
    assert parse_as(LRFinderResult, to_jsonable(test)) == test


def test_it_needs_held_out_rows_and_answers(tiny_folder: Path, tmp_path: Path) -> None:
    plan, known = wish(tiny_folder, tmp_path, eval_data=(), test_data=())
    with pytest.raises(InputError, match="no held-out rows to pick by") as refusal:
        next(try_rates(plan, known))
    assert "--eval-split" in refusal.value.fix
    of_pairs = dataclasses.replace(plan.choices["stage"], value="preference")
    with pytest.raises(InputError, match="how well pairs are told apart"):
        next(
            try_rates(dataclasses.replace(plan, choices=plan.choices | {"stage": of_pairs}), known)
        )


def test_texts_are_picked_by_bits_per_byte(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"a text of some words, number {n}. " * 4} for n in range(38)]
    names = ("data", "eval_data", "test_data")
    parts = dict(zip(names, (rows[:30], rows[30:34], rows[34:]), strict=True))
    files = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", part)) for name, part in parts.items()
    }
    plan, known = wish(
        tiny_folder, tmp_path, stage="cpt", batch_size="auto", batch_tokens=512, **files
    )
    trials = list(try_rates(plan, known, steps=10))
    assert summarize_trials(plan, trials).metric == "bits_per_byte"


def steps(losses: Sequence[float], norms: Sequence[float] = ()) -> list[TrainStep]:
    pairs = zip(losses, norms or [1.0] * len(losses), strict=True)
    return [
        TrainStep(i, loss, 10, 5, 0.1, 1e-3, norm, 0) for i, (loss, norm) in enumerate(pairs, 1)
    ]


FALLING = [3.0 * 0.9**i for i in range(20)]


@pytest.mark.parametrize(
    ("taken", "told"),
    [
        (steps(FALLING), ""),
        (steps([2.0, 2.4, 1.6, 2.3, 1.7] * 4), ""),
        (steps([0.01, 0.02] * 10), ""),
        (steps([*FALLING[:10], *(1.0 + 0.5 * i for i in range(10))]), "the loss rises from"),
        (
            steps(FALLING, [1.0] * 12 + [30.0] + [1.0] * 7),
            "the gradient is 30 times the usual one at step 13",
        ),
        ([], ""),
    ],
    ids=["falls", "noise", "near zero", "rises", "jumps", "none"],
)
def test_a_collapse_shows_in_losses_and_gradients(taken: list[TrainStep], told: str) -> None:
    assert detect_collapse(taken).startswith(told)
    assert bool(detect_collapse(taken)) == bool(told)


def trial(rate: float, loss: float, collapsed: str = "") -> LRTrial:
    values = (loss - 0.02, loss + 0.01, loss + 0.01)
    measured = MetricValues("eval", "loss", ("a", "b", "c"), values, higher_is_better=False)
    return LRTrial(rate, () if rate == 0 else (2.0, loss), measured, collapsed)


@pytest.fixture
def plan(tiny_folder: Path, tmp_path: Path) -> Plan:
    return wish(tiny_folder, tmp_path)[0]


def test_the_lowest_held_out_loss_is_chosen_and_a_worse_model_has_collapsed(plan: Plan) -> None:
    test = summarize_trials(
        plan, [trial(0, 2.0), trial(1e-4, 1.5), trial(1e-3, 1.0), trial(1e-2, 2.5)]
    )
    assert (test.base_loss, test.chosen_rate, test.collapse_rate, test.caveats) == (
        pytest.approx(2.0),
        1e-3,
        1e-2,
        (),
    )
    assert "worse than before training" in test.points[2].collapse_reason
    assert test.points[0].difference[0] == pytest.approx(0.5)
    assert test.points[1].difference == ()


def test_edges_ties_and_a_collapse_of_all_are_said(plan: Plan) -> None:
    highest = summarize_trials(plan, [trial(0, 2.0), trial(1e-4, 1.5), trial(1e-3, 1.0)])
    assert "a higher one may be better" in highest.caveats[0]
    lowest = summarize_trials(plan, [trial(0, 2.0), trial(1e-4, 1.0), trial(1e-3, 1.5)])
    assert "a lower one may be better" in lowest.caveats[0]
    near = MetricValues("eval", "loss", ("a", "b", "c"), (1.1, 0.9, 1.02), higher_is_better=False)
    mixed = dataclasses.replace(trial(1e-3, 1.0), held_out=near)
    tied = summarize_trials(plan, [trial(0, 2.0), trial(1e-4, 1.0), mixed])
    assert tied.similar_rates == (1e-3,)
    none = summarize_trials(
        plan,
        [trial(0, 2.0), dataclasses.replace(trial(1e-4, 1.0, "loss not finite"), held_out=None)],
    )
    assert (none.chosen_rate, none.collapse_rate) == (None, 1e-4)
    assert "every rate collapsed" in none.caveats[0]


def test_the_curve_is_a_picture_of_its_own(plan: Plan) -> None:
    test = summarize_trials(
        plan, [trial(0, 2.0), trial(1e-4, 1.5), trial(1e-3, 1.0), trial(1e-2, 2.5)]
    )
    root = ElementTree.fromstring(render_svg(test))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"0.0001", "0.001", "0.01", "1.500", "1.000", "✕", "chosen: 0.001"} <= set(texts)
    dots = [element for element in root.iter() if element.tag.endswith("circle")]
    heights = [float(dot.attrib["cy"]) for dot in dots]
    assert heights == sorted(heights), "a lower loss stands lower"
    assert not re.search(r"script|href|http(?!://www.w3.org/2000/svg)", render_svg(test))
    assert [len(render_bar(point, test)) for point in test.points] == [13, 32, 0]
    nothing = summarize_trials(
        plan, [trial(0, 2.0), dataclasses.replace(trial(1e-4, 1.0, "not finite"), held_out=None)]
    )
    assert "none is sound" in render_svg(nothing)
