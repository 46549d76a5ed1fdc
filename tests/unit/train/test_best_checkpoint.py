"""The best look at held-out rows: answers first, then the loss, and never one that has forgotten
too much."""

from __future__ import annotations

from tunesmith.core.events import Score
from tunesmith.train.best_checkpoint import (
    EvalPoint,
    describe_choice,
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


def test_answers_that_differ_by_one_item_leave_it_to_the_loss() -> None:
    more, low = EvalPoint(10, 0.6, 0.80, 0.05), EvalPoint(20, 0.4, 0.76, 0.05)
    assert select_best([more, low], 1) is low


def test_without_answers_the_loss_decides_and_the_earlier_one_of_equals() -> None:
    looks = [EvalPoint(10, 0.5), EvalPoint(20, 0.4), EvalPoint(30, 0.4)]
    assert select_best(looks, 1) is looks[1]
    assert select_best([], 1) is None


def test_what_forgot_too_much_is_taken_only_if_everything_did() -> None:
    remaining, better = EvalPoint(10, 0.5, forgotten=0.01), EvalPoint(20, 0.4, forgotten=0.03)
    assert select_best([remaining, better], 0.02) is remaining
    assert select_best([better, EvalPoint(30, 0.45, forgotten=0.05)], 0.02) is better


def test_a_better_checkpoint_that_forgets_too_much_is_named() -> None:
    early = EvalPoint(7, 0.131, 0.5, 0.05, forgotten=0.017)
    late = EvalPoint(25, 0.0454, 0.75, 0.05, forgotten=0.0291)
    assert describe_choice(early, [early, late], 0.02) == (
        "answers 0.500, held-out loss 0.1310; step 25 has answers 0.750, held-out loss 0.0454, but "
        "general text had lost 0.029 bits per byte by then, more than the margin of 0.02"
    )
    assert describe_choice(late, [early, late], 0.03) == "answers 0.750, held-out loss 0.0454"
    assert describe_choice(late, [late], 0.02) == "answers 0.750, held-out loss 0.0454"
    within = EvalPoint(14, 0.5, 0.8, 0.1, 0.01)
    lower = EvalPoint(7, 0.4, 0.72, 0.1, 0.01)
    over = EvalPoint(21, 0.6, 0.89, 0.1, 0.03)
    points = [lower, within, over]
    assert select_best(points, 0.02) is lower
    assert select_best(points, 1) is within, "tied with the one that forgot too much"
    assert describe_choice(lower, points, 0.02) == "answers 0.720, held-out loss 0.4000"


def test_patience_counts_looks_after_the_best() -> None:
    looks = [EvalPoint(10, 0.4), EvalPoint(20, 0.5), EvalPoint(30, 0.6)]
    assert should_stop_early(looks, 1, 2)
    assert not should_stop_early(looks, 1, 3)
    assert not should_stop_early([], 1, 1)
