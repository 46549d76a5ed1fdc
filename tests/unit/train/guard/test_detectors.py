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
from tunesmith.train.guard.detectors import DETECTORS, THRESHOLDS
from tunesmith.train.guard.training_guard import TrainingGuard, select_worst

LEVELS = {"collapse": "rollback", "forgetting": "stop", "watch": "warn"}
HEALTHY = {
    "repetition": 0.02,
    "distinct": 0.8,
    "same_answer": 0.0,
    "end_rate": 0.25,
    "length": 28.0,
    "base_loss": 0.6,
    "foreign": 0.0,
    "language": 0.0,
    "json": 0.5,
    "breaks sorry": 0.0,
    "answer_loss": 1.2,
    "answer_loss_rise": 0.0,
    "end_loss": 0.5,
    "entropy": 2.0,
    "kl": 0.0,
    "forgotten": 0.0,
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
        ("gibberish", {"base_loss": 3.0}),
        ("unexpected language", {"foreign": 0.5}),
        ("unexpected language", {"language": 0.75}),
        ("invalid JSON", {"json": -0.1}),
        ("constraint", {"breaks sorry": 0.5}),
        ("high KL", {"kl": 1.5}),
        ("forgetting", {"forgotten": 0.05}),
        ("large update", {"update_ratio": 0.02}),
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


@pytest.mark.parametrize(
    ("kl", "is_far"),
    [(1.09, False), (3.0, True), (4.8, True)],
    ids=["three times the rate, answers learned", "30 times the rate", "30 times the rate, json"],
)
def test_how_far_is_far_follows_from_the_text(kl: float, is_far: bool) -> None:
    """Measured runs of SmolLM2 (docs/results/guard.md)."""
    guard = make_guard()
    run_probe(guard, 0, entropy=3.27)
    fired = [verdict.kind for verdict in run_probe(guard, 10, kl=kl)]
    assert fired == (["high KL"] if is_far else [])


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
    shared = {"unexpected language: answers", "learning", "least rise"}
    assert set(THRESHOLDS) - shared <= set(DETECTORS)


LIMITS = [
    ("repetition", "repetition", 0.20, 1),
    ("distinct", "low distinct-2", 0.5 * 0.6, -1),
    ("same_answer", "identical answers", 0.1 + 0.5, 1),
    ("length", "short answers", 0.25 * 20, -1),
    ("base_loss", "gibberish", 1.2 + 1.5, 1),
    ("foreign", "unexpected language", 0.25, 1),
    ("language", "unexpected language", 0.5, 1),
    ("json", "invalid JSON", 0.0, -1),
    ("breaks sorry", "constraint", 0.25, 1),
    ("kl", "high KL", 0.6 * 2, 1),
    ("update_ratio", "large update", 0.01, 1),
    ("end_loss", "EOS likelihood drop", 0.5 + 1.0, 1),
]


@pytest.mark.parametrize(("metric", "detector", "limit", "sign"), LIMITS)
def test_a_detector_speaks_beyond_its_limit(
    metric: str, detector: str, limit: float, sign: int
) -> None:
    inside, beyond = ({metric: limit + sign * distance} for distance in (-1e-4, 1e-4))
    assert run_probe(start_guard(), 10, **inside) == []
    assert [verdict.kind for verdict in run_probe(start_guard(), 10, **beyond)] == [detector]


def start_from(expected: dict[str, float], base: dict[str, float]) -> TrainingGuard:
    guard = make_guard()
    for metric, value in expected.items():
        guard.observe_event(Score(EXPECTED_TASK, metric, value, value, value, 8, 0))
    assert run_probe(guard, 0, **base) == []
    return guard


@pytest.mark.parametrize(
    ("metric", "expected", "base", "limit", "sign"),
    [
        ("repetition", None, 0.10, 0.25, 1),
        ("end_rate", 0.8, 0.9, 0.3, -1),
        ("end_rate", 0.9, 0.7, 0.2, -1),
        ("end_rate", None, 0.9, 0.4, -1),
        ("distinct", None, 0.8, 0.4, -1),
        ("distinct", 0.9, 0.8, 0.4, -1),
        ("same_answer", None, 0.3, 0.8, 1),
        ("same_answer", 0.1, 0.3, 0.8, 1),
        ("length", None, 28.0, 7.0, -1),
        ("length", 40.0, 28.0, 7.0, -1),
        ("base_loss", None, 2.0, 3.5, 1),
    ],
)
def test_a_limit_follows_the_base_and_the_expected_answers(
    metric: str, expected: float | None, base: float, limit: float, sign: int
) -> None:
    for distance, count in ((-1e-4, 0), (1e-4, 1)):
        guard = start_from({} if expected is None else {metric: expected}, {metric: base})
        assert len(run_probe(guard, 10, **{metric: limit + sign * distance})) == count


@pytest.mark.parametrize(
    ("start", "low", "current", "fires"),
    [
        (1.0, 1.001, 1.1, True),
        (1.0, 0.999, 1.1, False),  # the interval reaches the limit
        (1.0, 5.0, 0.9, False),  # rows are learned by heart
        (4.0, 2.001, 4.1, True),
        (4.0, 1.999, 4.1, False),
    ],
)
def test_answers_are_unlearned_from_a_nat_and_half_of_the_start(
    start: float, low: float, current: float, fires: bool
) -> None:
    guard = make_guard()
    for number in range(1, 31):
        guard.observe_event(make_step(number, start if number < 6 else current))
    guard.observe_event(Score(PROBE_TASK, "answer_loss_rise", low + 1, low, low + 2, 8, 30))
    assert [v.kind for v in guard.judge_probe(30)] == ["answers unlearned"] * fires


def test_a_collapse_in_the_first_steps_is_detected_at_the_next_evaluation() -> None:
    """The losses of a real run at 3e-2: those of its start are high, and then they fall."""
    losses = [1.16, 1.12, 8.72, 15.3, 29.4, 25.6, 69.3, 33.8, 18.9, 20.3]
    guard = TrainingGuard(
        LEVELS,  # type: ignore[arg-type]
        forgetting_margin=math.inf,
        vocab_size=49152,
        is_probing=False,
    )
    guard.observe_event(Score(PROBE_TASK, "answer_loss_rise", 0.0, 0.0, 0.0, 8, 0))
    for number, loss in enumerate(losses[:8], start=1):
        assert guard.observe_event(make_step(number, loss)) == []
    # Without rows to evaluate: the average is above that of a uniform guess, ln 49152 = 10.8.
    (verdict,) = guard.observe_event(make_step(9, losses[8]))
    assert (verdict.kind, verdict.level) == ("loss above start", "rollback")
    assert guard.observe_event(make_step(10, losses[9])) == []
    guard.observe_event(Score(PROBE_TASK, "answer_loss_rise", 12.1, 11.0, 13.2, 8, 10))
    (verdict,) = guard.judge_probe(10)
    assert (verdict.kind, verdict.level) == ("answers unlearned", "rollback")
    assert "training loss 23.688, at first 1.160" in verdict.evidence


@pytest.mark.parametrize(("first", "fires"), [(6.0, True), (9.0, False)])
def test_a_loss_above_that_of_guessing_is_no_start(first: float, fires: bool) -> None:
    """1.2 x ln 1000 = 8.29, unless the model began above that."""
    losses = [first, *[8.0, 9.5] * 4]
    guard = make_guard()
    verdicts = [guard.observe_event(make_step(*pair)) for pair in enumerate(losses, start=1)]
    assert [one.kind for one in verdicts[-1]] == ["loss above start"] * fires


def test_json_is_compared_with_the_best_so_far() -> None:
    guard = start_guard()
    assert run_probe(guard, 10, json=1.0) == []
    assert run_probe(guard, 20, json=0.51) == []
    assert [verdict.kind for verdict in run_probe(guard, 30, json=0.49)] == ["invalid JSON"]


def test_learning_silences_from_half_the_loss_of_the_base() -> None:
    assert run_probe(start_guard(), 10, distinct=0.2, answer_loss=0.599) == []
    assert len(run_probe(start_guard(), 10, distinct=0.2, answer_loss=0.601)) == 1


def test_an_eos_drop_needs_answers_that_became_likelier() -> None:
    assert run_probe(start_guard(), 10, end_loss=2.0, answer_loss=1.201) == []
    assert len(run_probe(start_guard(), 10, end_loss=2.0, answer_loss=1.2)) == 1


@pytest.mark.parametrize(("low", "fires"), [(0.01, True), (-3.1, False)])
def test_one_prompt_of_eight_is_no_eos_drop(low: float, fires: bool) -> None:
    """A healthy run had 0.00 and then 2.31 nats."""
    guard = start_guard()
    run_probe(guard, 10, end_loss=0.0)
    for metric, value in HEALTHY.items():
        if metric != "end_loss":
            guard.observe_event(Score(PROBE_TASK, metric, value, value, value, 8, 20))
    guard.observe_event(Score(PROBE_TASK, "end_loss", 2.31, low, 4.62 - low, 8, 20))
    assert [one.kind for one in guard.judge_probe(20)] == ["EOS likelihood drop"] * fires


@pytest.mark.parametrize(
    ("count", "jump", "fires"), [(8, 2.01, True), (7, 9.0, False), (8, 2.0, False)]
)
def test_a_spike_is_twice_the_median_of_eight_steps(count: int, jump: float, fires: bool) -> None:
    assert ("loss spike" in feed_losses([*[1.0] * count, jump])) == fires


@pytest.mark.parametrize(
    ("low", "high", "kinds"),
    [
        (0.009, 0.079, set()),  # seen in a run that had learned all its answers
        (0.009, 0.249, set()),
        (0.009, 0.26, {"loss spike", "gradient spike"}),
        (0.2, 0.44, {"gradient spike"}),
    ],
)
def test_a_rise_near_zero_is_judged_in_nats(low: float, high: float, kinds: set[str]) -> None:
    fired = feed_losses([*[low] * 50, high], [*[1.0] * 50, 30.0])
    assert fired.keys() == kinds
    slow = feed_losses([*[low] * 20, *[high] * 30])  # a run that goes on from a trained adapter
    assert ("loss above start" in slow) == ("loss spike" in kinds)


def test_a_spike_is_eight_robust_deviations_above_the_median() -> None:
    noisy = [0.9, 1.1] * 6  # median 1, robust standard deviation 0.14826
    limit = 1 + 8 * 0.14826
    assert "loss spike" not in feed_losses([*noisy, limit - 0.01])
    assert feed_losses([*noisy, limit + 0.01])["loss spike"] == 13


@pytest.mark.parametrize(
    ("count", "norm", "fires"), [(8, 10.1, True), (7, 99.0, False), (8, 10.0, False)]
)
def test_a_gradient_spike_is_ten_medians(count: int, norm: float, fires: bool) -> None:
    fired = feed_losses([1.0] * (count + 1), [*[1.0] * count, norm])
    assert fired == ({"gradient spike": count + 1} if fires else {})


@pytest.mark.parametrize(
    ("held_out", "loss", "fires"),
    [
        (0.7, 1.39, False),
        (0.7, 1.41, True),
        (0.3, 0.79, False),
        (0.3, 0.81, True),
        (0.25, 0.75, False),
        (0.75, 1.5, False),
    ],
)
def test_rows_stay_hard_at_half_a_nat_and_twice_the_held_out_loss(
    held_out: float, loss: float, fires: bool
) -> None:
    guard = start_guard()
    assert run_probe(guard, 10, answer_loss=held_out) == []
    for number in range(11, 41):
        guard.observe_event(make_step(number, loss))
    kinds = [verdict.kind for verdict in run_probe(guard, 40, answer_loss=held_out)]
    assert kinds == (["train loss above eval loss"] if fires else [])


@pytest.mark.parametrize(("low", "fires"), [(0.624, False), (0.626, True)])
def test_overfitting_is_a_quarter_over_the_lowest_held_out_loss(low: float, fires: bool) -> None:
    guard = start_guard()
    assert run_probe(guard, 10, answer_loss=0.5) == []
    for number in range(11, 21):
        guard.observe_event(make_step(number, 0.9))
    guard.observe_event(Score(PROBE_TASK, "answer_loss", 0.8, low, 1.1, 8, 20))
    kinds = [verdict.kind for verdict in guard.judge_probe(20)]
    assert kinds == (["overfitting"] if fires else [])


def test_overfitting_is_judged_from_the_step_of_the_lowest_held_out_loss() -> None:
    """The training loss had fallen before it, and has risen since."""
    guard = make_guard()
    run_probe(guard, 0)
    for number in range(1, 31):
        guard.observe_event(make_step(number, 2.0 if number <= 10 else 0.5))
    run_probe(guard, 30, answer_loss=0.5)
    for number in range(31, 61):
        guard.observe_event(make_step(number, 0.6))
    run_probe(guard, 60, answer_loss=0.5)
    assert "overfitting" not in [item.kind for item in run_probe(guard, 61, answer_loss=0.9)]


def test_a_loss_average_speaks_after_eight_steps() -> None:
    """Each loss is 2 over the average before it: no noise, and an average well above the start."""
    losses = [1.0, 3.0, 4.0, 4.667, 5.167, 5.567, 5.93, 6.294, 6.657]
    assert feed_losses(losses[:8]) == {}
    assert feed_losses(losses) == {"loss rise": 9, "loss above start": 9}
    small = [loss / 3 for loss in losses]
    assert feed_losses(small) == {"loss rise": 9, "loss above start": 9}


def test_evidence_shows_the_numbers() -> None:
    guard = start_guard()
    (drop,) = run_probe(guard, 10, end_loss=2.0)
    assert drop.evidence.endswith("0.50 -> 2.00 nats")
    run_probe(guard, 20, end_loss=0.25)
    (drop,) = run_probe(guard, 30, end_loss=1.75)
    assert drop.evidence.endswith("0.25 -> 1.75 nats")


def test_overfitting_needs_a_training_loss_that_falls_and_three_probes() -> None:
    guard = start_guard()
    assert run_probe(guard, 10, answer_loss=0.5) == []
    for number in range(11, 21):
        guard.observe_event(make_step(number, 1.0))
    assert run_probe(guard, 20, answer_loss=0.8) == []
    guard = start_guard()
    for number in range(11, 21):
        guard.observe_event(make_step(number, 0.9))
    assert run_probe(guard, 20, answer_loss=1.6) == []  # of two probes


# ---------------------------------------------------------------- what is good


def test_a_step_is_good_where_nothing_severe_fires() -> None:
    guard = start_guard(forgetting="warn")
    assert guard.last_good_step == 0
    assert run_probe(guard, 10, forgotten=0.05)[0].level == "warn"
    assert guard.last_good_step == 10  # a warning only reports
    run_probe(guard, 20, repetition=0.5)
    assert (guard.last_good_step, guard.active_detectors) == (10, ["repetition", "forgetting"][:1])
    run_probe(guard, 30, repetition=0.5, forgotten=0.05)
    assert set(guard.active_detectors) == {"repetition", "forgetting"}
    run_probe(guard, 40)
    assert (guard.last_good_step, guard.active_detectors) == (40, [])


def test_without_probes_every_step_may_be_good() -> None:
    guard = TrainingGuard(LEVELS, forgetting_margin=0.02, vocab_size=9, is_probing=False)  # type: ignore[arg-type]
    assert guard.safe_step == 0
    for number in range(1, 12):
        guard.observe_event(make_step(number))
        assert guard.last_good_step == number
    guard.observe_event(make_step(12, norm=99.0))
    assert guard.last_good_step == 12  # a warning only reports
    assert guard.observe_event(make_step(13, 99.0))
    assert guard.last_good_step < 12
    assert guard.observe_event(dataclasses.replace(make_step(13, 99.0), supervised_tokens=0)) == []


@pytest.mark.parametrize(
    ("collapse", "forgetting", "watch"),
    [("off", "off", "off"), ("off", "warn", "warn"), ("rollback", "off", "warn")],
)
def test_watching_is_off_where_all_is(collapse: str, forgetting: str, watch: str) -> None:
    config = make_config(guard_collapse=collapse, guard_forgetting=forgetting)
    plan = dataclasses.replace(PLAN, config=config)
    guard = TrainingGuard.from_plan(plan, is_probing=True)
    assert guard.levels == {"collapse": collapse, "forgetting": forgetting, "watch": watch}
    assert guard.history.vocab_size == PLAN.model.vocab_size
    run_probe(guard, 0)
    fired = run_probe(guard, 10, repetition=0.9, forgotten=0.9, update_ratio=0.9)
    off = {"collapse": collapse, "forgetting": forgetting, "watch": watch}
    assert {DETECTORS[verdict.kind].family for verdict in fired} == {
        family for family, level in off.items() if level != "off"
    }
