"""The decision is the cheapest arm that is not significantly worse than the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.run_arm import ArmResult
from tunesmith.advise.measured.verdict import (
    ArmGrader,
    ArmRow,
    Decision,
    build_table,
    choose_primary_metric,
    make_decision,
)
from tunesmith.evaluate.generate_until import EvalPrompt

ITEMS = 40


def make_questions(count: int = ITEMS) -> tuple[EvalPrompt, ...]:
    return tuple(EvalPrompt(f"row:{n}", (1,), "?", "yes", 1) for n in range(count))


def make_result(
    arm: Arm, correct: int, items: int = ITEMS, first: int = 0, **costs: float
) -> ArmResult:
    """Answer `correct` items correctly, from `first` on."""
    answers = {f"row:{n}": "yes" if first <= n < first + correct else "no" for n in range(items)}
    values = {
        "prompt_tokens": 100.0,
        "request_seconds": 1.0,
        "train_seconds": 0.0,
        "total_seconds": 5.0,
        **costs,
    }
    return ArmResult(arm, answers, **values)


def decide(
    *results: ArmResult,
    target: float | None = None,
    items: int = ITEMS,
    skipped: Sequence[Arm] = (),
) -> tuple[Sequence[ArmRow], Decision]:
    metrics = ("exact_match", "contains")
    rows = build_table(results, ArmGrader(make_questions(items), metrics[0], metrics, None))
    return rows, make_decision(rows, target, skipped)


def test_a_prompt_wins_over_a_slightly_better_training() -> None:
    arms = (
        make_result(Arm(), 4),
        make_result(Arm(shots=4), 36),
        make_result(Arm(examples=100), 38, train_seconds=90),
    )
    rows, decision = decide(*arms)
    assert [row.name for row in rows] == ["zero-shot", "4 shots", "LoRA on 100 examples"]
    assert (decision.conclusion, decision.chosen.name, decision.best.name) == (
        "prompt",
        "4 shots",
        "LoRA on 100 examples",
    )
    assert decision.chosen.difference[0] == pytest.approx(-0.05)
    assert decision.chosen.difference[1] < 0 < decision.chosen.difference[2]
    assert rows[0].difference[2] < 0, "zero-shot is significantly worse"
    assert rows[2].train_minutes == 1.5
    assert any(
        "items, if LoRA on 100 examples stays 0.050 ahead" in line
        for line in decision.counterfactuals
    )
    assert [score.metric for score in rows[0].other_scores] == ["contains"]


@pytest.mark.parametrize(
    ("best", "conclusion"),
    [
        (Arm(examples=100), "sft"),
        (Arm(passages=3), "retrieval"),
        (Arm(passages=3, shots=4), "retrieval"),
        (Arm(is_constrained=True), "constrained decoding"),
        (Arm(is_constrained=True, shots=4), "prompt"),
        (Arm(examples=100, passages=3), "sft"),
    ],
)
def test_a_clear_winner_is_chosen(best: Arm, conclusion: str) -> None:
    _, decision = decide(make_result(Arm(), 4), make_result(Arm(shots=2), 8), make_result(best, 36))
    assert (decision.conclusion, decision.chosen.arm, decision.chosen) == (
        conclusion,
        best,
        decision.best,
    )


def test_zero_shot_wins_when_nothing_is_better() -> None:
    _, decision = decide(
        make_result(Arm(), 39), make_result(Arm(shots=4), 39), make_result(Arm(examples=100), 39)
    )
    assert (decision.conclusion, decision.chosen.name, decision.best.name) == (
        "prompt",
        "zero-shot",
        "zero-shot",
    )


def test_a_total_failure_and_an_unreachable_target_conclude_nothing() -> None:
    assert (
        decide(make_result(Arm(), 0), make_result(Arm(examples=100), 2))[1].conclusion == "nothing"
    )
    arms = (make_result(Arm(), 4), make_result(Arm(shots=4), 20))
    assert decide(*arms)[1].conclusion == "prompt"
    missed = decide(*arms, target=0.9)[1]
    assert missed.conclusion == "nothing"
    assert "a target below 0.9: 4 shots has 0.500" in missed.counterfactuals
    assert decide(*arms, target=0.6)[1].conclusion == "prompt", "0.6 lies in the interval"


def test_it_is_undecided_while_a_kind_was_skipped_unless_training_wins() -> None:
    prompts = (make_result(Arm(), 4), make_result(Arm(shots=4), 36))
    no_room = (
        Arm(shots=8),
        Arm(examples=25),
        Arm(examples=50, passages=1),
        Arm(is_constrained=True),
    )
    decision = decide(*prompts, skipped=no_room)[1]
    assert (decision.conclusion, decision.untried_kinds) == (
        "undecided",
        ("retrieval", "the schema", "training"),
    )
    assert (decision.chosen.name, decision.best.name) == ("4 shots", "4 shots"), (
        "the best of the tried arms is reported all the same"
    )
    decision = decide(*prompts, skipped=no_room[:1])[1]
    assert (decision.conclusion, decision.untried_kinds) == ("prompt", ()), (
        "another number of shots is no other kind"
    )
    decision = decide(make_result(Arm(), 4), make_result(Arm(examples=100), 36), skipped=no_room)[1]
    assert (decision.conclusion, decision.untried_kinds) == (
        "sft",
        ("prompts", "retrieval", "the schema"),
    )


def test_prompts_count_by_their_best_wording_and_trainings_by_their_mean() -> None:
    prompts = [
        make_result(Arm(shots=4, shot_layout=form, seed=s), right)
        for form, s, right in (("turns", 0, 10), ("headed", 1, 30))
    ]
    trained = [make_result(Arm(examples=50, seed=seed), right) for seed, right in ((0, 8), (1, 12))]
    (zero, shots, lora), decision = decide(make_result(Arm(), 0), *prompts, *trained)
    assert (
        shots.variants,
        shots.arm.variant,
        shots.score.value,
        shots.mean_score,
        shots.min_score,
    ) == (
        2,
        "headed, seed 1",
        0.75,
        0.5,
        0.25,
    )
    assert (lora.variants, lora.score.value, lora.mean_score) == (2, 0.25, 0.25)
    assert zero.variants == 1
    (caveat,) = decision.caveats
    assert "headed, seed 1 is the best of 2 wordings, selected on the items that score it" in caveat
    assert "their mean is 0.500" in caveat


def test_few_items_are_a_caveat() -> None:
    _, decision = decide(make_result(Arm(), 3, 10), make_result(Arm(shots=4), 7, 10), items=10)
    assert (decision.conclusion, decision.chosen.name, decision.items) == (
        "prompt",
        "zero-shot",
        10,
    )
    assert decision.caveats[0].startswith("10 items are few: only a difference of about 0.")
    assert decision.detectable_difference > 0.4
    assert not [line for line in decide(make_result(Arm(), 3))[1].caveats if "few" in line]


@pytest.mark.parametrize("items", [2, 4, 5])
def test_a_handful_of_items_decides_nothing(items: int) -> None:
    """Even where each item speaks for training, and where prompts and training are equal."""
    for before, after in ((0, items), (items - 1, items), (items, items)):
        rows, decision = decide(
            make_result(Arm(), before, items),
            make_result(Arm(examples=100), after, items),
            items=items,
        )
        best = rows[0] if before == after else rows[1]
        assert (decision.conclusion, decision.chosen, decision.best) == ("undecided", best, best)
        assert decision.caveats[0] == (
            f"{items} items are too few for any conclusion: measure at least 6"
        )
        assert not [line for line in decision.caveats if "items are few" in line]
    target_missed = decide(make_result(Arm(), 0, items), items=items, target=0.9)[1]
    assert target_missed.conclusion == "undecided"


def test_six_items_conclude() -> None:
    arms = (make_result(Arm(), 0, 6), make_result(Arm(shots=2), 6, 6))
    assert decide(*arms, items=6)[1].conclusion == "prompt"


def test_single_trainings_and_shorter_prompts_are_reported() -> None:
    shots = make_result(Arm(shots=8), 38, prompt_tokens=900, request_seconds=2.0)
    _, decision = decide(
        make_result(Arm(), 2),
        shots,
        make_result(Arm(examples=100), 38, prompt_tokens=100, request_seconds=0.5),
    )
    assert decision.chosen.name == "8 shots"
    assert "each size was trained once" in decision.caveats[0]
    assert (
        "many requests: LoRA on 100 examples saves 800 prompt tokens and 1.50 s per request"
        in decision.counterfactuals
    )
    worse = make_result(Arm(examples=100), 3, prompt_tokens=100, request_seconds=0.5)
    assert not any(
        "requests" in line
        for line in decide(make_result(Arm(), 2), shots, worse)[1].counterfactuals
    )
    _, decision = decide(make_result(Arm(), 2), shots)
    assert "training: none was tried" in decision.counterfactuals


def test_a_format_metric_does_not_decide() -> None:
    assert (
        choose_primary_metric(("json_valid", "schema_valid", "field_f1", "exact_match"))
        == "field_f1"
    )
    assert choose_primary_metric(("json_valid",)) == "json_valid"


def test_the_same_items_are_compared_whatever_their_order() -> None:
    result = make_result(Arm(), 20)
    answers = dict(reversed(result.answers.items()))
    _, decision = decide(result, dataclasses.replace(result, arm=Arm(shots=2), answers=answers))
    assert decision.chosen.name == "zero-shot"
