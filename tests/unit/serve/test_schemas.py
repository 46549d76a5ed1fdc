"""Answers follow the schema of the request, or the request is 400: never quietly free text."""

from __future__ import annotations

import asyncio
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tiny_server import LiveServer, make_chat
from tunesmith.model.generation.grammar import Grammar
from tunesmith.serve.grammars import GrammarCache
from tunesmith.serve.registry import ServedModel
from tunesmith.serve.sources import open_base

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


@pytest.mark.promise
def test_answers_are_valid_or_say_that_they_are_cut(live: LiveServer) -> None:
    """40 answers, four to a request."""
    num_complete = 0
    for seed in range(0, 40, 4):
        response = post(live, SCHEMA, seed=seed, temperature=1.5, n=4)
        assert response.status_code == 200
        choices = response.json()["choices"]
        reasons = {choice["finish_reason"] for choice in choices}
        expected = "complete" if reasons == {"stop"} else "open"
        assert response.headers["x-tunesmith-schema"] == expected
        for choice in choices:
            if choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
                num_complete += 1
    assert 10 <= num_complete < 40


def test_json_object(live: LiveServer) -> None:
    num_complete = 0
    for seed in range(8):
        with live.client() as http:
            wanted = {"type": "json_object"}
            body = make_chat("base", response_format=wanted, seed=seed, max_tokens=60)
            choice = http.post(CHAT, json=body).json()["choices"][0]
        content = choice["message"]["content"]
        assert content.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(content), dict)
            num_complete += 1
    assert num_complete


def test_a_cut_answer_is_marked(live: LiveServer) -> None:
    response = post(live, SCHEMA, max_tokens=3)
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.headers["x-tunesmith-schema"] == "open"


def test_an_answer_cut_by_a_stop_string_is_marked(live: LiveServer) -> None:
    response = post(live, SCHEMA, stop='"')
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] in ("{", "{ ")
    assert response.headers["x-tunesmith-schema"] == "open"


def test_a_grammar_ends_with_the_models_own_end_tokens(writer: Path, tmp_path: Path) -> None:
    shutil.copytree(writer, tmp_path / "other")
    file = tmp_path / "other" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 256}))
    bases = [open_base(str(folder), datetime.now()) for folder in (writer, tmp_path / "other")]
    for base in bases:
        base.scratch.cleanup()
    models = [ServedModel("base", base) for base in bases]
    assert models[0].renderer.fingerprint == models[1].renderer.fingerprint
    assert models[0].renderer.end_ids != models[1].renderer.end_ids
    cache = GrammarCache()

    async def compile_all() -> list[Grammar]:
        return [await cache.compile(SCHEMA, model) for model in [*models, models[0]]]

    grammars = asyncio.run(compile_all())
    assert grammars[0] is grammars[2]
    assert grammars[0] is not grammars[1]


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
        (nest(80), "deep"),
        ({"enum": ["x" * 200_000]}, "bytes"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "schema",
)
def test_what_cannot_be_enforced_is_400(schema: Any, word: str, live: LiveServer) -> None:
    response = post(live, schema)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "response_format"
    assert word in error["message"]
    with live.client() as http:
        assert http.post(CHAT, json=make_chat("base", max_tokens=1)).status_code == 200


@pytest.mark.promise
@pytest.mark.parametrize("pattern", ["(a|a)*b", "(.*a){25}", "^(a+)+$"])
def test_a_bad_pattern_harms_nobody(pattern: str, live: LiveServer) -> None:
    response = post(live, {"type": "string", "pattern": pattern}, max_tokens=8)
    assert response.status_code in (200, 400)
    with live.client() as http:
        assert http.post(CHAT, json=make_chat("base", max_tokens=1)).status_code == 200


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "<|end|>"},
        {"enum": ["<|end|>", "<|text|>"]},
        {"type": "string", "pattern": r"^<\|end\|>$"},
        {"type": "object", "properties": {"<|end|>": {"const": 1}}, "required": ["<|end|>"]},
    ],
    ids=["const", "enum", "pattern", "key"],
)
def test_the_text_of_an_end_token_ends_no_answer(schema: Any, live: LiveServer) -> None:
    """Its token would end the answer before it is valid, with the reason `stop`."""
    response = post(live, schema)
    if response.status_code == 400:
        assert response.json()["error"]["code"] == "invalid_request"
        return
    choice = response.json()["choices"][0]  # the text, from other tokens
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), schema)
