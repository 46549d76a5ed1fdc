"""What a run does about what it sees of itself, and when.

In: the `guard` of the recipe and what is decided already. Out: a Choice a key. Pure. Left out: what a collapse is
(train/guard.py).
"""

from __future__ import annotations

from typing import Any

from tunesmith.plan.rules import rule
from tunesmith.recipemappings import Guard
from tunesmith.types import Choice

MARGIN = 0.02  # bits per byte: 0.05 nats a token of 3.6 bytes, the usual bound of what may be forgotten


def guard_choices(wish: Guard) -> dict[str, Choice]:
    def chosen(value: Any, by_rule: Choice) -> Choice:
        return by_rule if value == "auto" else Choice(value, "you", "the recipe says so")

    margin = "bits per byte of general text: 0.05 nats a token, the usual bound of what may be forgotten"
    return {"forgetting_margin": chosen(wish.margin, rule(MARGIN, margin, "ours"))}
