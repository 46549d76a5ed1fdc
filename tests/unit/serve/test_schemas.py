"""Answers follow the schema of the request, or the request is 400: never quietly free text."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import jsonschema
import pytest

from serve_lab import LiveServer, make_chat

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def post(live: LiveServer, schema: Any, **more: Any) -> httpx.Response:
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    with live.client() as http:
        body = make_chat("base", response_format=wanted, **({"max_tokens": 40} | more))
        return http.post(CHAT, json=body)


def test_answers_are_valid_or_say_that_they_are_cut(live: LiveServer) -> None:
    num_complete = 0
    for seed in range(16):
        response = post(live, SCHEMA, seed=seed, temperature=1.5)
        assert response.status_code == 200
        choice = response.json()["choices"][0]
        if choice["finish_reason"] == "length":
            assert response.headers["x-tunesmith-schema"] == "open"
            continue
        assert response.headers["x-tunesmith-schema"] == "complete"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        num_complete += 1
    assert num_complete >= 4


def test_json_object(live: LiveServer) -> None:
    with live.client() as http:
        body = make_chat("base", response_format={"type": "json_object"}, seed=1, max_tokens=300)
        choice = http.post(CHAT, json=body).json()["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_a_cut_answer_is_marked(live: LiveServer) -> None:
    response = post(live, SCHEMA, max_tokens=3)
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.headers["x-tunesmith-schema"] == "open"


def nest(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "object", "not": {"required": ["a"]}}, "not"),
        ({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}, "uniqueItems"),
        ({"type": "wrong"}, ""),
        ({"$ref": "#/nothing"}, ""),
        ({"$ref": "http://169.254.169.254/schema.json"}, ""),
        ({"type": "string", "pattern": "(a+"}, ""),
        ({"type": "string", "pattern": "(" * 60_000 + ")" * 60_000}, ""),
        (nest(200), "deep"),
        ({"enum": ["x" * 200_000]}, "bytes"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "schema",
)
def test_what_cannot_be_enforced_is_400(schema: Any, word: str, live: LiveServer) -> None:
    started = time.monotonic()
    response = post(live, schema)
    assert response.status_code == 400, response.text
    assert time.monotonic() - started < 4  # two seconds of compiling on a quiet machine
    error = response.json()["error"]
    assert error["param"] == "response_format"
    assert word in error["message"]
    with live.client() as http:
        assert http.post(CHAT, json=make_chat("base", max_tokens=1)).status_code == 200


@pytest.mark.parametrize("pattern", ["(a|a)*b", "(.*a){25}", "^(a+)+$"])
def test_a_bad_pattern_harms_nobody(pattern: str, live: LiveServer) -> None:
    response = post(live, {"type": "string", "pattern": pattern}, max_tokens=8)
    assert response.status_code in (200, 400)
    with live.client() as http:
        assert http.post(CHAT, json=make_chat("base", max_tokens=1)).status_code == 200


def test_recursion_is_compiled_or_refused(live: LiveServer) -> None:
    schema = {
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
        "$ref": "#/$defs/node",
    }
    assert post(live, schema, max_tokens=8).status_code in (200, 400)
