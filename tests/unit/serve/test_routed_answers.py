"""Routes of a live server: arms, shadows that nobody waits for, and canaries that go and come."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tiny_server import (
    LiveServer,
    make_chat,
    make_settings,
    pausing_engine,
    read_events,
    read_metric,
    serving,
    wait_for,
)
from tunesmith.core.types import GenerationRequest
from tunesmith.serve.keys import add_key
from tunesmith.serve.scheduler import AnswerJob, AnswerUpdate, StepReport

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
    """Return a server with an A/B route and one with a shadow."""
    assert secrets
    models = {name: {"from": str(adapters[name])} for name in ("small", "large", "dora")}
    routes = {
        "ab": {"arms": {"small": 50, "large": 50}},
        "watched": {"arms": {"base": 100}, "shadow": {"model": "dora", "share": 100}},
        "same": {"arms": {"small": 100}, "shadow": {"model": "small-again", "share": 100}},
    }
    models["small-again"] = models["small"]
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
        assert http.post(CHAT, json=make_chat("ab@0.5")).status_code == 404
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
        no_canary = http.put("/admin/routes/ab", json={"canary": "promote"})
        missing = http.get("/admin/routes/nothing")
        wrong = http.put("/admin/routes/ab", json={"canary": "stop"})
        listed = http.get("/admin/routes").json()["data"]
        assert http.get("/admin/routes/ab").json() == listed[0]
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")
    assert (used.status_code, used.json()["error"]["code"]) == (409, "model_in_use")
    assert (no_canary.status_code, no_canary.json()["error"]["code"]) == (409, "no_canary")
    assert missing.status_code == 404
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "canary")
    assert [route["id"] for route in listed] == ["ab", "watched", "same"]
    assert listed[1]["shadow"] == {"model": "dora", "share": 100}


# ---------------------------------------------------------------- shadow


def test_a_shadow_is_compared_and_changes_nothing(
    routed: LiveServer, secrets: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def count(route: str) -> float:
        return read_metric(routed, "shadow_answers_total", route=route)

    caplog.set_level(logging.DEBUG, "tunesmith")
    with connect(routed, secrets["boss"]) as http:
        for number in range(3):
            text = f"secret question {number}"
            watched = chat(http, "watched", text, temperature=0).json()
            assert watched["model"] == "base"
            assert watched["choices"] == chat(http, "base", text, temperature=0).json()["choices"]
            wait_for(lambda number=number: count("watched") == number + 1)
        chat(http, "same", seed=5)  # the copy draws the same numbers
        wait_for(lambda: count("same") == 1)
    assert read_metric(routed, "shadow_answers_total", route="watched", result="different") == 3
    assert read_metric(routed, "shadow_answers_total", route="same", result="same") == 1
    cut = {"route": "watched", "model": "dora", "check": "cut", "result": "bad"}
    assert read_metric(routed, "shadow_checks_total", **cut) == 3
    assert read_metric(routed, "shadow_tokens_total", route="watched", side="shadow") == 18
    assert read_metric(routed, "running") == read_metric(routed, "waiting") == 0
    assert "secret" not in caplog.text
    # the tokens of shadows are nobody's
    assert read_metric(routed, "tokens_total", model="dora") == 0


def test_a_shadow_makes_room_and_begins_again(routed: LiveServer, secrets: dict[str, str]) -> None:
    def count(name: str, **labels: str) -> float:
        return read_metric(routed, name, **labels)

    long = {"logit_bias": {"257": -100, "258": -100}, "temperature": 0, "seed": 1}
    before = count("shadow_answers_total", route="watched")
    rows = count("step_rows_sum")
    steps = count("step_rows_count")
    with connect(routed, secrets["boss"]) as http:
        for _ in range(12):  # each finds the shadows of those before
            chat(http, "watched", **long)
        wait_for(lambda: count("shadow_answers_total", route="watched") == before + 12)
    assert count("shadow_answers_total", route="watched", result="dropped") == 0
    # one client at a time, and nobody else in its steps
    assert count("step_rows_count") - steps >= 12 * 6
    assert count("step_rows_sum") - rows == count("step_rows_count") - steps


def test_streams_and_completions_have_shadows_too(
    routed: LiveServer, secrets: dict[str, str]
) -> None:
    before = read_metric(routed, "shadow_answers_total", route="watched")
    with connect(routed, secrets["boss"]) as http:
        body = {"model": "watched", "prompt": "abc", "max_tokens": 4}
        assert http.post("/v1/completions", json=body).json()["model"] == "base"
        stream = chat(http, "watched", stream=True)
        assert read_events(stream.text.splitlines())[-1] == "[DONE]"
        chat(http, "watched", n=2)  # several answers have none
        wait_for(lambda: read_metric(routed, "shadow_answers_total", route="watched") == before + 2)


# ---------------------------------------------------------------- nobody waits for a shadow


BACKGROUND_TOKENS = 480


def submit_background(live: LiveServer) -> AnswerJob:
    """Queue a long job that nobody waits for."""
    no_end = ((257, -100.0), (258, -100.0))
    request = GenerationRequest((1, 2, 3), BACKGROUND_TOKENS, logit_bias=no_end)
    job = AnswerJob(request, ("nobody", "base"), asyncio.Queue())
    live.call(live.server.engine.scheduler.submit_background, job)
    return job


def drain(job: AnswerJob) -> list[AnswerUpdate]:
    return [job.outbox.get_nowait() for _ in range(job.outbox.qsize())]


def test_a_request_ends_what_runs_in_the_background(
    routed: LiveServer, secrets: dict[str, str]
) -> None:
    scheduler = routed.server.engine.scheduler
    job = submit_background(routed)
    wait_for(lambda: job.outbox.qsize() > 1)
    with connect(routed, secrets["boss"]) as http, ThreadPoolExecutor(1) as pool:
        with pausing_engine(routed):
            num_before = routed.call(job.outbox.qsize)
            assert scheduler.num_active == 0  # it takes nobody's place
            answer = pool.submit(chat, http, "base")
            wait_for(lambda: scheduler.num_active == 1)
        answer.result()
    updates = drain(job)
    assert updates[-1].error_code == "interrupted"
    assert len(updates) == num_before + 1 < BACKGROUND_TOKENS


def test_the_background_waits_while_a_client_is_answered(
    routed: LiveServer, secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = routed.server.engine.scheduler
    handle_report = scheduler._handle_report
    reports: list[StepReport] = []

    def note_report(report: StepReport) -> None:
        reports.append(report)
        handle_report(report)

    monkeypatch.setattr(scheduler, "_handle_report", note_report)
    long: Any = {"max_tokens": 40, "logit_bias": {"257": -100, "258": -100}}
    with connect(routed, secrets["boss"]) as http, ThreadPoolExecutor(1) as pool:
        with pausing_engine(routed):
            answer = pool.submit(chat, http, "base", **long)
            wait_for(lambda: scheduler.num_active == 1)
            job = submit_background(routed)
        answer.result()
    wait_for(lambda: job.outbox.qsize() > 1)  # its turn has come
    routed.call(scheduler.cancel, job)
    num_updates = len(drain(job))
    assert num_updates < BACKGROUND_TOKENS
    own = [n for n, report in enumerate(reports) if job in dict(report.updates)]
    of_the_client = [n for n, report in enumerate(reports) if not report.is_background]
    assert len(of_the_client) >= 40
    assert of_the_client[-1] < own[0]
