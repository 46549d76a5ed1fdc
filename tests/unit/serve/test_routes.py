"""Who gets which arm: shares hold, a user keeps an arm, and a change moves as few as it can."""

from __future__ import annotations

from collections import Counter

import pytest

from tunesmith.serve.keys import ApiKey, hash_key
from tunesmith.serve.routes import Route, choose_arm
from tunesmith.serve.settings import RouteSettings

UNITS = [f"user {number}" for number in range(20_000)]


def make_route(**settings: object) -> Route:
    values = {"arms": {"old": 90, "new": 10}, **settings}
    return Route("prod", RouteSettings.model_validate(values))


def make_key(name: str, *models: str) -> ApiKey:
    return ApiKey(name, ("infer",), hash_key(name), "", models)


def assign(**shares: float) -> dict[str, str]:
    return {unit: choose_arm("prod", shares, unit) for unit in UNITS}


@pytest.mark.parametrize(
    "shares", [{"a": 95, "b": 5}, {"a": 1, "b": 33, "c": 66}, {"a": 0, "b": 100}]
)
def test_shares_hold(shares: dict[str, float]) -> None:
    counts = Counter(assign(**shares).values())
    for arm, share in shares.items():
        assert abs(counts[arm] / len(UNITS) - share / 100) < 0.01


@pytest.mark.promise
def test_a_growing_share_only_takes() -> None:
    before = assign(a=95, b=5)
    for share in (25, 50, 99, 100):
        after = assign(a=100 - share, b=share)
        moved = {unit for unit in UNITS if before[unit] != after[unit]}
        assert all(after[unit] == "b" for unit in moved)
        before = after
    assert set(before.values()) == {"b"}


def test_an_arm_that_comes_or_goes_moves_nobody_else() -> None:
    two = assign(a=50, b=50)
    three = assign(a=40, b=40, c=20)
    moved = [unit for unit in UNITS if two[unit] != three[unit]]
    assert all(three[unit] == "c" for unit in moved)
    assert abs(len(moved) / len(UNITS) - 0.2) < 0.01


def test_a_unit_is_a_user_a_key_or_a_request() -> None:
    ada = make_key("ada")
    bob = make_key("bob")
    sticky = make_route()
    assert sticky.name_unit("u1", ada, "req-1") == sticky.name_unit("u1", bob, "req-2")
    assert sticky.name_unit(None, ada, "req-1") == sticky.name_unit(None, ada, "req-2")
    assert sticky.name_unit(None, ada, "req-1") != sticky.name_unit(None, bob, "req-1")
    assert sticky.name_unit(ada.id, bob, "req-1") != sticky.name_unit(None, ada, "req-1")
    by_request = make_route(sticky="request")
    assert by_request.name_unit("u1", ada, "req-1") != by_request.name_unit("u1", ada, "req-2")
