"""What a server is asked, byte by byte: chats, plain prompts, tools, given texts to score."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from transformers_server import MODEL, LiveServer, serving
from tunesmith.core.errors import InputError
from tunesmith.core.types import Document
from tunesmith.evaluate.verify.recorded_items import RecordedItem, _convert_messages, _select_evenly
from tunesmith.evaluate.verify.server_client import LiveClient
from tunesmith.evaluate.verify.server_requests import RequestOptions, ask, score_documents

OPTIONS = RequestOptions(MODEL, 7, ("<end>",))
CHAT = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}


def make_item(name: str = "test.jsonl:1", **changes: Any) -> RecordedItem:
    values: dict[str, Any] = {
        "id": name,
        "messages": ({"role": "user", "content": "hello"},),
        "tools": (),
        "prompt_text": "",
        "prompt_ids": (1, 2),
        "expected": "hi",
        "before": "",
        "after": "hi",
        "is_cut": False,
        "documents": (),
        "loss_before": None,
        "loss": None,
    }
    return RecordedItem(**(values | changes))


def answer_with(live: LiveServer, reply: Any) -> list[tuple[str, dict[str, Any]]]:
    """Let a server give one reply to everything; return the list of what it is asked."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked.append((path, body))
        return 200, reply(body) if callable(reply) else reply

    live.answer = answer  # type: ignore[method-assign]
    return asked


def test_a_chat_is_greedy_with_the_limit_of_the_run() -> None:
    with serving(None) as live:
        asked = answer_with(live, CHAT)
        answer = ask(LiveClient(live.url), OPTIONS, make_item())
    assert asked == [
        (
            "/v1/chat/completions",
            {
                "model": MODEL,
                "temperature": 0,
                "max_tokens": 7,
                "messages": [{"role": "user", "content": "hello"}],
            },
        )
    ]
    assert (answer.text, answer.finish_reason, answer.prompt_tokens) == ("hi", "stop", None)


def test_a_row_without_messages_is_a_plain_completion() -> None:
    reply = {"choices": [{"text": " hi"}], "usage": {"prompt_tokens": 2}}
    with serving(None) as live:
        asked = answer_with(live, reply)
        answer = ask(LiveClient(live.url), OPTIONS, make_item(messages=(), prompt_text="say"))
    assert asked[0][0] == "/v1/completions"
    assert asked[0][1]["prompt"] == "say"
    assert (answer.text, answer.prompt_tokens, answer.finish_reason) == (" hi", 2, "")


def test_tools_and_their_calls_are_those_of_the_api() -> None:
    function = {"name": "look_up", "arguments": {"of": "ä"}}
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    (converted,) = _convert_messages([message])
    (call,) = converted["tool_calls"]
    assert call["type"] == "function"
    assert json.loads(call["function"]["arguments"]) == {"of": "ä"}
    assert function["arguments"] == {"of": "ä"}  # the row itself stays
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    with serving(None) as live:
        asked = answer_with(live, CHAT)
        ask(LiveClient(live.url), OPTIONS, make_item(tools=(tool,)))
    assert asked[0][1]["tools"] == [tool]


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": []},
        {"choices": [{"text": "hi"}]},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": "none"},
        {},
    ],
)
def test_a_reply_of_another_form_is_refused(reply: Any) -> None:
    with serving(None) as live:
        answer_with(live, reply)
        with pytest.raises(InputError) as error:
            ask(LiveClient(live.url), OPTIONS, make_item())
    assert error.value.where == f"{live.url}/chat/completions"


def make_scored_item() -> RecordedItem:
    tokens_L = np.array([5, 6, 7, 8], dtype=np.int32)
    weights_L = np.array([0, 0, 1, 1], dtype=np.float32)
    return make_item(documents=(Document("test.jsonl:1", tokens_L, weights_L),), loss=1.0)


@pytest.mark.parametrize(
    ("logprobs", "loss"),
    [
        ([None, -9.0, -1.0, -2.0, -9.0], 1.5),  # with the token that it generated
        ([None, -9.0, -1.0, -2.0], 1.5),
        ([-9.0], None),  # no echo
        ([None, -9.0, -9.0, -9.0, -1.0, -2.0], None),  # one more token before the text
        ([None, -9.0, None, -2.0], None),
    ],
)
def test_the_loss_is_that_of_the_trained_tokens(
    logprobs: list[float | None], loss: float | None
) -> None:
    reply = {"choices": [{"text": "", "logprobs": {"token_logprobs": logprobs}}]}
    with serving(None) as live:
        asked = answer_with(live, reply)
        losses = score_documents(LiveClient(live.url), OPTIONS, [make_scored_item()])
    assert losses == ({} if loss is None else {"test.jsonl:1": pytest.approx(loss)})
    assert asked[0][1]["prompt"] == [5, 6, 7, 8]
    assert asked[0][1]["echo"] is True


def test_without_echo_the_scores_of_the_prompt_are_read() -> None:
    listed = [None, *({str(token): {"logprob": -0.5}, "9": {"logprob": -3}} for token in (6, 7, 8))]

    def reply(body: dict[str, Any]) -> Any:
        choice: dict[str, Any] = {"text": "x"}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = listed
        return {"choices": [choice]}

    with serving(None) as live:
        answer_with(live, reply)
        losses = score_documents(LiveClient(live.url), OPTIONS, [make_scored_item()])
    assert losses == {"test.jsonl:1": pytest.approx(0.5)}


def test_items_are_spread_over_all() -> None:
    items = tuple(make_item(str(number)) for number in range(10))
    assert [item.id for item in _select_evenly(items, 3)] == ["0", "3", "6"]
    assert _select_evenly(items, 20) == items
