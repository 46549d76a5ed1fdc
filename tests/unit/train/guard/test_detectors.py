"""The guard folds numbers into verdicts: each detector speaks on what it is for, and on nothing
else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest

from fake_runs import PLAN
from plan_configs import make_config
from tunesmith.core.events import EXPECTED_TASK, PROBE_TASK, CheckResult, Score, TrainStep
from tunesmith.train.guard.detectors import DETECTORS, THRESHOLDS, TrainingGuard, select_worst

LEVELS = {"collapse": "rollback", "forgetting": "stop", "watch": "warn"}
HEALTHY = {
    "repetition": 0.02,
    "distinct": 0.8,
    "same_answer": 0.0,
    "end_rate": 0.25,
    "length": 28.0,
    "compressed": 0.9,
    "base_loss": 0.6,
    "foreign": 0.0,
    "language": 0.0,
    "json": 0.5,
    "breaks sorry": 0.0,
    "answer_loss": 1.2,
    "end_loss": 0.5,
    "entropy": 2.0,
    "kl": 0.0,
    "forgotten": 0.0,
    "adapter_share": 0.0,
    "update_ratio": 0.001,
}


def make_step(number: int, loss: float = 1.0, norm: float = 1.0) -> TrainStep:
    return TrainStep(number, loss, 100, 20, 0.5, 1e-4, norm, 10**9)


def make_guard(**levels: str) -> TrainingGuard:
    return TrainingGuard(
        {**LEVELS, **levels}, forgetting_margin=0.02, vocab_size=1000, is_probing=True
    )  # type: ignore[arg-type]


def run_probe(guard: TrainingGuard, at: int, **changed: float) -> list[CheckResult]:
    for metric, value in (HEALTHY | changed).items():
        guard.observe_event(Score(PROBE_TASK, metric, value, value, value, 8, at))
    return guard.judge_probe(at)


def start_guard(**levels: str) -> TrainingGuard:
    """A guard that has seen ten even steps and the probes before them."""
    guard = make_guard(**levels)
    for metric, value in {
        "distinct": 0.6,
        "same_answer": 0.1,
        "end_rate": 0.5,
        "length": 20.0,
    }.items():
        guard.observe_event(Score(EXPECTED_TASK, metric, value, value, value, 8, 0))
    assert run_probe(guard, 0) == []
    assert [guard.observe_event(make_step(n)) for n in range(1, 11)] == [[]] * 10
    return guard


@pytest.mark.parametrize(
    ("low", "value", "margin", "fires"),
    [
        (0.021, 0.05, 0.02, True),
        (0.02, 0.05, 0.02, False),  # the interval reaches the margin
        (0.019, 0.05, 0.02, False),
        (0.021, 0.05, 0.1, False),
        (0.001, 0.002, 0.0, True),
        (0.9, 1.0, math.inf, False),
    ],
)
def test_forgetting_is_what_exceeds_the_margin_of_the_plan(
    low: float, value: float, margin: float, fires: bool
) -> None:
    config = make_config(forgetting_margin=margin, guard_forgetting="stop")
    guard = TrainingGuard.from_plan(dataclasses.replace(PLAN, config=config), is_probing=True)
    run_probe(guard, 0)
    guard.observe_event(Score(PROBE_TASK, "forgotten", value, low, value + 0.1, 8, 4))
    kinds = [verdict.kind for verdict in guard.judge_probe(4)]
    assert kinds == (["forgetting"] if fires else [])


@pytest.mark.parametrize(
    ("detector", "changed"),
    [
        ("repetition", {"repetition": 0.4}),
        ("low distinct-2", {"distinct": 0.2}),
        ("identical answers", {"same_answer": 0.75}),
        ("short answers", {"length": 2.0}),
        ("repetition (zlib)", {"compressed": 0.2}),
        ("gibberish", {"base_loss": 3.0}),
        ("unexpected language", {"foreign": 0.5}),
        ("unexpected language", {"language": 0.75}),
        ("invalid JSON", {"json": -0.1}),
        ("constraint", {"breaks sorry": 0.5}),
        ("entropy collapse", {"entropy": 0.3}),
        ("entropy blow-up", {"entropy": 5.5}),
        ("high KL", {"kl": 1.5}),
        ("forgetting", {"forgotten": 0.05}),
        ("large update", {"update_ratio": 0.02}),
        ("adapter too large", {"adapter_share": 0.7}),
        ("EOS likelihood drop", {"answer_loss": 1.1, "end_loss": 2.0}),
    ],
)
def test_a_detector_speaks_once_on_its_measure_alone(
    detector: str, changed: dict[str, float]
) -> None:
    guard = start_guard()
    (verdict,) = run_probe(guard, 10, **changed)
    assert (verdict.kind, verdict.level) == (detector, LEVELS[DETECTORS[detector].family])
    assert any(sign.isdigit() for sign in verdict.evidence), "it shows its numbers"
    assert run_probe(guard, 20, **changed) == [], "it has spoken"
    assert run_probe(guard, 30) == []
    assert [item.kind for item in run_probe(guard, 40, **changed)] == [detector]


def test_the_commonest_answer_comes_first() -> None:
    """Of three classes one is said to all prompts while the right ones have become far likelier:
    that is learning."""
    alike = {"distinct": 0.2, "same_answer": 0.75}
    assert run_probe(start_guard(), 10, **alike, answer_loss=0.5) == []
    assert {item.kind for item in run_probe(start_guard(), 10, **alike, answer_loss=1.1)} == {
        "low distinct-2",
        "identical answers",
    }


def test_answers_that_stopped_ending() -> None:
    guard = make_guard()
    run_probe(guard, 0, end_rate=0.9)
    assert [item.kind for item in run_probe(guard, 10, end_rate=0.2)] == ["missing EOS"]
    assert run_probe(start_guard(), 10, end_rate=0.0) == [], "the base did not end either"


def feed_losses(losses: Sequence[float], norms: Sequence[float] = ()) -> dict[str, int]:
    """Detector -> the step that it first spoke at."""
    guard, actual = make_guard(), dict[str, int]()
    for number, loss in enumerate(losses, start=1):
        for verdict in guard.observe_event(
            make_step(number, loss, norms[number - 1] if norms else 1.0)
        ):
            actual.setdefault(verdict.kind, number)
    return actual


def test_losses_of_a_healthy_run_say_nothing() -> None:
    """Also noisy ones, whose gain is small."""
    falling = [2.0 * 0.95**n + 0.3 * (-1) ** n for n in range(60)]
    flat = [2.0 + 0.4 * math.sin(3 * n) for n in range(60)]
    assert feed_losses(falling) == feed_losses(flat) == feed_losses([1.0] * 60) == {}


def test_a_loss_that_rises_jumps_or_leaves_its_start_behind() -> None:
    falling = [2.0 - 0.1 * n for n in range(15)]
    assert "loss rise" in feed_losses([*falling, *([2.0] * 10)])
    assert feed_losses([*([1.0] * 20), 9.0])["loss spike"] == 21
    assert "loss above start" in feed_losses([*([2.0] * 6), *([9.0] * 10)])
    assert feed_losses([1.0] * 12, [*([1.0] * 11), 30.0]) == {"gradient spike": 12}


def test_rows_that_stay_hard_while_held_out_ones_are_learnt() -> None:
    guard = start_guard()
    assert run_probe(guard, 10, answer_loss=0.1) == [], "they were as hard at the probe before"
    for number in range(11, 21):
        guard.observe_event(make_step(number, 1.0 if number % 2 else 0.9))
    assert [item.kind for item in run_probe(guard, 20, answer_loss=0.1)] == [
        "train loss above eval loss"
    ]


def test_held_out_answers_that_get_worse_while_training_goes_on() -> None:
    guard = start_guard()
    run_probe(guard, 10, answer_loss=0.5)
    for number in range(11, 21):
        guard.observe_event(make_step(number, 0.4))
    guard.observe_event(Score(PROBE_TASK, "answer_loss", 0.8, 0.5, 1.1, 8, 20))
    assert guard.judge_probe(20) == [], "one hard prompt of eight"
    assert [item.kind for item in run_probe(guard, 30, answer_loss=0.8)] == ["overfitting"]


def test_what_a_family_does_is_the_recipes_word() -> None:
    assert [item.level for item in run_probe(start_guard(collapse="warn"), 10, kl=2.0)] == ["warn"]
    assert run_probe(start_guard(collapse="off", watch="off"), 10, kl=2.0, update_ratio=1.0) == []


def test_a_state_is_good_until_something_is_found_that_counts() -> None:
    guard = start_guard()
    run_probe(guard, 10)
    assert guard.last_good_step == 10
    run_probe(guard, 20, update_ratio=1.0)  # a warning only
    assert guard.last_good_step == 20
    run_probe(guard, 30, kl=2.0)
    assert (guard.last_good_step, guard.active_detectors) == (20, ["high KL"])


def test_a_stop_decides_before_a_rollback() -> None:
    back, end = CheckResult("a", "rollback", "1"), CheckResult("b", "stop", "2")
    assert select_worst([]) is None
    assert select_worst([CheckResult("c", "warn", "3"), back]) is back
    assert select_worst([back, end]) is end


def test_every_bound_belongs_to_a_detector() -> None:
    assert set(THRESHOLDS) - {"unexpected language: answers", "learning"} <= set(DETECTORS)
