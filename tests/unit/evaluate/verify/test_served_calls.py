"""Rows with tools: `verify` compares calls with calls, whoever parses them."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import save_model_folder
from tiny_server import make_settings, serving
from toy_chat import CHATML, CHATML_TOKENS, write_model_folder
from transformers_server import COLORS, train_on_rows
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.verify.recorded_items import (
    RecordedItem,
    _convert_messages,
    load_recorded_run,
)
from tunesmith.evaluate.verify.served_calls import CallReader, ServedCall, ServedFunction
from tunesmith.evaluate.verify.server_client import LiveClient
from tunesmith.evaluate.verify.verification import LiveVerification, verify_run

NUM_ITEMS = 12
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}@"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PARAMETERS: Json = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOLS: tuple[Json, ...] = (
    {"type": "function", "function": {"name": "look", "parameters": PARAMETERS}},
)
USER: Json = {"role": "user", "content": "hi"}


def make_row(number: int) -> Json:
    call = {"name": "look", "arguments": {"at": COLORS[(number + 1) % 4]}}
    answer = {"content": "", "tool_calls": [{"type": "function", "function": call}]}
    question = {"role": "user", "content": f"{COLORS[number % 4]} {number}"}
    return {"messages": [question, {"role": "assistant", **answer}], "tools": list(TOOLS)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that learned to call a function."""
    folder = tmp_path_factory.mktemp("calls")
    template = folder / "tools.jinja"
    template.write_text(TEMPLATE)
    save_model_folder(folder / "model")
    rows = [make_row(number) for number in range(52)]
    return train_on_rows(folder, rows, chat_template=str(template))


def verify(run: Path, url: str, model: str) -> LiveVerification:
    return verify_run(run, LiveClient(f"{url}/v1"), model, num_items=NUM_ITEMS)


@pytest.mark.promise
def test_a_server_that_parses_calls_is_the_run(run: Path) -> None:
    recorded = load_recorded_run(run, NUM_ITEMS)
    called = [item for item in recorded.items if item.after.endswith('"}}')]
    assert len(called) > 5
    with serving(make_settings({"whole": run, "weak": f"{run}@0.4"})) as live:
        with live.client() as client:
            body = {"model": "whole", "messages": list(called[0].messages)}
            body |= {"tools": list(TOOLS), "temperature": 0, "max_tokens": 60}
            choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        whole = verify(run, live.url, "whole")
        weak = verify(run, live.url, "weak")
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert whole.is_run, whole.checks
    assert {check.status for check in whole.checks} == {"ok"}, whole.checks
    assert not weak.is_run


# ---------------------------------------------------------------- one answer


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CallReader:
    tokens = ("<|endoftext|>", "<|start|>", "<|end|>")
    folder = write_model_folder(tmp_path_factory.mktemp("tools"), TEMPLATE, tokens)
    return CallReader(Renderer.from_folder(folder, now=datetime(2026, 1, 1)))


def make_item(after: str, before: str = "") -> RecordedItem:
    return RecordedItem(
        id="1", messages=(USER,), tools=TOOLS, prompt_text="", prompt_ids=(1,), expected="",
        before=before, after=after, is_cut=False, documents=(), loss_before=None, loss=None,
    )  # fmt: skip


def make_call(arguments: str, name: str = "look") -> ServedCall:
    return ServedCall(ServedFunction(name, arguments))


RECORDED = 'Well. @{"name":"look","arguments":{"at": "é"}}'


@pytest.mark.parametrize(
    ("content", "arguments", "text"),
    [
        ("Well.", '{"at":"é"}', RECORDED),  # other spaces, the same call
        ("Well.", '{"at": "\\u00e9"}', RECORDED),
        ("Well.", '{"at": "e"}', 'Well.@{"name": "look", "arguments": {"at": "e"}}'),
        ("", '{"at": "é"}', '@{"name": "look", "arguments": {"at": "é"}}'),
        ("", '{"at": "b"}', '@{"name": "look", "arguments": {"at":  "b"}}'),  # that of the base
    ],
    ids=["same", "escaped", "other argument", "no content", "before"],
)
def test_the_same_calls_are_the_recorded_text(
    reader: CallReader, content: str, arguments: str, text: str
) -> None:
    item = make_item(RECORDED, '@{"name": "look", "arguments": {"at":  "b"}}')
    assert reader.restore(item, content, [make_call(arguments)]) == text


def test_a_text_that_no_server_has_parsed_stays(reader: CallReader) -> None:
    assert reader.restore(make_item(RECORDED), RECORDED, ()) == RECORDED


DEEP = ['{"at": ' + "[" * depth + "]" * depth + "}" for depth in (600, 990)]


@pytest.mark.parametrize("arguments", ['{"at": ', "[1]", "1" * 5000, "[" * 10**5, *DEEP])
def test_arguments_that_are_no_object_or_deep_are_never_the_recorded_call(
    reader: CallReader, arguments: str
) -> None:
    text = reader.restore(make_item(RECORDED), "", [make_call(arguments)])
    assert text != RECORDED
    assert "look" in text


def test_a_template_without_tools_compares_what_it_can(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, CHATML, CHATML_TOKENS)
    reader = CallReader(Renderer.from_folder(folder, now=datetime(2026, 1, 1)))
    assert reader.restore(make_item(RECORDED), "a", [make_call("{}")]) != RECORDED


def test_results_name_the_calls_before_them() -> None:
    function = {"name": "look", "arguments": {"at": "é"}}
    messages: list[Any] = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}, function]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2", "tool_call_id": "mine"},
        {"role": "tool", "content": "3"},
    ]
    converted = list(_convert_messages(messages))
    calls = converted[1]["tool_calls"]
    assert [call["id"] for call in calls] == ["call_0", "call_1"]
    assert all(json.loads(call["function"]["arguments"]) == {"at": "é"} for call in calls)
    assert set(calls[1]) == {"id", "type", "function"}
    assert [message.get("tool_call_id") for message in converted[2:]] == [
        "call_0", "mine", "call_1",
    ]  # fmt: skip
