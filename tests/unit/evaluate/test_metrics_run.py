"""Metrics of every kind through a whole run; a user's own only for who allows it, each time
anew."""

from __future__ import annotations

from pathlib import Path

import pytest

import tunesmith
from tiny_runs import build_sum_rows, make_tiny_recipe, plan_recipe, run_until_saved, write_rows
from tunesmith.core.errors import InputError
from tunesmith.core.events import Score
from tunesmith.train import run

CUSTOM = "def score(answer, expected):\n    return len(answer) > 0\n"


def write_metric(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(CUSTOM)
    return f"{folder}/mine.py:score"


@pytest.mark.promise
def test_every_kind_of_metric_is_measured_before_and_after(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [
        row | {"choices": [row["messages"][1]["content"], '{"sum": 0}']}
        for row in build_sum_rows(200, 3)
    ]
    names = ["chrf", "numeric: 0.5", "multiple_choice", "bits_per_byte", write_metric(tmp_path)]
    wish = make_tiny_recipe(
        tiny_folder,
        tmp_path,
        test_data=str(write_rows(tmp_path / "test.jsonl", rows)),
        metrics=names,
    )
    scores = [
        event for event in run.train(plan_recipe(wish), allow_code=True) if isinstance(event, Score)
    ]
    wanted = {"chrf", "numeric: 0.5", "multiple_choice", "bits_per_byte", "mine.py:score", "loss"}
    for step in (0, 3):
        assert {score.metric for score in scores if score.step == step} - {
            "kl",
            "top1_agreement",
        } == wanted
    bits = {(score.metric, score.step): score.value for score in scores}
    assert bits["bits_per_byte", 3] < bits["bits_per_byte", 0]


def test_a_metric_of_likelihood_alone_answers_no_more_than_is_shown(
    tiny_folder: Path, tmp_path: Path
) -> None:
    test = write_rows(tmp_path / "test.jsonl", build_sum_rows(200, 6))
    wish = make_tiny_recipe(
        tiny_folder, tmp_path, test_data=str(test), metrics=["bits_per_byte"], max_steps=1
    )
    scores = [event for event in run.train(plan_recipe(wish)) if isinstance(event, Score)]
    assert {score.metric for score in scores if not score.step} == {"loss", "bits_per_byte"}
    (comparison, *_) = tunesmith.evaluate(tmp_path / "run").comparisons
    assert comparison.metric == "loss"


@pytest.mark.promise
def test_own_code_is_asked_for_each_time(tiny_folder: Path, tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", build_sum_rows(200, 2))
    wish = make_tiny_recipe(
        tiny_folder, tmp_path, test_data=str(test), metrics=[write_metric(tmp_path)], save_steps=2
    )
    plan, folder = plan_recipe(wish), tmp_path / "run"
    refused = pytest.raises(InputError, match=r"mine\.py:score is code[\s\S]*--allow-code")
    with refused:
        next(run.train(plan))
    assert not folder.exists()
    run_until_saved(run.train(plan, allow_code=True), step=2)
    with refused:
        next(run.resume(folder))
    (tmp_path / "mine.py").write_text(CUSTOM + "# another\n")
    with pytest.raises(InputError, match=r"data\.metrics\.mine\.py: sha256"):
        next(run.resume(folder, allow_code=True))
    (tmp_path / "mine.py").write_text(CUSTOM)
    list(run.resume(folder, allow_code=True))
    with refused:
        tunesmith.evaluate(folder)
    assert "mine.py:score" in {
        item.metric for item in tunesmith.evaluate(folder, allow_code=True).comparisons
    }


def test_own_code_that_fails_on_an_expected_answer_stops_before_anything_is_loaded(
    tiny_folder: Path, tmp_path: Path
) -> None:
    test, metric = (
        write_rows(tmp_path / "test.jsonl", build_sum_rows(200, 2)),
        write_metric(tmp_path),
    )
    (tmp_path / "mine.py").write_text("def score(answer, expected):\n    return {}['x']\n")
    wish = make_tiny_recipe(tiny_folder, tmp_path, test_data=str(test), metrics=[metric])
    with pytest.raises(
        InputError, match=r"mine\.py:score raised KeyError: 'x' \(mine\.py:2\)"
    ) as refusal:
        next(run.train(plan_recipe(wish), allow_code=True))
    assert refusal.value.where == "test.jsonl:1"
