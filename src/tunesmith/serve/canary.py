"""Whether a new model's answers are no worse than the stable model's: its share grows, or it goes.

    canary = Canary(settings, state, has_pairs=False)
    canary.add_answer(is_canary=True, checks={"cut": False});  canary.judge() -> "" or an event

In: check -> bad or not, of answers in the order they ended. Out: the event that follows, and the
state that survives a restart. Judged after every answer: the bounds hold however often one looks
(`compute_confidence_sequence`). Each step counts anew, since traffic may change when its shares do.

The chance that a canary that is no worse than its margins is ever rolled back is at most ALPHA: it
is divided by the checks, the steps and the two ways to compare. So is the chance that one that is
worse in some check becomes the only model. Both take the answers of a step as independent, which
those of one user are not: users who keep a model count once. Left out: who gets which model
(routes.py), files (route_state.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tunesmith.evaluate.statistics import ALPHA, MIN_SEQUENCE, compute_confidence_sequence
from tunesmith.serve.route_settings import CanarySettings

Status = Literal["running", "rolled_back", "promoted"]
MAX_USERS = 200_000  # counted in a step
Event = Literal["", "started", "restarted", "next_step", "promoted", "rolled_back"]


@dataclass
class Tally:
    """Values that were counted: how many, their sum, and the sum of their squares."""

    count: int = 0
    total: int = 0
    square_total: int = 0

    def add(self, value: int) -> None:
        self.count += 1
        self.total += value
        self.square_total += value * value

    def bound_mean(
        self, bounds: tuple[float, float], alpha: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the interval of the mean that holds at every look."""
        sums = (np.asarray(self.count), np.asarray(self.total), np.asarray(self.square_total))
        return compute_confidence_sequence(*sums, bounds, alpha=alpha)


@dataclass
class CheckTallies:
    """One check. `pairs`: canary minus stable, where both have answered the same request."""

    canary: Tally = field(default_factory=Tally)
    stable: Tally = field(default_factory=Tally)
    pairs: Tally = field(default_factory=Tally)


@dataclass
class CanaryState:
    """The part of a canary that survives a restart. Versions are name, scale and digest: another
    content of a name is another canary."""

    canary: str
    stable: str
    status: Status = "running"
    step: int = 0
    num_answers: int = 0  # of the canary in this step, served or in the shadow
    tallies: dict[str, CheckTallies] = field(default_factory=dict)
    reason: str = ""  # of the last event


@dataclass(frozen=True)
class Harm:
    """The canary's rate of bad answers minus the stable one's, in one check. Its bounds are None
    while nothing is proven: as long as a side has fewer than MIN_SEQUENCE values."""

    check: str
    margin: float
    tallies: CheckTallies
    low: float | None = None
    high: float | None = None

    @property
    def is_shown(self) -> bool:
        return self.low is not None and self.low > self.margin

    @property
    def is_excluded(self) -> bool:
        return self.high is not None and self.high <= self.margin

    def describe(self) -> str:
        """Return the harm in words, in percentage points."""
        if self.low is None or self.high is None:
            return f"{self.check}: fewer than {MIN_SEQUENCE} answers of a side"
        interval = f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{self.check}: {interval} points, margin {100 * self.margin:g}"


class Canary:
    """One canary of one route."""

    def __init__(self, settings: CanarySettings, state: CanaryState, *, has_pairs: bool) -> None:
        self.settings = settings
        self.state = state
        self._users: set[int] = set()  # hashes of those that were counted in this step
        last_judged = len(settings.steps) - 2
        if state.step > last_judged:  # the steps were others
            self._start_step(last_judged)
        num_comparisons = len(settings.watch.named) * (len(settings.steps) - 1) * (1 + has_pairs)
        self.alpha = ALPHA / num_comparisons

    @property
    def share(self) -> float:
        """The share of the requests that the canary answers, in percent."""
        if self.state.status == "rolled_back":
            return 0.0
        return 100.0 if self.state.status == "promoted" else self.settings.steps[self.state.step]

    def follow_versions(self, canary: str, stable: str) -> Event:
        """Begin anew if a name has another content now; return the event."""
        if canary != self.state.canary:
            self.state = CanaryState(canary, stable)
            self.start("not seen before")
            return "started"
        if stable != self.state.stable:
            self.state.stable = stable
            self._start_step(self.state.step)
            self.state.reason = "another stable model"
            return "restarted"
        return ""

    def add_answer(self, checks: Mapping[str, bool], *, is_canary: bool, user: str = "") -> None:
        """Count an answer to a client; of a `user` who keeps a model, only the first in a step."""
        if not self._note_user("answer", user):
            return
        self.state.num_answers += is_canary
        for check, is_bad in checks.items():
            self._count(check, is_bad, is_canary=is_canary)

    def add_verdict(self, check: str, is_bad: bool, *, is_canary: bool, user: str = "") -> None:
        """Count feedback on an answer, as `add_answer` counts answers."""
        if self._note_user(check, user):
            self._count(check, is_bad, is_canary=is_canary)

    def add_pair(self, canary: Mapping[str, bool], stable: Mapping[str, bool]) -> None:
        """Count two answers to one request; the canary's was seen by nobody."""
        self.state.num_answers += 1
        for check in canary.keys() & stable.keys():
            self._get_tallies(check).pairs.add(int(canary[check]) - int(stable[check]))

    def list_harms(self) -> list[Harm]:
        """Return the harm by each check that is judged."""
        harms: list[Harm] = []
        for check, margin in self.settings.watch.named.items():
            tallies = self._get_tallies(check)
            low, high = bound_harm(tallies, self.alpha)
            harms.append(Harm(check, margin, tallies, low, high))
        return harms

    def judge(self) -> Event:
        """Roll back if harm beyond a margin is shown; take the next step if it is excluded by all
        checks and there are enough answers. Returns the event, empty for more of the same."""
        if self.state.status != "running":
            return ""
        harms = self.list_harms()
        shown = [harm.describe() for harm in harms if harm.is_shown]
        if shown:
            return self.roll_back("; ".join(shown))
        has_enough = self.state.num_answers >= self.settings.at_least
        if not has_enough or not all(harm.is_excluded for harm in harms):
            return ""
        reason = "; ".join(harm.describe() for harm in harms)
        next_step = self.state.step + 1
        if next_step == len(self.settings.steps) - 1:
            return self.promote(reason)
        self._start_step(next_step)
        self.state.reason = reason
        return "next_step"

    def start(self, reason: str) -> Event:
        """Begin again with the first step."""
        self.state.status = "running"
        self._start_step(0)
        self.state.reason = reason
        return "started"

    def roll_back(self, reason: str) -> Event:
        """Give the canary no more requests; what was counted stays to be seen."""
        self.state.status = "rolled_back"
        self.state.reason = reason
        return "rolled_back"

    def promote(self, reason: str) -> Event:
        """Give the canary all requests."""
        self.state.status = "promoted"
        self.state.reason = reason
        return "promoted"

    def _start_step(self, step: int) -> None:
        self.state.step = step
        self.state.num_answers = 0
        self.state.tallies = {}
        self._users.clear()

    def _note_user(self, kind: str, user: str) -> bool:
        """Return whether a user counts: the first time, and without a name always."""
        if not user:
            return True
        entry = hash((kind, user))
        if entry in self._users or len(self._users) >= MAX_USERS:
            return False
        self._users.add(entry)
        return True

    def _count(self, check: str, is_bad: bool, *, is_canary: bool) -> None:
        tallies = self._get_tallies(check)
        tally = tallies.canary if is_canary else tallies.stable
        tally.add(int(is_bad))

    def _get_tallies(self, check: str) -> CheckTallies:
        return self.state.tallies.setdefault(check, CheckTallies())


def bound_harm(tallies: CheckTallies, alpha: float) -> tuple[float | None, float | None]:
    """Return (low, high) of the canary's rate minus the stable one's, None without enough values.

    Where there are pairs too, the narrower end counts."""
    lows: list[float] = []
    highs: list[float] = []
    if min(tallies.canary.count, tallies.stable.count) >= MIN_SEQUENCE:
        low, high = bound_difference(tallies.canary, tallies.stable, alpha)
        lows.append(float(low))
        highs.append(float(high))
    if tallies.pairs.count >= MIN_SEQUENCE:
        low, high = tallies.pairs.bound_mean((-1, 1), alpha)
        lows.append(float(low))
        highs.append(float(high))
    return max(lows, default=None), min(highs, default=None)


def bound_difference(canary: Tally, stable: Tally, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (low, high) of the difference of two rates of different requests: it lies between the
    ends of their two intervals, of which each misses to one side in half of `alpha`."""
    canary_low, canary_high = canary.bound_mean((0, 1), alpha)
    stable_low, stable_high = stable.bound_mean((0, 1), alpha)
    return canary_low - stable_high, canary_high - stable_low
