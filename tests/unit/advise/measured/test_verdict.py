"""The verdict is the cheapest way that is not shown to be worse than the best, and says what it
does not know."""

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


def questions(count: int = ITEMS) -> tuple[EvalPrompt, ...]:
    return tuple(EvalPrompt(f"row:{n}", (1,), "?", "yes", 1) for n in range(count))


def outcome(arm: Arm, right: int, items: int = ITEMS, first: int = 0, **costs: float) -> ArmResult:
    """The items from `first` on are answered right, `right` of them."""
    answers = {f"row:{n}": "yes" if first <= n < first + right else "no" for n in range(items)}
    values = {
        "prompt_tokens": 100.0,
        "request_seconds": 1.0,
        "train_seconds": 0.0,
        "total_seconds": 5.0,
        **costs,
    }
    return ArmResult(arm, answers, **values)


def decided(
    *outcomes: ArmResult,
    target: float | None = None,
    items: int = ITEMS,
    left_out: Sequence[Arm] = (),
) -> tuple[Sequence[ArmRow], Decision]:
    rows = build_table(
        outcomes, ArmGrader(questions(items), "exact_match", ("exact_match", "contains"), None)
    )
    return rows, make_decision(rows, target, left_out)


def test_a_near_prompt_wins_over_a_training_that_is_a_little_better() -> None:
    arms = (
        outcome(Arm(), 4),
        outcome(Arm(shots=4), 36),
        outcome(Arm(examples=100), 38, train_seconds=90),
    )
    rows, found = decided(*arms)
    assert [row.name for row in rows] == ["zero-shot", "4 shots", "LoRA on 100 examples"]
    assert (found.conclusion, found.chosen.name, found.best.name) == (
        "prompt",
        "4 shots",
        "LoRA on 100 examples",
    )
    assert found.chosen.difference[0] == pytest.approx(-0.05)
    assert found.chosen.difference[1] < 0 < found.chosen.difference[2]
    assert rows[0].difference[2] < 0, "zero-shot is shown to be worse"
    assert rows[2].train_minutes == 1.5
    assert any(
        "items, if LoRA on 100 examples stays 0.050 ahead" in line for line in found.counterfactuals
    )
    assert [score.metric for score in rows[0].other_scores] == ["contains"]


@pytest.mark.parametrize(
    ("best", "answer"),
    [
        (Arm(examples=100), "sft"),
        (Arm(passages=3), "retrieval"),
        (Arm(passages=3, shots=4), "retrieval"),
        (Arm(is_constrained=True), "constrained decoding"),
        (Arm(is_constrained=True, shots=4), "prompt"),
        (Arm(examples=100, passages=3), "sft"),
    ],
)
def test_what_is_far_ahead_is_advised(best: Arm, answer: str) -> None:
    _, found = decided(outcome(Arm(), 4), outcome(Arm(shots=2), 8), outcome(best, 36))
    assert (found.conclusion, found.chosen.arm, found.chosen) == (answer, best, found.best)


def test_zero_shot_that_is_as_good_as_any_is_kept() -> None:
    _, found = decided(
        outcome(Arm(), 39), outcome(Arm(shots=4), 39), outcome(Arm(examples=100), 39)
    )
    assert (found.conclusion, found.chosen.name, found.best.name) == (
        "prompt",
        "zero-shot",
        "zero-shot",
    )


def test_what_fails_everywhere_is_said_and_so_is_a_target_out_of_reach() -> None:
    assert decided(outcome(Arm(), 0), outcome(Arm(examples=100), 2))[1].conclusion == "nothing"
    arms = (outcome(Arm(), 4), outcome(Arm(shots=4), 20))
    assert decided(*arms)[1].conclusion == "prompt"
    missed = decided(*arms, target=0.9)[1]
    assert missed.conclusion == "nothing"
    assert "a target lower than 0.9: 4 shots has 0.500" in missed.counterfactuals
    assert decided(*arms, target=0.6)[1].conclusion == "prompt", "0.6 lies in the interval"


def test_nothing_is_decided_while_a_kind_of_way_had_no_room_unless_a_training_wins_anyway() -> None:
    prompts = (outcome(Arm(), 4), outcome(Arm(shots=4), 36))
    no_room = (
        Arm(shots=8),
        Arm(examples=25),
        Arm(examples=50, passages=1),
        Arm(is_constrained=True),
    )
    found = decided(*prompts, left_out=no_room)[1]
    assert (found.conclusion, found.untried_kinds) == (
        "undecided",
        ("retrieval", "the schema", "training"),
    )
    assert (found.chosen.name, found.best.name) == ("4 shots", "4 shots"), (
        "of what was tried it is told all the same"
    )
    found = decided(*prompts, left_out=no_room[:1])[1]
    assert (found.conclusion, found.untried_kinds) == ("prompt", ()), (
        "another number of shots is no other kind"
    )
    found = decided(outcome(Arm(), 4), outcome(Arm(examples=100), 36), left_out=no_room)[1]
    assert (found.conclusion, found.untried_kinds) == (
        "sft",
        ("prompts", "retrieval", "the schema"),
    )


def test_prompts_count_by_their_best_wording_and_trainings_by_their_mean() -> None:
    prompts = [
        outcome(Arm(shots=4, shot_layout=form, seed=s), right)
        for form, s, right in (("turns", 0, 10), ("headed", 1, 30))
    ]
    trained = [outcome(Arm(examples=50, seed=seed), right) for seed, right in ((0, 8), (1, 12))]
    (zero, shots, lora), found = decided(outcome(Arm(), 0), *prompts, *trained)
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
    (doubt,) = found.caveats
    assert (
        "headed, seed 1 is the best of 2 wordings, picked on the items that score it: their mean is 0.500"
        in doubt
    )


def test_few_items_are_a_look_and_no_result() -> None:
    _, found = decided(outcome(Arm(), 3, 10), outcome(Arm(shots=4), 7, 10), items=10)
    assert (found.conclusion, found.chosen.name, found.items) == ("prompt", "zero-shot", 10)
    assert found.caveats[0].startswith("10 items are few: only a difference of about 0.")
    assert found.detectable_difference > 0.4
    assert not [line for line in decided(outcome(Arm(), 3))[1].caveats if "few" in line]


def test_one_training_a_size_is_told_and_shorter_prompts_would_change_it() -> None:
    shots = outcome(Arm(shots=8), 38, prompt_tokens=900, request_seconds=2.0)
    _, found = decided(
        outcome(Arm(), 2),
        shots,
        outcome(Arm(examples=100), 38, prompt_tokens=100, request_seconds=0.5),
    )
    assert found.chosen.name == "8 shots"
    assert "each size was trained once" in found.caveats[0]
    assert (
        "many requests: LoRA on 100 examples saves 800 prompt tokens and 1.50 s on each"
        in found.counterfactuals
    )
    worse = outcome(Arm(examples=100), 3, prompt_tokens=100, request_seconds=0.5)
    assert not any(
        "requests" in line for line in decided(outcome(Arm(), 2), shots, worse)[1].counterfactuals
    )
    _, found = decided(outcome(Arm(), 2), shots)
    assert "a training: none was tried" in found.counterfactuals


def test_a_metric_that_sees_only_the_form_does_not_decide() -> None:
    assert (
        choose_primary_metric(("json_valid", "schema_valid", "field_f1", "exact_match"))
        == "field_f1"
    )
    assert choose_primary_metric(("json_valid",)) == "json_valid"


def test_the_same_items_are_compared_whatever_their_order() -> None:
    one = outcome(Arm(), 20)
    turned = dataclasses.replace(one, arm=Arm(shots=2), answers=dict(reversed(one.answers.items())))
    _, found = decided(one, turned)
    assert found.chosen.name == "zero-shot"
