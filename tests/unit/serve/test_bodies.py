"""A body is what the API knows, or 400 with the name of the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith.serve.bodies import ChatBody, CompletionBody, read_body
from tunesmith.serve.errors import RequestError

CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


def read_chat(**changes: Any) -> ChatBody:
    return read_body(json.dumps(CHAT | changes).encode(), ChatBody)


def test_what_clients_send() -> None:
    body = read_chat(
        temperature=0, top_p=1, n=2, stop=["a", "b"], seed=3, logprobs=True, top_logprobs=5,
        max_tokens=7, stream=True, stream_options={"include_usage": True}, logit_bias={"7": -100},
        metadata={"run": "1"}, user="me", response_format={"type": "json_object"},
    )  # fmt: skip
    assert body.stops == ("a", "b")
    assert body.answer_tokens == 7
    assert body.num_logprobs == 5
    assert body.should_send_usage


def test_an_answer_can_be_sent_back() -> None:
    answer = {
        "role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "name": None,
        "annotations": [], "audio": None, "function_call": None,
    }  # fmt: skip
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    body = read_chat(messages=[CHAT["messages"][0], answer, parts])
    assert [message.get_text() for message in body.messages] == ["hi", "x", "ab"]


IMAGE = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"n": 10**6}, "n"),
        ({"n": True}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": ""}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages[0].audio"),
        (
            {"messages": [{"role": "assistant", "content": "x", "annotations": [{}]}]},
            "messages[0].annotations",
        ),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
        (
            {"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]},
            "messages[0]",
        ),
        ({"tools": []}, "tools"),
        ({"best_of": 3}, "best_of"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"dog": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
        ({"logit_bias": {"5\n": 1}}, "logit_bias"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"stream_options": {"extra": 1}, "stream": True}, "stream_options.extra"),
        ({"model": ""}, "model"),
        ({"metadata": {"a": 1}}, "metadata"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_chat(**changes)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert "http" not in caught.value.message  # no content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "send one of them"),
        ({"stream_options": {"include_usage": True}}, "needs stream"),
        ({"response_format": {"type": "json_schema"}}, "json_schema goes with"),
    ],
)
def test_fields_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_chat(**changes)


TOOL = (
    b'{"model": "base", "messages": [{"role": "user", "content": "a"}], "tools": [{"type": '
    b'"function", "function": {"name": "f", "parameters": {"a": %s}}}]}'
)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "a", "model": "b"}',
        b'{"model": "base", "messages": [], "temperature": NaN}',
        b'{"model": "base", "temperature": Infinity}',
        TOOL % b"1e999",
        TOOL % b"-1e999",
        TOOL % (b'{"a":' * 100 + b"1" + b"}" * 100),
        b'{"model": ' + b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"model": "base", "messages": [{"role": "user", "content": "\\uD800"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        TOOL % b'{"\\udfff": 1}',
        '{"model": "base", "messages": [{"role": "user", "content": "a"}]}'.encode("utf-16"),
    ],
)
def test_what_is_no_body(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        read_body(raw, ChatBody)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1], [2, 3]], ([1], [2, 3])),
    ],
)
def test_prompts_as_text_and_tokens(prompt: Any, prompts: tuple[Any, ...]) -> None:
    raw = json.dumps({"model": "base", "prompt": prompt}).encode()
    assert read_body(raw, CompletionBody).prompts == prompts


def test_tools_hold_finite_numbers_and_objects_of_some_depth() -> None:
    for value in (b"1e308", b"1e-999", b'{"a":' * 90 + b"1" + b"}" * 90):
        assert read_body(TOOL % value, ChatBody).tools
    with pytest.raises(RequestError, match=r"^a number is out of range: -1e999"):
        read_body(TOOL % b"-1e999", ChatBody)
    with pytest.raises(RequestError, match=r"^an integer has more than 4,300 digits"):
        read_body(TOOL % (b"9" * 5000), ChatBody)
    with pytest.raises(RequestError, match=r"^the key 'deep' occurs twice in one object"):
        read_body(TOOL % b'{"deep": 1, "b": 2, "deep": 1}', ChatBody)
    with pytest.raises(RequestError, match=r"^not valid JSON: NaN is not a number"):
        read_body(TOOL % b"NaN", ChatBody)
    with pytest.raises(RequestError, match="nested deeper than 100 levels"):
        read_body(TOOL % (b"[" * 900 + b"]" * 900), ChatBody)


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [-1], {"a": 1}, None, [[1], "a"], 5])
def test_other_prompts_are_refused(prompt: Any) -> None:
    raw = json.dumps({"model": "base", "prompt": prompt}).encode()
    with pytest.raises(RequestError) as caught:
        read_body(raw, CompletionBody)
    assert caught.value.param.startswith("prompt")


def test_pairs_of_surrogates_are_characters() -> None:
    raw = rb'{"model": "base", "messages": [{"role": "user", "content": "\ud83d\ude00 \\ud800"}]}'
    assert read_body(raw, ChatBody).messages[0].content == "\U0001f600 \\ud800"
