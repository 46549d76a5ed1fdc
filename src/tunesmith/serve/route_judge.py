"""What follows from the answers of a route: counts, shadows, and the decisions of its canary.

    judge = RouteJudge(table, engine, shadow, store)
    model = judge.choose_model(route, unit);  judge.note_answers(...)

In: a finished request of a route. Out: metrics, and for a canary its state, audit lines and a line
in the log. All of it happens after the client has its answer; checks run on a worker. No content is
kept. Left out: how a decision is made (canary.py), the files (route_state.py)."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.types import Json
from tunesmith.serve.answer_checks import (
    FAILED,
    THUMBS_DOWN,
    CheckedAnswer,
    CheckRules,
    build_rules,
    check_answer,
)
from tunesmith.serve.canary import Event
from tunesmith.serve.feedback import KeptChat
from tunesmith.serve.generation import NOT_FINITE, TIMEOUT, Answer, AnswerEngine
from tunesmith.serve.registry import ServedModel
from tunesmith.serve.route_state import BY_RULE, RouteStore, make_event
from tunesmith.serve.routes import Route, RouteTable
from tunesmith.serve.shadow import Shadow, ShadowFailure, ShadowRequest

SAVE_SECONDS = 10.0  # between two writes of counts; decisions are written at once

logger = logging.getLogger("tunesmith.serve")


@dataclass(frozen=True)
class ChosenModel:
    """The model that answers a request, and the route that has chosen it. `user` keeps it."""

    model: ServedModel
    route: Route | None = None
    user: str = ""


@dataclass(frozen=True)
class RoutedAnswers:
    """The answers to one request of a route. `failure` is the error that ended it."""

    id: str  # of the request
    chosen: ChosenModel
    answers: Sequence[Answer]
    has_grammar: bool
    failure: str
    request: ShadowRequest


class RouteJudge:
    """The routes of a running server. All state belongs to the event loop."""

    def __init__(
        self,
        table: RouteTable,
        engine: AnswerEngine,
        shadow: Shadow,
        store: RouteStore | None,
    ) -> None:
        self.table = table
        self._engine = engine
        self._registry = engine.registry
        self._metrics = engine.metrics
        self._shadow = shadow
        self._store = store
        self._judging: set[asyncio.Task[None]] = set()
        self._saving: set[asyncio.Task[None]] = set()
        self._events: list[Json] = []  # that no file has yet
        self._has_changed = False
        self._saved = 0.0
        self._write_lock = asyncio.Lock()
        for route in table:
            self._follow_versions(route)
            self._show_shares(route)

    # ---- which model

    def choose_model(self, route: Route, unit: str) -> ServedModel:
        """Return the model that answers a unit. Raises RequestError 503 for one out of service; a
        canary is rolled back then, and the stable model answers."""
        self._follow_versions(route)
        model = self._registry.get(route.choose_arm(unit))
        is_canary = route.canary is not None and model.name != route.stable
        if is_canary and not self._registry.is_in_service(model):
            self.roll_back(route, f"{model.name} gives NaN or infinite numbers")
            model = self._registry.get(route.choose_arm(unit))
        self._registry.check_in_service(model)
        return model

    def roll_back(self, route: Route, reason: str) -> None:
        """Take a canary away at once."""
        if route.canary is not None and route.canary.state.status != "rolled_back":
            self._report_event(route, route.canary.roll_back(reason), BY_RULE)

    def _follow_versions(self, route: Route) -> None:
        if route.canary is None:
            return
        canary = self._registry.get(route.canary.settings.model)
        stable = self._registry.get(route.stable)
        event = route.canary.follow_versions(canary.version, stable.version)
        if event:
            self._report_event(route, event, BY_RULE)

    def set_canary(self, route: Route, action: str, by: str) -> None:
        """Do what an admin wants with the canary of a route."""
        assert route.canary is not None
        self._follow_versions(route)
        actions = {
            "start": route.canary.start,
            "roll_back": route.canary.roll_back,
            "promote": route.canary.promote,
        }
        self._report_event(route, actions[action](f"set by {by}"), by)

    # ---- what was answered

    def note_answers(self, routed: RoutedAnswers) -> None:
        """Judge the answers of a request, soon."""
        is_complete = all(answer.finish_reason for answer in routed.answers)
        if is_complete or routed.failure in (NOT_FINITE, TIMEOUT):
            _start(self._judge(routed), self._judging)

    def note_feedback(self, chat: KeptChat, verdict: str) -> None:
        """Count a verdict on an answer of a route."""
        route = self.table.get(chat.route)
        if route is None or verdict == "unsure":
            return
        is_bad = verdict == "bad"
        self._count_checks(route, chat.model, {THUMBS_DOWN: is_bad})
        is_canary = self._find_side(route, chat.version)
        if route.canary is not None and is_canary is not None:
            route.canary.add_verdict(THUMBS_DOWN, is_bad, is_canary=is_canary, user=chat.user)
            self._decide(route)

    async def _judge(self, routed: RoutedAnswers) -> None:
        route = routed.chosen.route
        assert route is not None
        rules = self._build_rules(route)
        model = routed.chosen.model
        self._metrics.routes.answers.labels(route.name, model.name).inc(len(routed.answers))
        checks = [{FAILED: True}]
        if not routed.failure:
            checked = [_to_checked(answer, routed.has_grammar) for answer in routed.answers]
            checks = await _check_all(checked, rules)
        for answer_checks in checks:
            self._count_checks(route, model.name, answer_checks)
            self._count_answer(route, routed.chosen, answer_checks)
        is_single = len(routed.answers) == 1 and not routed.failure and bool(checks)
        if is_single and route.should_shadow(model.name, routed.id):
            await self._compare(route, routed, checks[0], rules)

    def _build_rules(self, route: Route) -> CheckRules:
        candidate = None
        if route.canary is not None:
            candidate = self._registry.get(route.canary.settings.model)
        return build_rules(self._registry.get(route.stable), candidate)

    def _count_checks(self, route: Route, model: str, checks: Mapping[str, bool]) -> None:
        for check, is_bad in checks.items():
            result = "bad" if is_bad else "ok"
            self._metrics.routes.checks.labels(route.name, model, check, result).inc()

    def _count_answer(self, route: Route, chosen: ChosenModel, checks: Mapping[str, bool]) -> None:
        is_canary = self._find_side(route, chosen.model.version)
        if route.canary is not None and is_canary is not None:
            route.canary.add_answer(checks, is_canary=is_canary, user=chosen.user)
            self._decide(route)

    def _find_side(self, route: Route, version: str) -> bool | None:
        """Return whether an answer is the canary's, None for weights that are judged no more."""
        if route.canary is None:
            return None
        state = route.canary.state
        sides = {state.canary: True, state.stable: False}
        return sides.get(version)

    async def _compare(
        self, route: Route, routed: RoutedAnswers, checks: Mapping[str, bool], rules: CheckRules
    ) -> None:
        """Let the shadow answer too, and compare."""
        assert route.settings.shadow is not None
        model = self._registry.get(route.settings.shadow.model)
        served = routed.answers[0]
        names = (route.name, model.name)
        try:
            answered = await self._shadow.answer(routed.request, model)
        except ShadowFailure:
            self._metrics.routes.shadow_answers.labels(*names, "failed").inc()
            self._count_pair(route, routed, model, {FAILED: True}, checks)
            return
        if answered is None:
            self._metrics.routes.shadow_answers.labels(*names, "dropped").inc()
            return
        answer, job = answered
        checked = await _check_all([_to_checked(answer, job.grammar is not None)], rules)
        if not checked:
            return
        result = "same" if answer.text == served.text else "different"
        self._metrics.routes.shadow_answers.labels(*names, result).inc()
        self._metrics.routes.shadow_tokens.labels(*names, "served").inc(len(served.tokens))
        self._metrics.routes.shadow_tokens.labels(*names, "shadow").inc(len(answer.tokens))
        self._count_pair(route, routed, model, checked[0], checks)

    def _count_pair(
        self,
        route: Route,
        routed: RoutedAnswers,
        model: ServedModel,
        checks: Mapping[str, bool],
        served_checks: Mapping[str, bool],
    ) -> None:
        for check, is_bad in checks.items():
            result = "bad" if is_bad else "ok"
            self._metrics.routes.shadow_checks.labels(route.name, model.name, check, result).inc()
        is_of_canary = self._find_side(route, model.version)
        is_beside_stable = self._find_side(route, routed.chosen.model.version) is False
        if route.canary is not None and is_of_canary and is_beside_stable:
            route.canary.add_pair(checks, served_checks)
            self._decide(route)

    # ---- decisions

    def _decide(self, route: Route) -> None:
        assert route.canary is not None
        event = route.canary.judge()
        if event:
            self._report_event(route, event, BY_RULE)
        else:
            self._has_changed = True
            if time.monotonic() - self._saved > SAVE_SECONDS:
                _start(self.save(), self._saving)

    def _report_event(self, route: Route, event: Event, by: str) -> None:
        """Say what was decided: in the log, the metrics and the audit lines."""
        assert route.canary is not None
        state = route.canary.state
        share = f"{route.canary.share:g}% of {route.name}"
        logger.warning("canary %s %s, %s: %s", state.canary, event, share, state.reason)
        self._metrics.routes.canary_events.labels(route.name, event).inc()
        self._show_shares(route)
        self._events.append(make_event(route.name, event, route.canary, by))
        self._has_changed = True
        _start(self.save(), self._saving)

    def _show_shares(self, route: Route) -> None:
        for model, share in route.shares.items():
            self._metrics.routes.share.labels(route.name, model).set(share)

    async def save(self) -> None:
        """Write what has changed. What the disk refuses stays in memory until the next time."""
        async with self._write_lock:
            if self._store is None or not self._has_changed:
                return
            events = self._events
            states: dict[str, Json] = {}
            for route in self.table:
                if route.canary is not None:
                    states[route.name] = dataclasses.asdict(route.canary.state)
            self._events = []
            self._has_changed = False
            self._saved = time.monotonic()
            try:
                await asyncio.to_thread(self._store.write, states, events)
            except TunesmithError as error:
                self._events = events + self._events
                self._has_changed = True
                logger.error("what the canaries have decided is not stored: %s", error)

    async def close(self) -> None:
        """Stop all shadows and write the state a last time."""
        for task in self._judging:
            task.cancel()
        await asyncio.gather(*self._judging, return_exceptions=True)
        await asyncio.gather(*self._saving)
        await self.save()
        if self._store is not None:
            self._store.close()


def _start(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    """Start a task, which is in the set as long as it runs."""
    task = asyncio.ensure_future(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _to_checked(answer: Answer, has_grammar: bool) -> CheckedAnswer:
    return CheckedAnswer(answer.text, answer.tokens, answer.finish_reason, has_grammar)


async def _check_all(answers: Sequence[CheckedAnswer], rules: CheckRules) -> list[dict[str, bool]]:
    """Return the checks of each answer, none if a pattern of a run is too slow."""
    try:
        return [await asyncio.to_thread(check_answer, answer, rules) for answer in answers]
    except InputError as error:
        logger.error("an answer was not judged: %s", error)
        return []
