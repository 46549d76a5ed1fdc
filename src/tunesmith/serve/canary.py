"""Whether a new model's answers are worse than the stable model's: its share of requests ends then.

    canary = Canary(settings)
    canary.add_answer(True, is_canary=True);  canary.judge() -> whether it is rolled back now

In: bad or not, of answers in the order they ended. Out: the interval of one number, the canary's
rate of bad answers minus the stable one's. Judged after every answer: the bounds hold however often
one looks (`compute_confidence_sequence`), so a canary within its margin is rolled back in at most a
share of 5% of all cases. This takes answers as independent, which those of one user are not: users
who keep a model count once. The checks of an answer see collapse and form, not whether a fact is
right: feedback of people sees that. Left out: who gets which model (routes.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.core.types import Json
from tunesmith.evaluate.constraint_violations import find_matches
from tunesmith.evaluate.degeneration import compute_repetition
from tunesmith.evaluate.json_metrics import schema_valid
from tunesmith.evaluate.statistics import MIN_SEQUENCE, compute_confidence_sequence
from tunesmith.recipe.fields import Constraint
from tunesmith.serve.registry import ServedModel
from tunesmith.serve.settings import CanarySettings

MAX_REPETITION = 0.5  # of the 4-grams of tokens; JSON of one form repeats up to a third
FAILED = "failed"  # the check of an answer that was not completed
MAX_USERS = 200_000  # counted for one canary


@dataclass
class Tally:
    """The answers of a model: all, and the bad ones."""

    count: int = 0
    bad: int = 0


class Canary:
    """One canary of one route. What it has counted ends with the server."""

    def __init__(self, settings: CanarySettings) -> None:
        self.settings = settings
        self.canary = Tally()
        self.stable = Tally()
        self.reason = ""  # of a roll-back; empty while the canary answers
        self._versions = ("", "")
        self._users: set[int] = set()  # hashes of those that were counted

    @property
    def share(self) -> float:
        """The share of the requests that the canary answers, in percent."""
        return 0.0 if self.reason else self.settings.share

    def start(self) -> None:
        """Answer again, and count from zero."""
        self.reason = ""
        self.canary = Tally()
        self.stable = Tally()
        self._users.clear()

    def follow_versions(self, canary: str, stable: str) -> None:
        """Begin anew if a name has another content now; other weights of the stable model do not
        bring back a canary that was rolled back."""
        if (canary, stable) != self._versions:
            reason = self.reason if canary == self._versions[0] else ""
            self._versions = (canary, stable)
            self.start()
            self.reason = reason

    def is_counted(self, version: str) -> bool:
        """Return whether these weights are judged: others answered before a name was changed."""
        return version in self._versions

    def add_answer(self, is_bad: bool, *, is_canary: bool, user: str = "") -> None:
        """Count an answer to a client; of a `user` who keeps a model, only the first."""
        if user:
            entry = hash(user)
            if entry in self._users or len(self._users) >= MAX_USERS:
                return
            self._users.add(entry)
        tally = self.canary if is_canary else self.stable
        tally.count += 1
        tally.bad += is_bad

    def compute_harm(self) -> tuple[float, float] | None:
        """Return (low, high) of the canary's rate minus the stable one's, None while a side has
        too few answers."""
        if min(self.canary.count, self.stable.count) < MIN_SEQUENCE:
            return None
        low, high = bound_difference(self.canary, self.stable)
        return float(low), float(high)

    def judge(self) -> bool:
        """Roll the canary back if harm beyond the margin is shown; return whether it is."""
        harm = self.compute_harm()
        if self.reason or harm is None or harm[0] <= self.settings.margin:
            return False
        interval = f"[{100 * harm[0]:+.1f}, {100 * harm[1]:+.1f}]"
        margin = f"margin {100 * self.settings.margin:g}"
        self.reason = f"{interval} points more bad answers, {margin}"
        return True

    def describe(self) -> Json:
        """Return the canary as the admin API shows it; `bad` are (bad, all) answers."""
        return {
            "model": self._versions[0] or self.settings.model,
            "share": self.share,
            "bad": {
                "canary": [self.canary.bad, self.canary.count],
                "stable": [self.stable.bad, self.stable.count],
            },
            "harm": self.compute_harm(),
            "margin": self.settings.margin,
            "rolled_back": self.reason,
        }


def bound_difference(canary: Tally, stable: Tally) -> tuple[np.ndarray, np.ndarray]:
    """Return (low, high) of the difference of two rates of different requests: it lies between the
    ends of their two intervals, of which each misses to one side in half of 5%."""
    canary_low, canary_high = _bound_rate(canary)
    stable_low, stable_high = _bound_rate(stable)
    return canary_low - stable_high, canary_high - stable_low


def _bound_rate(tally: Tally) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval of a rate that holds at every look."""
    bad = np.asarray(tally.bad)  # the squares of zeros and ones are themselves
    return compute_confidence_sequence(np.asarray(tally.count), bad, bad, (0, 1))


# ---------------------------------------------------------------- bad answers


@dataclass(frozen=True)
class CheckRules:
    """The rules that the answers of a route have to meet, whichever model gives them."""

    schema: Json | None = None  # for requests without a grammar
    constraints: tuple[Constraint, ...] = ()


@dataclass(frozen=True)
class CheckedAnswer:
    """An answer to check. `has_grammar`: a schema was enforced, which a cut answer breaks."""

    text: str
    tokens: Sequence[int]
    finish_reason: str  # end, stop or length
    has_grammar: bool = False


def build_rules(stable: ServedModel, candidate: ServedModel | None) -> CheckRules:
    """Return the schema that clients rely on today, and what either run must never say."""
    constraints = list(_list_constraints(stable))
    if candidate is not None:
        new = _list_constraints(candidate)
        constraints += [constraint for constraint in new if constraint not in constraints]
    schema = None if stable.source is None else stable.source.schema
    return CheckRules(schema, tuple(constraints))


def _list_constraints(model: ServedModel) -> tuple[Constraint, ...]:
    return () if model.source is None else model.source.constraints


def check_answer(answer: CheckedAnswer, rules: CheckRules) -> dict[str, bool]:
    """Return check -> whether the answer is bad. Slow patterns take seconds: runs on a worker.

    Raises InputError for a pattern of a run that takes too long."""
    checks = {
        "cut": answer.finish_reason == "length",
        "looped": compute_repetition(answer.tokens) > MAX_REPETITION,
        FAILED: False,
    }
    if answer.has_grammar:
        checks["schema_invalid"] = answer.finish_reason != "end"
    elif rules.schema is not None:
        checks["schema_invalid"] = not schema_valid(answer.text, "", rules.schema)
    if rules.constraints:
        checks["violated"] = any(
            find_matches(constraint, answer.text, "an answer") for constraint in rules.constraints
        )
    return checks
