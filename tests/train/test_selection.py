"""The best look at held-out rows: answers first, then the loss, and never one that has forgotten too much."""

from __future__ import annotations

from tunesmith.core.events import Score
from tunesmith.train.best_checkpoint import Look, best_of, exhausted


def scored(task: str, metric: str, value: float, n: int = 10) -> Score:
    return Score(task, metric, value, value, value, n, 4)


def test_a_look_is_made_of_what_eval_data_scored() -> None:
    scores = [
        scored("eval", "loss", 0.5, 60), scored("eval", "json_valid", 0.8), scored("eval", "field_f1", 0.6),
        scored("test", "loss", 9.0), scored("probes", "forgotten", 0.01), scored("probes", "kl", 3.0),
    ]  # fmt: skip
    assert Look.of(4, scores, ("json_valid", "field_f1")) == Look(4, 0.5, 0.7, 0.1, 0.01)
    assert Look.of(4, scores[3:], ("json_valid",)) is None
    tasks = [scored("eval: a", "loss", 1.0), scored("eval: b", "loss", 3.0), scored("eval: mean of tasks", "loss", 2.5)]
    assert Look.of(4, tasks, ()) == Look(4, 2.5)
    assert Look.of(4, tasks[:2], ()) == Look(4, 2.0)


def test_better_answers_win_over_a_lower_loss() -> None:
    good, low = Look(10, 0.6, 0.9, 0.05), Look(20, 0.4, 0.5, 0.05)
    assert best_of([good, low], 1) is good


def test_answers_that_differ_by_one_item_leave_it_to_the_loss() -> None:
    more, low = Look(10, 0.6, 0.80, 0.05), Look(20, 0.4, 0.76, 0.05)
    assert best_of([more, low], 1) is low


def test_without_answers_the_loss_decides_and_the_earlier_one_of_equals() -> None:
    looks = [Look(10, 0.5), Look(20, 0.4), Look(30, 0.4)]
    assert best_of(looks, 1) is looks[1]
    assert best_of([], 1) is None


def test_what_forgot_too_much_is_taken_only_if_everything_did() -> None:
    kept, better = Look(10, 0.5, forgotten=0.01), Look(20, 0.4, forgotten=0.03)
    assert best_of([kept, better], 0.02) is kept
    assert best_of([better, Look(30, 0.45, forgotten=0.05)], 0.02) is better


def test_patience_counts_looks_after_the_best() -> None:
    looks = [Look(10, 0.4), Look(20, 0.5), Look(30, 0.6)]
    assert exhausted(looks, 1, 2)
    assert not exhausted(looks, 1, 3)
    assert not exhausted([], 1, 1)
