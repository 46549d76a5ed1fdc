"""A canary: rolled back at harm, rarely without, however often one looks; bad answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tunesmith.recipe.fields import Constraint
from tunesmith.serve.routes import (
    Canary,
    CheckedAnswer,
    CheckRules,
    Tally,
    bound_difference,
    check_answer,
)
from tunesmith.serve.settings import CanarySettings


def make_canary() -> Canary:
    canary = Canary(CanarySettings(model="new"))
    canary.follow_versions("new#1", "old#1")
    return canary


def answer_until_judged(canary: Canary, canary_rate: float, stable_rate: float) -> bool:
    """Send 6,000 requests by the canary's share, or until it is rolled back."""
    rng = np.random.default_rng(0)
    for _ in range(6000):
        is_canary = bool(rng.random() < canary.share / 100)
        rate = canary_rate if is_canary else stable_rate
        canary.add_answer(bool(rng.random() < rate), is_canary=is_canary)
        if canary.judge():
            return True
    return False


def test_a_bad_canary_is_rolled_back_and_says_why() -> None:
    canary = make_canary()
    assert answer_until_judged(canary, 0.5, 0.03)
    assert canary.share == 0
    assert canary.canary.count < 100
    assert canary.reason.startswith("[+")
    assert canary.reason.endswith("margin 5")
    assert not canary.judge()  # nothing follows
    canary.start()
    assert canary.share == 5
    assert canary.compute_harm() is None


def test_a_good_canary_stays_and_its_harm_is_excluded() -> None:
    canary = make_canary()
    assert not answer_until_judged(canary, 0.03, 0.03)
    for number in range(3000):
        canary.add_answer(number % 30 == 0, is_canary=True)
        assert not canary.judge()
    harm = canary.compute_harm()
    assert harm is not None
    assert harm[1] < 0.05


def test_other_weights_are_another_canary() -> None:
    canary = make_canary()
    assert answer_until_judged(canary, 0.9, 0)
    canary.follow_versions("new#1", "old#1")
    assert canary.share == 0
    canary.follow_versions("new#1", "old#2")
    assert canary.share == 0
    assert canary.canary.count == 0
    canary.follow_versions("new#2", "old#2")
    assert canary.share == 5
    assert not canary.is_counted("new#1")


def test_a_user_who_keeps_a_model_counts_once() -> None:
    canary = make_canary()
    for _ in range(500):  # one user alone is no reason to roll back
        canary.add_answer(True, is_canary=True, user="ada")
    for number in range(500):
        canary.add_answer(False, is_canary=False, user=str(number))
    assert (canary.canary.count, canary.stable.count) == (1, 500)
    assert not canary.judge()


NEVER = Constraint(match="[0-9]+")
SCHEMA = {"type": "object", "required": ["a"]}


@pytest.mark.parametrize(
    ("answer", "rules", "bad"),
    [
        (CheckedAnswer("x", range(9), "end"), CheckRules(), set()),
        (CheckedAnswer("x", range(9), "stop"), CheckRules(), set()),
        (CheckedAnswer("x", range(9), "length"), CheckRules(), {"cut"}),
        (CheckedAnswer("x", [1, 2] * 20, "end"), CheckRules(), {"looped"}),
        (CheckedAnswer('{"a": 1}', range(9), "end"), CheckRules(SCHEMA), set()),
        (CheckedAnswer('{"b": 1}', range(9), "end"), CheckRules(SCHEMA), {"schema_invalid"}),
        (CheckedAnswer("{", range(9), "end"), CheckRules(SCHEMA), {"schema_invalid"}),
        (CheckedAnswer("call 555", range(9), "end"), CheckRules(None, (NEVER,)), {"violated"}),
        (CheckedAnswer("call me", range(9), "end"), CheckRules(None, (NEVER,)), set()),
        (CheckedAnswer("{", range(9), "stop", True), CheckRules(), {"schema_invalid"}),
        (CheckedAnswer('{"b": 1}', range(9), "end", True), CheckRules(SCHEMA), set()),
    ],
)
def test_checks_of_an_answer(answer: CheckedAnswer, rules: CheckRules, bad: set[str]) -> None:
    checks = check_answer(answer, rules)
    assert {check for check, is_bad in checks.items() if is_bad} == bad
    assert ("schema_invalid" in checks) == (answer.has_grammar or rules.schema is not None)


# ---------------------------------------------------------------- simulated

RUNS = 400
FIRST = 30  # looks, after every answer of the canary from here on


def count_bad(rate: float, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Any, Any]:
    """Return how many, and how many bad ones, after each of many answers; rows are runs."""
    bad = np.cumsum(rng.random(shape) < rate, axis=-1)
    return np.arange(1, shape[-1] + 1), bad


def simulate_harm(canary_rate: float, stable_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (low, high) at each look, with nine stable answers for each of the canary's."""
    rng = np.random.default_rng(5)
    canary = count_bad(canary_rate, (RUNS, 1000), rng)
    stable = count_bad(stable_rate, (RUNS, 9000), rng)
    at_look = slice(8, None, 9)
    stable_at_look = [np.asarray(counts)[..., at_look] for counts in stable]
    low, high = bound_difference(Tally(*canary), Tally(*stable_at_look))
    return low[..., FIRST - 1 :], high[..., FIRST - 1 :]


@pytest.mark.parametrize(("rate", "margin"), [(0.03, 0.0), (0.2, 0.0), (0.15, 0.05)])
def test_a_model_within_its_margin_is_rarely_rolled_back(rate: float, margin: float) -> None:
    low, high = simulate_harm(rate, rate - margin)
    assert (low > margin).any(axis=1).mean() <= 0.01  # 0 of 400 runs
    assert (high < margin).any(axis=1).mean() <= 0.01


@pytest.mark.parametrize(
    ("canary_rate", "stable_rate", "median"),
    [(0.30, 0.03, 80), (0.20, 0.03, 200), (0.30, 0.10, 200)],
)
def test_a_worse_model_is_rolled_back_soon(
    canary_rate: float, stable_rate: float, median: int
) -> None:
    low, _ = simulate_harm(canary_rate, stable_rate)
    is_shown = low > 0.05
    assert is_shown.any(axis=1).mean() >= 0.95
    shown_at = np.where(is_shown.any(axis=1), is_shown.argmax(axis=1) + FIRST, 1000)
    assert np.median(shown_at) <= median


def test_looking_often_at_an_interval_for_one_look_rolls_back_good_models() -> None:
    """The contrast: why the bound has to be valid at every look."""
    rng = np.random.default_rng(6)
    count, canary = count_bad(0.2, (RUNS, 600), rng)
    _, stable = count_bad(0.2, (RUNS, 600), rng)
    error = np.sqrt(2 * 0.2 * 0.8 / count)
    is_shown = ((canary - stable) / count > 1.645 * error)[:, FIRST - 1 :]
    assert is_shown.any(axis=1).mean() > 0.15
