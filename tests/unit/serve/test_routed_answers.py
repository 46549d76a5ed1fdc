"""Routes of a live server: arms, and canaries that go and come."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tiny_server import (
    LiveServer,
    break_adapter,
    make_chat,
    make_settings,
    read_events,
    read_metric,
    serving,
    wait_for,
)
from tunesmith.serve.keys import add_key

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def secrets(keys_file: Path) -> dict[str, str]:
    return {
        "boss": add_key(keys_file, "boss", scopes=("admin",))[0],
        "routed": add_key(keys_file, "routed", models=("ab",))[0],
        "named": add_key(keys_file, "named", models=("small",))[0],
    }


@pytest.fixture(scope="module")
def routed(
    writer: Path, adapters: dict[str, Path], keys_file: Path, secrets: dict[str, str]
) -> Iterator[LiveServer]:
    """Return a server with an A/B route and one with a canary."""
    assert secrets
    models = {name: {"from": str(adapters[name])} for name in ("small", "large", "dora")}
    routes = {
        "ab": {"arms": {"small": 50, "large": 50}},
        "prod": {"arms": {"base": 100}, "canary": {"model": "dora", "share": 50}},
    }
    settings = make_settings(models, base=str(writer), keys=keys_file, routes=routes)
    with serving(settings) as server:
        yield server


def connect(live: LiveServer, secret: str = "") -> httpx.Client:
    return live.client(headers={"authorization": f"Bearer {secret}"} if secret else {})


def chat(http: httpx.Client, model: str, text: str = "hello", **more: Any) -> httpx.Response:
    response = http.post(CHAT, json=make_chat(model, text, **({"max_tokens": 6} | more)))
    assert response.status_code == 200, response.text
    return response


# ---------------------------------------------------------------- A/B


@pytest.mark.promise
def test_a_user_keeps_an_arm_and_the_answer_names_it(
    routed: LiveServer, secrets: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    arms: set[str] = set()
    with connect(routed, secrets["routed"]) as http, caplog.at_level(logging.INFO):
        for number in range(8):
            user = f"user-{number}"
            bodies = [chat(http, "ab", user=user) for _ in range(2)]
            names = {response.json()["model"] for response in bodies}
            assert len(names) == 1
            arm = names.pop()
            version = bodies[0].headers["x-tunesmith-model"]
            assert re.fullmatch(rf"ab={arm}@1#[0-9a-f]{{12}}", version)
            arms.add(arm)
    assert arms == {"small", "large"}
    wait_for(lambda: read_metric(routed, "route_checks_total", route="ab", check="cut") == 16)
    assert all(read_metric(routed, "route_answers_total", model=arm) >= 2 for arm in arms)
    assert read_metric(routed, "route_share", route="ab", model="small") == 50
    messages = [entry.message for entry in caplog.records if entry.name == "tunesmith.access"]
    lines = [json.loads(message) for message in messages]
    assert {line["route"] for line in lines} == {"ab"}
    assert "user-1" not in caplog.text


def test_an_arm_answers_as_its_model_does(routed: LiveServer, secrets: dict[str, str]) -> None:
    with connect(routed, secrets["boss"]) as http:
        response = chat(http, "ab", temperature=0)
        arm = response.json()["model"]
        alone = chat(http, arm, temperature=0)
        with http.stream("POST", CHAT, json=make_chat("ab", stream=True)) as stream:
            events = read_events(list(stream.iter_lines()))
            assert stream.headers["x-tunesmith-model"].startswith(f"ab={arm}@1#")
    assert response.json()["choices"] == alone.json()["choices"]
    assert json.loads(events[0])["model"] == arm


def test_a_key_for_the_route_has_no_arm_by_name(
    routed: LiveServer, secrets: dict[str, str]
) -> None:
    with connect(routed, secrets["routed"]) as http:
        assert http.post(CHAT, json=make_chat("small")).status_code == 404
        listed = http.get("/v1/models").json()["data"]
        assert [(model["id"], model["tunesmith"]) for model in listed] == [
            ("ab", {"arms": {"small": 50, "large": 50}})
        ]
        assert http.get("/v1/models/ab").json() == listed[0]
        assert http.get("/admin/routes").status_code == 403
    with connect(routed, secrets["named"]) as http:
        assert http.post(CHAT, json=make_chat("ab")).status_code == 404
        assert http.get("/v1/models/ab").status_code == 404


def test_names_and_models_of_routes_are_not_changed(
    routed: LiveServer, secrets: dict[str, str]
) -> None:
    with connect(routed, secrets["boss"]) as http:
        taken = http.put("/admin/models/ab", json={"from": "x"})
        used = http.request("DELETE", "/admin/models/large")
        no_canary = http.put("/admin/routes/ab", json={"canary": "start"})
        missing = http.put("/admin/routes/nothing", json={"canary": "start"})
        wrong = http.put("/admin/routes/ab", json={"canary": "stop"})
        listed = http.get("/admin/routes").json()["data"]
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")
    assert (used.status_code, used.json()["error"]["code"]) == (409, "model_in_use")
    assert (no_canary.status_code, no_canary.json()["error"]["code"]) == (409, "no_canary")
    assert missing.status_code == 404
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "canary")
    assert [route["id"] for route in listed] == ["ab", "prod"]


# ---------------------------------------------------------------- canary


def add_answers(live: LiveServer, *, canary_bad: bool, num_answers: int = 60) -> None:
    """Count answers that no client has asked for, without a decision."""
    route = live.server.routes.get("prod")
    assert route is not None
    assert route.canary is not None
    for _ in range(num_answers):
        live.call(lambda: route.canary.add_answer(False, is_canary=False))
        live.call(lambda: route.canary.add_answer(canary_bad, is_canary=True))


@pytest.fixture
def boss(routed: LiveServer, secrets: dict[str, str]) -> Iterator[httpx.Client]:
    with connect(routed, secrets["boss"]) as http:
        assert http.put("/admin/routes/prod", json={"canary": "start"}).status_code == 200
        yield http


def read_canary(http: httpx.Client) -> Any:
    (route,) = [r for r in http.get("/admin/routes").json()["data"] if r["id"] == "prod"]
    return route["canary"]


@pytest.mark.promise
def test_harm_takes_the_canary_away(
    routed: LiveServer, boss: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    users = [f"user-{number}" for number in range(16)]
    answered = {user: chat(boss, "prod", user=user).json()["model"] for user in users}
    assert set(answered.values()) == {"base", "dora"}
    wait_for(lambda: sum(count for _, count in read_canary(boss)["bad"].values()) == 16)
    chat(boss, "prod", user=users[0])
    add_answers(routed, canary_bad=True)
    assert read_canary(boss)["share"] == 50
    for number in range(4):  # one more answer, and the decision
        chat(boss, "prod", user=f"new-{number}")
    wait_for(lambda: read_canary(boss)["share"] == 0)
    assert chat(boss, "prod", user="dora").json()["model"] == "base"
    assert read_metric(routed, "canaries_rolled_back_total", route="prod") == 1
    assert read_metric(routed, "route_share", route="prod", model="dora") == 0
    assert "canary dora of prod rolled back: [+" in caplog.text


def test_an_admin_decides_and_is_named(boss: httpx.Client) -> None:
    response = boss.put("/admin/routes/prod", json={"canary": "roll_back"})
    assert response.json()["canary"]["rolled_back"] == "set by boss"
    assert read_canary(boss)["share"] == 0
    boss.put("/admin/routes/prod", json={"canary": "start"})
    assert read_canary(boss)["share"] == 50


@pytest.mark.promise
def test_a_canary_that_gives_nan_is_rolled_back_at_once(
    routed: LiveServer, boss: httpx.Client
) -> None:
    users = [f"user-{number}" for number in range(20)]
    assert {chat(boss, "prod", user=user).json()["model"] for user in users} == {"base", "dora"}
    break_adapter(routed, "dora")
    codes = [boss.post(CHAT, json=make_chat("prod", user=user)).status_code for user in users]
    assert codes.count(500) == 1
    assert "NaN" in read_canary(boss)["rolled_back"]
