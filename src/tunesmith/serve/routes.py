"""Names that stand for several models: which of them answers a request, and what its answers say.

    table = RouteTable(routes, registry, metrics);  route = table.find("prod", key)
    model = table.choose_model(route, "user ada");  table.note_answers(...)

In: the settings of routes and a unit: a user, an API key, or a request. Out: a model. The same unit
gets the same arm while the shares stay, on every server with the same settings, and a share that
grows only takes units from others. Answers are checked on a worker, after the client has them, and
counted in the metrics and for the canary; no content is kept. A canary is rolled back when
its confidence sequence shows more bad answers than the margin allows. Left out: the table of HTTP
paths (app.py)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.evaluate.constraint_violations import find_matches
from tunesmith.evaluate.degeneration import compute_repetition
from tunesmith.evaluate.json_metrics import schema_valid
from tunesmith.evaluate.statistics import MIN_SEQUENCE, compute_confidence_sequence
from tunesmith.recipe.fields import Constraint
from tunesmith.serve.keys import ApiKey
from tunesmith.serve.metrics import ServerMetrics
from tunesmith.serve.registry import Registry, ServedModel
from tunesmith.serve.settings import CanarySettings, RouteSettings

MAX_REPETITION = 0.5  # of the 4-grams of tokens; JSON of one form repeats up to a third
FAILED = "failed"  # the check of an answer that was not completed
MAX_USERS = 200_000  # counted for one canary
logger = logging.getLogger("tunesmith.serve")


@dataclass
class Tally:
    """The answers of a model: all, and the bad ones."""

    count: int = 0
    bad: int = 0


class Canary:
    """One canary of one route: the interval of its rate of bad answers minus the stable one's.

    Judged after every answer: the bounds hold however often one looks, so a canary within its
    margin is rolled back in at most a share of 5% of all cases. This takes answers as independent,
    which those of one user are not: users who keep a model count once. The checks of an answer see
    collapse and form, not whether a fact is right: feedback of people sees that."""

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


def choose_arm(route: str, shares: Mapping[str, float], unit: str) -> str:
    """Return the arm of a unit, by weighted rendezvous hashing: each arm draws a waiting time with
    its share as the rate, and the first one wins. An arm's draw depends on no other arm, so that a
    change of shares moves a unit only to an arm that has gained on its own."""
    times: dict[str, float] = {}
    for arm, share in shares.items():
        if share > 0:
            names = "\n".join([route, arm, unit])
            digest = hashlib.sha256(names.encode(errors="surrogateescape")).digest()
            position = (int.from_bytes(digest[:8]) + 0.5) / 2**64  # in (0, 1)
            times[arm] = -math.log(position) / share
    return min(times, key=lambda arm: times[arm])


@dataclass(eq=False)
class Route:
    """A route of a running server."""

    name: str
    settings: RouteSettings
    created: int = field(default_factory=lambda: int(time.time()))
    canary: Canary | None = None

    def __post_init__(self) -> None:
        if self.settings.canary is not None:
            self.canary = Canary(self.settings.canary)

    @property
    def stable(self) -> str:
        """The first arm: the one that a canary is compared with."""
        return next(iter(self.settings.arms))

    @property
    def shares(self) -> dict[str, float]:
        """Model -> its share of the requests, in percent."""
        if self.canary is None:
            return dict(self.settings.arms)
        share = self.canary.share
        return {self.stable: 100 - share, self.canary.settings.model: share}

    def name_unit(self, user: str | None, key: ApiKey, request_id: str) -> str:
        """Return who keeps an arm: the user that the request names, else the API key."""
        if self.settings.sticky == "request":
            return f"request {request_id}"
        return f"key {key.id}" if user is None else f"user {user}"

    def choose_arm(self, unit: str) -> str:
        return choose_arm(self.name, self.shares, unit)

    def describe(self) -> Json:
        """Return the route as the admin API shows it."""
        return {
            "id": self.name,
            "object": "route",
            "arms": self.shares,
            "sticky": self.settings.sticky,
            "canary": None if self.canary is None else self.canary.describe(),
        }


class RouteTable:
    """All routes of a server. All state belongs to the event loop."""

    def __init__(
        self, settings: Mapping[str, RouteSettings], registry: Registry, metrics: ServerMetrics
    ) -> None:
        self._routes = {name: Route(name, route) for name, route in settings.items()}
        self._registry = registry
        self._metrics = metrics
        self._judging: set[asyncio.Task[None]] = set()
        for route in self:
            self._show_shares(route)

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes.values())

    def get(self, name: str) -> Route | None:
        return self._routes.get(name)

    def find(self, name: str, key: ApiKey) -> Route | None:
        """Return a route that the key may use; it needs no right to use the arms by name."""
        return self.get(name) if key.can_use_model(name) else None

    def list_users(self, model: str) -> list[str]:
        """Return the names of the routes that use a model."""
        names: list[str] = []
        for route in self:
            if model in [name for _, name in route.settings.list_models()]:
                names.append(route.name)
        return names

    def choose_model(self, route: Route, unit: str) -> ServedModel:
        """Return the model that answers a unit."""
        if route.canary is not None:
            canary = self._registry.get(route.canary.settings.model)
            stable = self._registry.get(route.stable)
            route.canary.follow_versions(canary.version, stable.version)
        return self._registry.get(route.choose_arm(unit))

    def roll_back(self, route: Route, reason: str) -> None:
        """Take a canary away at once."""
        if route.canary is not None and not route.canary.reason:
            route.canary.reason = reason
            self._report_end(route)

    def start_canary(self, route: Route) -> None:
        """Let a canary answer again."""
        if route.canary is not None:
            route.canary.start()
            self._show_shares(route)

    def note_answers(
        self, route: Route, model: ServedModel, answers: Sequence[CheckedAnswer], *, user: str
    ) -> None:
        """Judge the answers of a request, soon; none if it failed."""
        task = asyncio.ensure_future(self._judge(route, model, answers, user))
        self._judging.add(task)
        task.add_done_callback(self._judging.discard)

    async def _judge(
        self, route: Route, model: ServedModel, answers: Sequence[CheckedAnswer], user: str
    ) -> None:
        candidate = None
        if route.canary is not None:
            candidate = self._registry.get(route.canary.settings.model)
        rules = build_rules(self._registry.get(route.stable), candidate)
        self._metrics.route_answers.labels(route.name, model.name).inc(max(1, len(answers)))
        try:
            checks = [await asyncio.to_thread(check_answer, answer, rules) for answer in answers]
        except InputError as error:  # a pattern of a run is too slow
            logger.error("an answer was not judged: %s", error)
            return
        for answer_checks in checks or [{FAILED: True}]:
            for check, is_bad in answer_checks.items():
                result = "bad" if is_bad else "ok"
                self._metrics.route_checks.labels(route.name, model.name, check, result).inc()
            self._count(route, model, answer_checks, user)

    def _count(
        self, route: Route, model: ServedModel, checks: Mapping[str, bool], user: str
    ) -> None:
        canary = route.canary
        if canary is None or not canary.is_counted(model.version):
            return
        is_bad = any(checks.get(check, False) for check in canary.settings.watch)
        canary.add_answer(is_bad, is_canary=model.name != route.stable, user=user)
        if canary.judge():
            self._report_end(route)

    def _report_end(self, route: Route) -> None:
        """Say that a canary was rolled back: in the log and the metrics."""
        assert route.canary is not None
        names = (route.canary.settings.model, route.name)
        logger.warning("canary %s of %s rolled back: %s", *names, route.canary.reason)
        self._metrics.canaries_rolled_back.labels(route.name).inc()
        self._show_shares(route)

    def _show_shares(self, route: Route) -> None:
        for model, share in route.shares.items():
            self._metrics.route_share.labels(route.name, model).set(share)

    async def close(self) -> None:
        """Stop judging."""
        for task in self._judging:
            task.cancel()
        await asyncio.gather(*self._judging, return_exceptions=True)
