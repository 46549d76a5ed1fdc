"""The best evaluation: answers first, then the loss, and within the forgetting margin unless one
beyond it is twice as good."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.core.events import Score
from tunesmith.plan.guard import count_affordable_answers
from tunesmith.train.best_checkpoint import (
    EvalPoint,
    describe_choice,
    is_twice_as_good,
    select_best,
    should_stop_early,
)


def make_score(task: str, metric: str, value: float, n: int = 10) -> Score:
    return Score(task, metric, value, value, value, n, 4)


def test_a_look_is_made_of_what_eval_data_scored() -> None:
    scores = [
        make_score("eval", "loss", 0.5, 60),
        make_score("eval", "json_valid", 0.8),
        make_score("eval", "field_f1", 0.6),
        make_score("test", "loss", 9.0),
        make_score("probes", "forgotten", 0.01),
        make_score("probes", "kl", 3.0),
    ]
    assert EvalPoint.from_scores(4, scores, ("json_valid", "field_f1")) == EvalPoint(
        4, 0.5, 0.7, 0.1, 0.01
    )
    assert EvalPoint.from_scores(4, scores[3:], ("json_valid",)) is None
    tasks = [
        make_score("eval: a", "loss", 1.0),
        make_score("eval: b", "loss", 3.0),
        make_score("eval: mean of tasks", "loss", 2.5),
    ]
    assert EvalPoint.from_scores(4, tasks, ()) == EvalPoint(4, 2.5)
    assert EvalPoint.from_scores(4, tasks[:2], ()) == EvalPoint(4, 2.0)


def test_better_answers_win_over_a_lower_loss() -> None:
    good, low = EvalPoint(10, 0.6, 0.9, 0.05), EvalPoint(20, 0.4, 0.5, 0.05)
    assert select_best([good, low], 1) is good


@pytest.mark.parametrize(("lost", "is_shown"), [(0, False), (4, False), (5, True)])
def test_the_later_of_two_is_taken_unless_it_is_shown_to_be_worse(
    lost: int, is_shown: bool
) -> None:
    """Five items of one sign are p = 1/32; the stranger's run had 15, then 14 of 16 right."""
    first = EvalPoint(32, 0.4, 15 / 16, 1 / 16)
    second = EvalPoint(96, 0.6, (15 - lost) / 16, 1 / 16)
    assert (select_best([first, second], 1) is first) == is_shown


def test_without_a_right_answer_the_loss_decides() -> None:
    points = [EvalPoint(10, 0.4, 0.0, 0.05), EvalPoint(20, 0.6, 0.0, 0.05)]
    assert select_best(points, 1) is points[0]


def test_without_answers_the_loss_decides_and_the_earlier_one_of_equals() -> None:
    looks = [EvalPoint(10, 0.5), EvalPoint(20, 0.4), EvalPoint(30, 0.4)]
    assert select_best(looks, 1) is looks[1]
    assert select_best([], 1) is None


def test_what_forgot_too_much_is_not_taken() -> None:
    remaining, better = EvalPoint(10, 0.5, forgotten=0.01), EvalPoint(20, 0.4, forgotten=0.03)
    assert select_best([remaining, better], 0.02) is remaining
    assert select_best([better, remaining], 0.02) is remaining


def test_what_forgot_too_much_is_taken_if_everything_did() -> None:
    better, worse = EvalPoint(20, 0.4, forgotten=0.03), EvalPoint(30, 0.45, forgotten=0.05)
    assert select_best([better, worse], 0.02) is better


@pytest.mark.parametrize(
    ("metric", "loss", "is_taken"),
    [
        (0.80, 0.6, True),  # twice the answers
        (0.79, 0.6, False),
        (0.40, 0.3, True),  # half the loss
        (0.40, 0.31, False),
        (0.39, 0.1, False),  # half the loss, but worse answers
    ],
)
def test_what_forgot_too_much_is_taken_if_it_is_twice_as_good(
    metric: float, loss: float, is_taken: bool
) -> None:
    kept = EvalPoint(10, 0.6, 0.4, 0.05, forgotten=0.019)
    costly = EvalPoint(20, loss, metric, 0.05, forgotten=0.021)
    assert (select_best([kept, costly], 0.02) is costly) == is_taken
    assert (select_best([costly, kept], 0.02) is costly) == is_taken


def test_one_right_answer_is_not_twice_as_good_as_none() -> None:
    kept = EvalPoint(10, 0.6, 0.0, 0.05, forgotten=0.01)
    assert select_best([kept, EvalPoint(20, 0.5, 0.05, 0.05, forgotten=0.03)], 0.02) is kept
    two = EvalPoint(20, 0.5, 0.1, 0.05, forgotten=0.03)
    assert select_best([kept, two], 0.02) is two


def test_the_best_is_the_newest_or_was_the_best_before() -> None:
    """A checkpoint that was not the best when it was measured has not been kept."""
    rng = random.Random(0)
    for _ in range(2000):
        points: list[EvalPoint] = []
        previous = None
        for step in range(8):
            forgotten = rng.choice([None, 0.01, 0.03])
            point = EvalPoint(step, rng.random(), rng.randint(0, 6) / 6, 1 / 6, forgotten)
            points.append(point)
            best = select_best(points, 0.02)
            assert best in (previous, point)
            previous = best


def test_the_choice_is_no_cycle() -> None:
    """One within the margin is not taken for being nearly as good as one beyond it, if another
    within it is better."""
    first = EvalPoint(10, 0.60, 0.40, 0.01, forgotten=0.01)
    over = EvalPoint(20, 0.30, 0.42, 0.01, forgotten=0.03)
    worse = EvalPoint(30, 0.59, 0.22, 0.01, forgotten=0.01)
    assert select_best([first, over, worse], 0.02) is over
    over = EvalPoint(20, 0.50, 0.80, 0.01, forgotten=0.03)
    tied = EvalPoint(30, 0.45, 0.76, 0.01, forgotten=0.03)  # not twice as good as the first
    assert select_best([first, over, tied], 0.02) is over


def test_in_random_runs_what_is_beyond_the_margin_is_twice_as_good() -> None:
    """And what is within it is the best there, or tied with it."""
    rng = random.Random(1)
    for _ in range(2000):
        points = [
            EvalPoint(step, rng.random(), rng.randint(0, 6) / 6, 1 / 6, rng.choice([0.01, 0.03]))
            for step in range(6)
        ]
        best = select_best(points, 0.02)
        assert best is not None
        within = [point for point in points if point.is_within(0.02)]
        if best.is_within(0.02):
            assert best.metric >= max(point.metric for point in within) - 4.5 * best.item_weight
        else:
            earlier = select_best([point for point in within if point.step < best.step], 0.02)
            assert earlier is None or is_twice_as_good(best, earlier)


def test_loss_that_falls_step_by_step_does_not_pull_answers_down() -> None:
    points = [EvalPoint(step, 1 - step / 20, 0.9 - step * 0.05, 0.05) for step in range(10)]
    best = select_best(points, 1)
    assert best is points[4], "then five items of twenty are lost"


def test_a_better_checkpoint_that_forgets_too_much_is_named() -> None:
    early = EvalPoint(7, 0.131, 0.5, 0.05, forgotten=0.017)
    late = EvalPoint(25, 0.0754, 0.75, 0.05, forgotten=0.0291)
    assert select_best([early, late], 0.02) is early
    assert describe_choice(early, [early, late], 0.02) == (
        "answers 0.500 of 20 items, held-out loss 0.1310; step 25 has answers 0.750 of 20 items, "
        "held-out loss 0.0754, but general text had lost 0.029 bits per byte by then, "
        "more than the margin of 0.02"
    )
    assert (
        describe_choice(late, [early, late], 0.03)
        == "answers 0.750 of 20 items, held-out loss 0.0754"
    )
    assert describe_choice(late, [late], 0.02) == (
        "answers 0.750 of 20 items, held-out loss 0.0754; general text had lost 0.029 bits per "
        "byte by then, more than the margin of 0.02"
    )
    better = EvalPoint(25, 0.0454, 0.75, 0.05, forgotten=0.0291)
    assert select_best([early, better], 0.02) is better
    assert describe_choice(better, [early, better], 0.02) == (
        "answers 0.750 of 20 items, held-out loss 0.0454; general text had lost 0.029 bits per "
        "byte by then, more than the margin of 0.02, but step 7, the best within it, has answers "
        "0.500 of 20 items, held-out loss 0.1310"
    )


def test_no_other_checkpoint_is_named_if_those_that_forget_too_much_are_no_better() -> None:
    best = EvalPoint(7, 0.4, 0.72, 0.1, 0.01)
    worse = EvalPoint(14, 0.6, 0.2, 0.1, 0.03)
    assert select_best([best, worse], 0.02) is best
    assert (
        describe_choice(best, [best, worse], 0.02)
        == "answers 0.720 of 10 items, held-out loss 0.4000"
    )


def test_patience_counts_looks_after_the_best() -> None:
    looks = [EvalPoint(10, 0.4), EvalPoint(20, 0.5), EvalPoint(30, 0.6)]
    assert should_stop_early(looks, 1, 2)
    assert not should_stop_early(looks, 1, 3)
    assert not should_stop_early([], 1, 1)


@pytest.mark.parametrize(
    ("answer_tokens", "count"), [(2, 80), (8, 51), (200, 16)], ids=["label", "fields", "free text"]
)
def test_as_many_answers_as_a_share_of_the_time_allows(answer_tokens: int, count: int) -> None:
    """336 rows of about 100 tokens in 126 steps of 8, evaluated every 32: 15% are 11,520 tokens."""
    config = SimpleNamespace(batch_size=8, eval_steps=32)
    machine = SimpleNamespace(device="cpu")
    report = SimpleNamespace(tokens=33_600, rows=336)
    plan: Any = SimpleNamespace(data={"data": report}, config=config, steps=126, machine=machine)
    assert count_affordable_answers(plan, [(90, answer_tokens)] * 80, 16) == count
