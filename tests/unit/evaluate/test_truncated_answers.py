"""Answers get room to end where their end may change a grade; those that do not end are counted."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from tiny_runs import build_sum_rows, make_tiny_recipe, plan_recipe, write_rows
from tunesmith import api
from tunesmith.cli.app import main
from tunesmith.core.events import Score
from tunesmith.core.run_dir import EVAL_BEFORE_FILE
from tunesmith.evaluate.metrics import LIKELIHOODS, MACRO_F1, METRICS
from tunesmith.evaluate.model_ref import load_results
from tunesmith.evaluate.results import (
    EvalResults,
    MetricValues,
    compare_measurements,
    describe_truncation,
    select_items,
)
from tunesmith.plan.memory import (
    LENGTH_INDEPENDENT_METRICS,
    compute_answer_limit,
    estimate_cache,
    needs_complete_answers,
)
from tunesmith.train import run

pytestmark = pytest.mark.usefixtures("full_answers")
IDS = ("a", "b", "c", "d", "e", "f")


def build_measurement(truncated: tuple[bool, ...], task: str = "test") -> MetricValues:
    return MetricValues(task, "contains", IDS, (0.0, 1.0) * 3, truncated=truncated)


def test_an_answer_gets_room_to_end() -> None:
    assert compute_answer_limit(4, needs_end=True) == 256
    assert compute_answer_limit(1000, needs_end=True) == 1516
    assert compute_answer_limit(4, needs_end=False) == 22


def test_only_equality_is_graded_without_room() -> None:
    names = {*METRICS, MACRO_F1, *LIKELIHOODS}
    assert set(LENGTH_INDEPENDENT_METRICS) < names
    assert set(LIKELIHOODS) < set(LENGTH_INDEPENDENT_METRICS)
    for name in sorted(names):
        has_room = needs_complete_answers(["exact_match", name], has_constraints=False)
        assert has_room == (name not in LENGTH_INDEPENDENT_METRICS), name
    assert needs_complete_answers(["mine.py:score"], has_constraints=False)
    assert needs_complete_answers(["numeric: 0.5"], has_constraints=False)
    assert needs_complete_answers([], has_constraints=True)
    assert not needs_complete_answers([], has_constraints=False)


@pytest.mark.parametrize("metric", sorted(set(METRICS) & set(LENGTH_INDEPENDENT_METRICS)))
def test_a_longer_answer_fails_equality_wherever_it_is_cut(metric: str) -> None:
    words = ["Paris", "is", "the", "capital", "of", "France", "and", "more"]
    for end in range(2, len(words)):
        assert METRICS[metric](" ".join(words[:end]), "Paris", None) == 0


def test_truncated_answers_follow_their_items() -> None:
    measurement = build_measurement((True, False, True, False, False, True))
    assert select_items(measurement, [2, 1, 5]).truncated == (True, False, True)
    before = build_measurement((True,) * 6)
    shuffled = select_items(measurement, [5, 4, 3, 2, 1, 0])
    comparison = compare_measurements(before, shuffled)
    assert (comparison.before.truncated, comparison.after.truncated) == (6, 3)
    plain = MetricValues("test", "loss", IDS, (1.0,) * 6)
    assert compare_measurements(plain, plain).before.truncated == 0


def test_truncated_answers_are_described_once_per_task() -> None:
    before = build_measurement((True,) * 5 + (False,))
    after = build_measurement((False,) * 6)
    comparison = compare_measurements(before, after)
    other = compare_measurements(
        dataclasses.replace(before, metric="chrf"), dataclasses.replace(after, metric="chrf")
    )
    assert describe_truncation([comparison, other], ("A", "B")) == (
        "test: answers truncated at the limit: 5 of 6 A, 0 of 6 B",
    )
    assert describe_truncation([compare_measurements(after, after)]) == ()


@pytest.mark.parametrize("needs_end", [True, False])
def test_the_plan_reserves_the_cache_of_the_longest_answers(
    tiny_folder: Path, tmp_path: Path, needs_end: bool
) -> None:
    plan = plan_recipe(make_tiny_recipe(tiny_folder, tmp_path))
    spec = dataclasses.replace(plan.model, context_length=1000)
    cache = estimate_cache(
        spec,
        plan.machine,
        num_prompts=10,
        longest=100,
        answer_share=0.2,
        needs_end=needs_end,
        dtype="fp32",
    )
    row_tokens = 80 + compute_answer_limit(20, needs_end=needs_end)
    assert cache == (10, 10 * math.ceil(row_tokens / 64) * 64)
    bounded = estimate_cache(
        dataclasses.replace(spec, context_length=150),
        plan.machine,
        num_prompts=10,
        longest=100,
        answer_share=0.2,
        needs_end=True,
        dtype="fp32",
    )
    assert bounded.tokens == 10 * 192, "no answer goes beyond the context"


def test_plans_of_both_kinds_of_metrics_differ(tiny_folder: Path, tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", build_sum_rows(200, 40))

    def predict_answers(**settings: object) -> int:
        recipe = make_tiny_recipe(tiny_folder, tmp_path, test_data=str(test), **settings)
        return plan_recipe(recipe).phase_bytes["generation"]

    exact = predict_answers(metrics=["exact_match"])
    assert predict_answers(metrics=["contains"]) > exact
    assert predict_answers(metrics=["exact_match"], never=["sorry"]) > exact


@pytest.mark.promise
def test_a_run_counts_truncated_answers_in_every_output(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model ends few answers before the limit."""
    test = write_rows(tmp_path / "test.jsonl", build_sum_rows(200, 6))
    recipe = make_tiny_recipe(tiny_folder, tmp_path, test_data=str(test), metrics=["contains"])
    events = list(run.train(plan_recipe(recipe)))
    scores = [event for event in events if isinstance(event, Score) and event.metric == "contains"]
    assert scores[0].truncated == 4
    folder = tmp_path / "run"
    stored: EvalResults = load_results(folder, EVAL_BEFORE_FILE)
    (contains,) = [m for m in stored.measurements if m.metric == "contains"]
    assert sum(contains.truncated) == 4
    longest = max(len(sample.answer.encode()) for sample in stored.samples)
    assert longest > 100, "the answers have room"
    line = "test: answers truncated at the limit: 4 of 6 before"
    report = api.evaluate(folder)
    assert report.comparisons[0].before.truncated == 4
    page = api.write_report(folder).read_text()
    assert line in page
    for arguments in (["eval", str(folder)], ["compare", "base", str(folder)]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code
        printed = " ".join(capsys.readouterr().out.split())
        assert "answers truncated at the limit: 4 of 6" in printed
        with pytest.raises(SystemExit):
            main([*arguments, "--json"])
        comparison = json.loads(capsys.readouterr().out)["comparisons"][0]
        assert comparison["before"]["truncated"] == 4
