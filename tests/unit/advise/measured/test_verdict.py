"""The decision is by non-inferiority with a margin and a target; anything else is undecided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from benchmarks.advise.decisions import (
    BINARY,
    GRADED,
    GROUPED,
    MARGIN_CASES,
    OTHER_CASES,
    Answers,
    Case,
    simulate,
)

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.run_arm import ArmResult
from tunesmith.advise.measured.verdict import (
    ArmGrader,
    Decision,
    build_table,
    choose_options,
    choose_primary_metric,
    collect_candidates,
    count_looks,
    make_decision,
    split_items,
)
from tunesmith.evaluate.generate_until import EvalPrompt
from tunesmith.evaluate.results import MetricValues

ITEMS = 60
LORA = Arm(examples=100)
SHOTS = Arm(shots=4)


def make_values(values: Sequence[float]) -> MetricValues:
    ids = tuple(f"row:{n}" for n in range(len(values)))
    return MetricValues("items", "exact_match", ids, tuple(map(float, values)))


def spread(correct: int, items: int = ITEMS) -> list[float]:
    """Return so many ones, spread evenly over the items."""
    return [float((n + 1) * correct // items > n * correct // items) for n in range(items)]


def decide(
    scores: Mapping[Arm, Sequence[float]],
    target: float | None = None,
    margin: float = 0.1,
    skipped: Sequence[Arm] = (),
) -> Decision:
    values = {arm: make_values(each) for arm, each in scores.items()}
    choosing = split_items(next(iter(values.values())).ids)
    options = choose_options(values, choosing)
    return make_decision(options, target, margin, choosing_items=len(choosing), skipped=skipped)


def test_a_difference_that_is_not_significant_is_undecided() -> None:
    """Prompt .85, LoRA 1.00 on 20 items: once "prompting is enough", against a target of .9."""
    scores = {Arm(): spread(17, 20), LORA: spread(20, 20)}
    for target in (None, 0.9):
        decision = decide(scores, target)
        assert decision.conclusion == "undecided"
        assert decision.needed_items is None or decision.needed_items > decision.judging_items
    assert (decision.choosing_items, decision.judging_items) == (6, 14)


@pytest.mark.parametrize(
    ("prompt", "trained", "target", "conclusion"),
    [
        (60, 60, None, "prompt"),
        (60, 60, 0.8, "prompt"),
        (10, 55, None, "sft"),
        (10, 58, 0.8, "sft"),
        (10, 45, 0.8, "sft"),  # better by more than the margin, the target not yet excluded
        (5, 30, 0.9, "nothing"),
        (0, 0, None, "nothing"),
        (40, 44, None, "undecided"),
        (48, 60, 0.8, "undecided"),
    ],
)
def test_the_conclusion_follows_margin_and_target(
    prompt: int, trained: int, target: float | None, conclusion: str
) -> None:
    scores = {SHOTS: spread(prompt), LORA: spread(trained)}
    assert decide(scores, target).conclusion == conclusion


def test_the_margin_decides() -> None:
    scores = {SHOTS: spread(75, 150), LORA: spread(105, 150)}
    assert decide(scores, margin=0.02).conclusion == "sft"
    assert decide(scores, margin=0.2).conclusion == "undecided"
    assert decide(scores, margin=0.5).conclusion == "prompt"


def test_approaches_are_taken_from_the_cheapest_on() -> None:
    scores = {Arm(): spread(4), Arm(passages=3): spread(60), LORA: spread(60)}
    decision = decide(scores)
    assert (decision.conclusion, decision.chosen.arm) == ("retrieval", Arm(passages=3))
    constrained = {Arm(): spread(4), Arm(is_constrained=True): spread(60), LORA: spread(60)}
    assert decide(constrained).conclusion == "constrained decoding"
    other = {Arm(): spread(4), Arm(base="larger"): spread(60), LORA: spread(60)}
    assert decide(other).conclusion == "another base"


def test_an_untried_approach_leaves_it_open_unless_the_target_is_reached() -> None:
    scores = {Arm(): spread(60)}
    decision = decide(scores, skipped=[LORA, SHOTS, Arm(passages=1)])
    assert (decision.conclusion, decision.untried) == ("undecided", ("retrieval", "sft"))
    assert decide(scores, 0.8, skipped=[LORA]).conclusion == "prompt"
    trained = {Arm(): spread(4), LORA: spread(60)}
    assert decide(trained, skipped=[Arm(passages=1)]).conclusion == "sft"


def test_wordings_are_chosen_on_other_items_than_they_are_judged_on() -> None:
    """The best of many equal wordings has the score of any of them."""
    random = np.random.default_rng(0)
    judged: list[float] = []
    for _ in range(200):
        scores: dict[Arm, Sequence[float]] = {
            Arm(shots=4, seed=seed): (random.random(30) < 0.5).astype(float).tolist()
            for seed in range(7)
        }
        judged.append(decide(scores).options[0].score.value)
    assert np.mean(judged) == pytest.approx(0.5, abs=0.02)


def test_groups_choose_or_judge_as_a_whole() -> None:
    ids = [f"row:{n}" for n in range(9)]
    assert split_items(ids) == {"row:0", "row:1", "row:2"}
    groups = ["a", "b", "c", "a", "b", "c", "d", "e", "f"]
    assert split_items(ids, groups) == {"row:0", "row:1", "row:2", "row:3", "row:4", "row:5"}


def test_a_handful_of_items_decides_nothing() -> None:
    for items in (3, 5, 7):
        decision = decide({Arm(): spread(0, items), LORA: spread(items, items)})
        assert (decision.conclusion, decision.needed_items) == ("undecided", 6)


@pytest.mark.parametrize("kind", [BINARY, GRADED, GROUPED], ids=lambda kind: kind.name)
@pytest.mark.parametrize("case", [MARGIN_CASES[0], MARGIN_CASES[2], OTHER_CASES[0], OTHER_CASES[5]])
def test_advice_is_rarely_wrong_however_often_it_is_decided(case: Case, kind: Answers) -> None:
    """Once 20% at the margin with up to 640 items, and 92% at a truth of .7 against .9."""
    random = np.random.default_rng(1)
    conclusions = [simulate(case, 160, kind, random)[0] for _ in range(50)]
    assert sum(each in case.wrong for each in conclusions) <= 6  # of 5% of 50, in 99%


def test_intervals_hold_at_each_of_several_looks() -> None:
    assert [count_looks(20, most) for most in (20, 21, 40, 50, 640)] == [1, 2, 2, 3, 6]
    values = {SHOTS: make_values(spread(90, 150)), LORA: make_values(spread(127, 150))}
    options = choose_options(values, split_items(next(iter(values.values())).ids))
    once = make_decision(options, None)
    often = make_decision(options, None, looks=6)
    assert (once.conclusion, often.conclusion) == ("sft", "undecided")
    assert often.options[0].gains[0].low < once.options[0].gains[0].low
    assert often.options[0].score.high > once.options[0].score.high


def test_few_grades_are_taken_for_right_or_wrong_answers() -> None:
    values = {SHOTS: make_values([0.7] * 20), LORA: make_values([0.71] * 20)}
    (prompt, _) = choose_options(values, frozenset())
    assert prompt.gains[0].high > 0.1, "a rare change of 1 may not be among 20"


# ---------------------------------------------------------------- answers


def make_result(arm: Arm, correct: int, items: int = ITEMS) -> ArmResult:
    answers = {f"row:{n}": "yes" if value else "no" for n, value in enumerate(spread(correct))}
    return ArmResult(arm, dict(list(answers.items())[:items]), 100.0, 1.0, 90.0, 95.0)


def test_trainings_count_by_their_mean_and_wordings_alone() -> None:
    questions = tuple(EvalPrompt(f"row:{n}", (1,), "?", "yes", 1) for n in range(ITEMS))
    grader = ArmGrader(questions, "exact_match", None)
    results = [
        make_result(SHOTS, 10),
        make_result(Arm(shots=4, seed=1), 30),
        make_result(LORA, 30),
        make_result(Arm(examples=100, seed=1), 60),
        make_result(Arm(), 60, items=20),
    ]
    candidates = collect_candidates(results, grader)
    assert list(candidates) == [SHOTS, Arm(shots=4, seed=1), LORA, Arm()]
    values, arms = candidates[LORA]
    assert (np.mean(values.values), len(arms)) == (0.75, 2)
    assert len(candidates[Arm()][0].ids) == 20, "the items that it has answered"
    zero, shots, lora = build_table(results, grader)
    assert (zero.score.n, shots.variants, shots.score.value) == (20, 2, pytest.approx(20 / 60))
    assert (lora.score.value, lora.train_minutes) == (0.75, 1.5)


def test_a_format_metric_does_not_decide() -> None:
    metrics = ("json_valid", "schema_valid", "field_f1", "exact_match")
    assert choose_primary_metric(metrics) == "field_f1"
    assert choose_primary_metric(("json_valid",)) == "json_valid"
