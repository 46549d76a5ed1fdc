"""A canary: rolled back at harm, promoted without, and rarely wrong however often one looks."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.serve.canary import (
    Canary,
    CanaryState,
    CheckTallies,
    Tally,
    bound_difference,
    bound_harm,
)
from tunesmith.serve.route_settings import CanarySettings, CheckMargins

CUT_ONLY = CheckMargins(cut=0.05, looped=None, failed=None)


def make_canary(*, has_pairs: bool = False, **settings: object) -> Canary:
    values = {"model": "new", "watch": CUT_ONLY, **settings}
    checked = CanarySettings.model_validate(values)
    return Canary(checked, CanaryState("new#1", "old#1"), has_pairs=has_pairs)


def answer_until_judged(
    canary: Canary, canary_rate: float, stable_rate: float, rng: np.random.Generator, limit: int
) -> str:
    """Send requests by the canary's share until an event, at most `limit` of them."""
    for _ in range(limit):
        is_canary = bool(rng.random() < canary.share / 100)
        rate = canary_rate if is_canary else stable_rate
        canary.add_answer({"cut": bool(rng.random() < rate)}, is_canary=is_canary)
        if event := canary.judge():
            return event
    return ""


def test_a_bad_canary_is_rolled_back_and_says_why() -> None:
    canary = make_canary()
    rng = np.random.default_rng(0)
    assert answer_until_judged(canary, 0.5, 0.03, rng, 6000) == "rolled_back"
    assert canary.share == 0
    assert canary.state.step == 0
    assert canary.state.num_answers < 100
    assert canary.state.reason.startswith("cut: [+")
    assert canary.judge() == ""  # nothing follows


def test_a_good_canary_takes_every_step_to_the_end() -> None:
    canary = make_canary(steps=(20, 50, 100))
    rng = np.random.default_rng(1)
    assert answer_until_judged(canary, 0.03, 0.03, rng, 20_000) == "next_step"
    assert canary.share == 50
    assert canary.state.num_answers == 0  # the step counts anew
    assert answer_until_judged(canary, 0.03, 0.03, rng, 20_000) == "promoted"
    assert canary.share == 100


def test_a_step_needs_answers_and_every_check() -> None:
    canary = make_canary(at_least=3000)
    rng = np.random.default_rng(2)
    answer_until_judged(canary, 0.0, 0.0, rng, 30_000)
    assert canary.state.step == 0
    two = CheckMargins(cut=0.05, looped=None, failed=None, thumbs_down=0.1)
    canary = make_canary(watch=two)
    assert answer_until_judged(canary, 0.0, 0.0, rng, 20_000) == ""  # nobody gives feedback
    assert canary.list_harms()[1].describe() == "thumbs_down: fewer than 30 answers of a side"
    for _ in range(400):
        canary.add_verdict("thumbs_down", False, is_canary=True)
        canary.add_verdict("thumbs_down", False, is_canary=False)
    assert canary.judge() == "next_step"


def test_few_good_answers_exclude_no_harm() -> None:
    canary = make_canary(at_least=30)
    for number in range(600):
        canary.add_answer({"cut": False}, is_canary=number < 100)
    (harm,) = canary.list_harms()
    assert harm.high is not None
    assert harm.high > 0.05
    assert canary.judge() == ""


def test_of_two_ways_to_compare_the_narrower_end_counts() -> None:
    unpaired = CheckTallies(Tally(200, 20, 20), Tally(900, 30, 30))
    pairs = Tally(100, 2, 6)
    ends = [float(end) for end in bound_difference(unpaired.canary, unpaired.stable, 0.01)]
    assert bound_harm(unpaired, 0.01) == tuple(ends)
    pair_ends = [float(end) for end in pairs.bound_mean((-1, 1), 0.01)]
    assert bound_harm(CheckTallies(pairs=pairs), 0.01) == tuple(pair_ends)
    both = CheckTallies(unpaired.canary, unpaired.stable, pairs)
    expected = (max(ends[0], pair_ends[0]), min(ends[1], pair_ends[1]))
    assert bound_harm(both, 0.01) == expected
    too_few = CheckTallies(Tally(29, 29, 29), Tally(900), Tally(29, 29, 29))
    assert bound_harm(too_few, 0.01) == (None, None)


def test_pairs_count_where_no_client_sees_the_canary() -> None:
    canary = make_canary(has_pairs=True, steps=(0, 100))
    for number in range(400):
        is_bad = number % 3 == 0  # the same requests are hard for both
        canary.add_pair({"cut": is_bad}, {"cut": is_bad})
        if event := canary.judge():
            break
    assert event == "promoted"
    worse = make_canary(has_pairs=True, steps=(0, 100))
    for number in range(400):
        worse.add_pair({"cut": number % 3 == 0}, {"cut": False})
        if event := worse.judge():
            break
    assert event == "rolled_back"
    assert worse.state.num_answers < 120


def test_other_weights_are_another_canary() -> None:
    canary = make_canary()
    assert answer_until_judged(canary, 0.9, 0, np.random.default_rng(3), 6000) == "rolled_back"
    assert canary.follow_versions("new#1", "old#1") == ""
    assert canary.follow_versions("new#1", "old#2") == "restarted"
    assert canary.state.status == "rolled_back"
    assert not canary.state.tallies
    assert canary.follow_versions("new#2", "old#2") == "started"
    assert canary.share == 5


def test_a_user_who_keeps_a_model_counts_once_in_a_step() -> None:
    canary = make_canary()
    for _ in range(500):  # one user alone is no reason to roll back
        canary.add_answer({"cut": True}, is_canary=True, user="ada")
        canary.add_verdict("thumbs_down", True, is_canary=True, user="ada")
    for number in range(500):
        canary.add_answer({"cut": False}, is_canary=False, user=str(number))
    assert canary.state.num_answers == 1
    assert canary.state.tallies["thumbs_down"].canary.count == 1
    assert canary.state.tallies["cut"].stable.count == 500
    assert canary.judge() == ""
    canary.start("ada")
    canary.add_answer({"cut": True}, is_canary=True, user="ada")
    assert canary.state.num_answers == 1


def test_an_admin_decides_otherwise() -> None:
    canary = make_canary()
    assert canary.promote("ada") == "promoted"
    assert canary.share == 100
    assert canary.roll_back("ada") == "rolled_back"
    assert canary.share == 0
    assert canary.start("ada") == "started"
    assert canary.share == 5


# ---------------------------------------------------------------- simulated

RUNS = 400
FIRST = 30  # looks, after every answer of the canary from here on
DEFAULT = CanarySettings(model="new")
NUM_COMPARISONS = 9  # three checks in three steps
ALPHA = Canary(DEFAULT, CanaryState("new#1", "old#1"), has_pairs=False).alpha


def count_bad(rate: float, shape: tuple[int, ...], rng: np.random.Generator) -> Tally:
    """Return the tally after each of many answers; axes before the last are runs."""
    bad = np.cumsum(rng.random(shape) < rate, axis=-1)
    return Tally(np.arange(1, shape[-1] + 1), bad, bad)


def simulate_harm(
    canary_rate: float, stable_rate: float, num_answers: int, *shape: int, stable_factor: int = 9
) -> tuple[np.ndarray, np.ndarray]:
    """Return (low, high) at each look, with so many stable answers for each of the canary's."""
    rng = np.random.default_rng(5)
    canary = count_bad(canary_rate, (*shape, num_answers), rng)
    stable = count_bad(stable_rate, (*shape, num_answers * stable_factor), rng)
    at_look = slice(stable_factor - 1, None, stable_factor)
    stable = Tally(*(np.asarray(sums)[..., at_look] for sums in vars(stable).values()))
    low, high = bound_difference(canary, stable, ALPHA)
    return low[..., FIRST - 1 :], high[..., FIRST - 1 :]


@pytest.mark.parametrize("rate", [0.03, 0.2])
def test_equal_models_are_rarely_rolled_back_whatever_the_looks(rate: float) -> None:
    low, _ = simulate_harm(rate, rate, 600, RUNS, NUM_COMPARISONS)
    # with a margin of 0, in any of the checks and steps: 0 of 400 runs at both rates
    assert (low > 0).any(axis=(1, 2)).mean() <= 0.01


def test_a_model_on_the_margin_is_neither_rolled_back_nor_promoted() -> None:
    low, high = simulate_harm(0.15, 0.1, 1000, RUNS, NUM_COMPARISONS)
    assert (low > 0.05).any(axis=(1, 2)).mean() <= 0.01
    assert (high <= 0.05).any(axis=(1, 2)).mean() <= 0.01


@pytest.mark.parametrize(
    ("canary_rate", "stable_rate", "median"),
    [(0.30, 0.03, 80), (0.20, 0.03, 200), (0.30, 0.10, 200)],
)
def test_a_worse_model_is_rolled_back_soon(
    canary_rate: float, stable_rate: float, median: int
) -> None:
    low, _ = simulate_harm(canary_rate, stable_rate, 1000, RUNS)
    is_shown = low > 0.05
    assert is_shown.any(axis=1).mean() >= 0.95
    found_at = np.where(is_shown.any(axis=1), is_shown.argmax(axis=1) + FIRST, 1000)
    assert np.median(found_at) <= median


def test_equal_models_are_promoted() -> None:
    _, high = simulate_harm(0.03, 0.03, 1000, RUNS)
    is_excluded = high <= 0.05
    found_at = np.where(is_excluded.any(axis=1), is_excluded.argmax(axis=1) + FIRST, 1000)
    assert is_excluded.any(axis=1).mean() >= 0.95
    assert np.median(found_at) <= 600


def test_pairs_of_equal_models_roll_nothing_back() -> None:
    rng = np.random.default_rng(8)
    for rate in (0.02, 0.3):
        bad = (rng.random((RUNS, 1000)) < rate).astype(int) - (rng.random((RUNS, 1000)) < rate)
        sums = (np.cumsum(bad, axis=1), np.cumsum(bad**2, axis=1))
        low, _ = Tally(np.arange(1, 1001), *sums).bound_mean((-1, 1), 0.05)
        assert (low[:, FIRST - 1 :] > 0).any(axis=1).mean() <= 0.02  # 0.8% of 2,000 runs at most


def test_looking_often_at_an_interval_for_one_look_rolls_back_good_models() -> None:
    """The contrast: why the bound has to be valid at every look."""
    rng = np.random.default_rng(6)
    canary = count_bad(0.2, (RUNS, 600), rng)
    stable = count_bad(0.2, (RUNS, 600), rng)
    difference = (canary.total - stable.total) / canary.count
    error = np.sqrt(2 * 0.2 * 0.8 / canary.count)
    is_shown = (difference > 1.645 * error)[:, FIRST - 1 :]
    assert is_shown.any(axis=1).mean() > 0.15
