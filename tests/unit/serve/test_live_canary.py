"""The canary of a live server: harm takes it away, a restart changes nothing, and every decision is
an audit line."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from full_disk import file_limit
from tiny_server import LiveServer, make_chat, make_settings, read_metric, serving, wait_for
from tunesmith.core.errors import InputError
from tunesmith.recipe.fields import Constraint
from tunesmith.serve import middleware
from tunesmith.serve.answer_checks import CheckedAnswer, CheckRules, check_answer
from tunesmith.serve.route_state import EVENTS_FILE, STATE_FILE, RouteStore
from tunesmith.serve.routes import choose_arm
from tunesmith.serve.server import prepare_server
from tunesmith.serve.settings import ServeSettings

CHAT = "/v1/chat/completions"
ROUTE = "/admin/routes/prod"
# `dora` ends no answer within 24 tokens
WATCH = {"cut": 0.05, "looped": None, "failed": 0.02}
LONG = {"257": -100, "258": -100, "188": -100}  # nor has it NUL, which no row of feedback may


@pytest.fixture(autouse=True)
def _requests_of_the_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each request an id of the 99 in a hundred for which the canary answers while it runs."""

    def draw_id(num_bytes: int) -> str:
        while True:
            token = secrets.token_hex(num_bytes)
            if choose_arm("prod", {"base": 1, "dora": 99}, f"request req-{token}") == "dora":
                return token

    monkeypatch.setattr(middleware, "secrets", SimpleNamespace(token_hex=draw_id))


def make_route(**canary: Any) -> dict[str, Any]:
    settings = {"model": "dora", "steps": [99, 100], "at_least": 30, "watch": WATCH, **canary}
    return {"arms": {"base": 100}, "sticky": "request", "canary": settings}


@pytest.fixture
def settings(writer: Path, adapters: dict[str, Path], tmp_path: Path) -> ServeSettings:
    shutil.copytree(adapters["small"], tmp_path / "models" / "small")
    return make_settings(
        {"dora": adapters["dora"]},
        base=str(writer),
        models_dir=tmp_path / "models",
        state_dir=tmp_path / "state",
        keep_content=tmp_path / "content",
        routes={"prod": make_route(watch={**WATCH, "thumbs_down": 0.1})},
    )


@contextmanager
def connecting(settings: ServeSettings) -> Iterator[tuple[LiveServer, httpx.Client]]:
    with serving(settings) as live, live.client() as http:
        yield live, http


def ask(http: httpx.Client, num_tokens: int = 2) -> httpx.Response:
    body = make_chat("prod", max_tokens=num_tokens, logit_bias=LONG, seed=1)
    response = http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return response


def add_answers(live: LiveServer, num_answers: int, *, is_canary: bool, **checks: bool) -> None:
    """Count answers that no client has asked for, without a decision."""
    route = next(iter(live.server.routes.table))
    assert route.canary is not None
    for _ in range(num_answers):
        live.call(lambda: route.canary.add_answer(checks, is_canary=is_canary))


def read_audit(settings: ServeSettings) -> list[Any]:
    """Return the audit lines, which a thread of the server writes soon after its start."""
    assert settings.state_dir is not None
    file = settings.state_dir / EVENTS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def read_status(http: httpx.Client) -> tuple[str, float]:
    canary = http.get(ROUTE).json()["canary"]
    return canary["status"], canary["share"]


def count_answers(http: httpx.Client) -> int:
    return http.get(ROUTE).json()["canary"]["answers"]


def test_harm_takes_the_canary_away_and_a_restart_does_not_bring_it_back(
    settings: ServeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tunesmith")
    with connecting(settings) as (live, http):
        assert http.get(ROUTE).json()["arms"] == {"base": 1, "dora": 99}
        assert ask(http).json()["model"] == "dora"
        wait_for(lambda: count_answers(http) == 1)  # judged, which would be a decision later
        add_answers(live, 100, is_canary=False, cut=False, failed=False)
        add_answers(live, 60, is_canary=True, cut=True, failed=False)
        assert read_status(http) == ("running", 99)
        ask(http)  # one more answer, and the decision
        wait_for(lambda: read_status(http) == ("rolled_back", 0))
        assert ask(http).json()["model"] == "base"
        events = {"route": "prod", "event": "rolled_back"}
        assert read_metric(live, "canary_events_total", **events) == 1
        assert read_metric(live, "route_share", model="dora") == 0
        assert "canary dora@1#" in caplog.text
        assert "rolled_back, 0% of prod: cut: [+" in caplog.text
        counted = http.get(ROUTE).json()["canary"]["checks"]["cut"]
        assert counted["canary"] == [62, 62]
        assert counted["stable"][1] >= 100
    with connecting(settings) as (_, http):
        assert read_status(http) == ("rolled_back", 0)
        assert ask(http).json()["model"] == "base"
        assert http.get(ROUTE).json()["canary"]["checks"]["cut"]["canary"] == [62, 62]
    started, rolled_back = read_audit(settings)
    assert (started["event"], started["by"]) == ("started", "rule")
    assert (rolled_back["event"], rolled_back["by"]) == ("rolled_back", "rule")
    assert rolled_back["checks"]["cut"]["harm"][0] > 0.05
    assert rolled_back["model"].startswith("dora@1#")


def test_a_canary_that_is_no_worse_becomes_the_model(settings: ServeSettings) -> None:
    with connecting(settings) as (live, http):
        for is_canary in (False, True):
            checks = {"cut": False, "failed": False, "thumbs_down": False}
            add_answers(live, 900, is_canary=is_canary, **checks)
        response = ask(http, num_tokens=2)
        wait_for(lambda: read_status(http) == ("promoted", 100))
        assert response.json()["model"] == "dora"
        assert http.get("/v1/models/prod").json()["tunesmith"]["arms"] == {"base": 0, "dora": 100}
    with connecting(settings) as (_, http):
        assert read_status(http) == ("promoted", 100)
    assert [event["event"] for event in read_audit(settings)] == ["started", "promoted"]


def test_counts_survive_a_restart(settings: ServeSettings) -> None:
    with connecting(settings) as (live, http):
        add_answers(live, 7, is_canary=True, cut=True)
        ask(http)
        wait_for(lambda: count_answers(http) == 8)
    with connecting(settings) as (_, http):
        assert count_answers(http) == 8


def test_an_admin_decides_and_is_named(settings: ServeSettings) -> None:
    with connecting(settings) as (_, http):
        for action, status in (
            ("roll_back", ("rolled_back", 0)),
            ("promote", ("promoted", 100)),
            ("start", ("running", 99)),
        ):
            response = http.put(ROUTE, json={"canary": action})
            assert response.status_code == 200
            assert read_status(http) == status
    audit = read_audit(settings)
    assert [event["event"] for event in audit] == ["started", "rolled_back", "promoted", "started"]
    assert [event["by"] for event in audit] == ["rule", *["anonymous"] * 3]


def test_other_weights_under_the_name_are_another_canary(settings: ServeSettings) -> None:
    with connecting(settings) as (_, http):
        http.put(ROUTE, json={"canary": "roll_back"})
        assert http.put("/admin/models/dora", json={"from": "small"}).status_code == 200
        assert ask(http).json()["model"] == "dora"
        assert read_status(http) == ("running", 99)
    models = [event["model"] for event in read_audit(settings)]
    assert models[0] == models[1] != models[2]


def test_a_canary_out_of_service_is_rolled_back_at_once(settings: ServeSettings) -> None:
    with connecting(settings) as (live, http):
        registry = live.server.engine.registry
        for _ in range(3):  # as answers of NaN do
            live.call(lambda: registry.note_answer(registry.get("dora"), is_finite=False))
        assert ask(http).json()["model"] == "base"  # no client sees an error
        assert read_status(http) == ("rolled_back", 0)
    assert "NaN" in read_audit(settings)[-1]["reason"]


def test_thumbs_count_for_the_arm_that_answered(settings: ServeSettings) -> None:
    with connecting(settings) as (_, http):
        for verdict in ("bad", "good", "unsure"):
            request_id = ask(http).headers["x-request-id"]
            body = {"request_id": request_id, "verdict": verdict}
            assert http.post("/v1/feedback", json=body).status_code == 201
        counted = http.get(ROUTE).json()["canary"]["checks"]["thumbs_down"]
        assert counted["canary"] == [1, 2]
        assert counted["harm"] is None


def test_a_full_disk_stops_no_answer_and_no_decision(
    settings: ServeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    with connecting(settings) as (_, http):
        wait_for(lambda: read_audit(settings))
        with file_limit(10):
            http.put(ROUTE, json={"canary": "roll_back"})
            assert ask(http).json()["model"] == "base"
            wait_for(lambda: "not stored" in caplog.text)
        assert read_status(http) == ("rolled_back", 0)
    assert [event["event"] for event in read_audit(settings)] == ["started", "rolled_back"]


def test_a_folder_has_one_server_and_a_whole_state(settings: ServeSettings, tmp_path: Path) -> None:
    store = RouteStore(tmp_path / "state")
    with pytest.raises(InputError, match="another server uses this"):
        prepare_server(settings)
    store.close()
    (tmp_path / "state" / STATE_FILE).write_text('{"format": 1, "canaries": {"prod": {}}}')
    with pytest.raises(InputError, match="not a StateFile"):
        prepare_server(settings)
    (tmp_path / "state" / STATE_FILE).write_text('{"format": 9, "canaries": {}}')
    with pytest.raises(InputError, match="format 9"):
        prepare_server(settings)


# ---------------------------------------------------------------- what is bad


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
