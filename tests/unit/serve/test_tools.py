"""Tools: calls that a model writes are read, and what an answer could break is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tiny_server import LiveServer, make_chat, make_settings, save_toy_adapter, serving
from toy_chat import write_model_folder
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.chat_template.tool_syntax import ObjectForm, ToolSyntax, learn_tool_syntax
from tunesmith.serve.exchange import Answer
from tunesmith.serve.formats import AnswerHead
from tunesmith.serve.scheduler import AnswerUpdate
from tunesmith.serve.tool_calls import CallUpdate, OfferedTools, ToolCallReader, ToolChatFormat

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PARAMETERS: Json = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Zürich"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Ask.", "parameters": PARAMETERS},
}
STOP: Any = {"type": "function", "function": {"name": "stop"}}
TOOLS: Any = [WEATHER, STOP]
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'
)
STOP_CALL = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'


@pytest.fixture(scope="module")
def tool_server(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("tools")
    template = folder / "tools.jinja"
    template.write_text(TEMPLATE)
    adapter = save_toy_adapter(folder / "tools", writer, template=template)
    schema = {"type": "object"}
    bound = save_toy_adapter(folder / "bound", writer, template=template, schema=schema, seed=2)
    models = {"tools": str(adapter), "bound": {"from": str(bound), "constrain": True}}
    with serving(make_settings(models, base=str(writer))) as server:
        yield server


@pytest.fixture
def client(tool_server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tool_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(live: LiveServer, model: str = "tools", **more: Any) -> httpx.Response:
    with live.client() as http:
        return http.post(CHAT, json=make_chat(model, **({"tools": TOOLS} | more)))


def test_a_conversation_goes_on_with_the_result(client: openai.OpenAI) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Bern", "days": 1}'}
    call = {"id": "call_1", "type": "function", "function": function, "index": 0}
    messages: Any = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    answer = client.chat.completions.create(
        model="tools", messages=messages, tools=TOOLS, temperature=0, max_tokens=5
    )
    assert answer.choices[0].message.content  # the toy model calls nothing by itself
    without = client.chat.completions.create(
        model="tools", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=5
    )
    assert answer.usage is not None
    assert without.usage is not None
    assert without.usage.prompt_tokens < answer.usage.prompt_tokens  # the model knows of no tool


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"model": "base"}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"model": "bound"}, "response_format"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
            "tools[0].function.strict",
        ),
    ],
    ids=["template", "schema", "model's schema", "one call", "strict"],
)
def test_what_an_answer_could_break_is_refused(
    tool_server: LiveServer, more: Json, param: str
) -> None:
    response = post(tool_server, **more)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "tools_not_supported")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tools": [WEATHER, WEATHER]}, "same name"),
        ({"tools": None, "tool_choice": "auto"}, "needs tools"),
        ({"tool_choice": "required"}, "no call is forced; send tool_choice: auto"),
        ({"tool_choice": {"type": "function", "function": {"name": "stop"}}}, "response_format"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        ({"messages": [{"role": "user", "content": None}]}, "content is null"),
        ({"functions": []}, "functions"),
    ],
    ids=["twice", "no tools", "forced", "named", "word", "no id", "no content", "old"],
)
def test_a_request_that_says_no_call_is_named(
    tool_server: LiveServer, more: Json, words: str
) -> None:
    response = post(tool_server, **more)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("[1]", "not a JSON object"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": 1, "a": 2}', "cannot be read: the key 'a' occurs twice in one object"),
        ('{"a": ' + "[" * 5000, "nested deeper"),
        ('{"a": ' + "1" * 5000 + "}", "cannot be read: an integer has more than 4,300 digits"),
    ],
    ids=["list", "surrogate", "nan", "twice", "deep", "digits"],
)
def test_arguments_of_an_earlier_call_are_a_strict_object(
    tool_server: LiveServer, arguments: str, words: str
) -> None:
    function = {"name": "stop", "arguments": arguments}
    call = {"id": "a", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "y"},
    ]
    response = post(tool_server, messages=messages)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


# ---------------------------------------------------------------- what a model writes


@pytest.fixture
def tools(tmp_path: Path) -> OfferedTools:
    folder = write_model_folder(tmp_path, TEMPLATE, ("<|endoftext|>", "<|start|>", "<|end|>"))
    syntax = learn_tool_syntax(Renderer.from_folder(folder, now=datetime(2026, 1, 1)))
    return OfferedTools(syntax, {"get_weather": PARAMETERS, "stop": {}})


ANSWERS = {
    "plain": ("no call at all < here", "no call at all < here", []),
    "one": (CALL, "", ["get_weather"]),
    "content": (f"I look.\n\n{CALL}", "I look.", ["get_weather"]),
    "two": (f"{CALL}\n{STOP_CALL}", "", ["get_weather", "stop"]),
    "rest": (f"a {CALL} and b", "aand b", ["get_weather"]),
    "cut": (CALL[:60], CALL[:60], []),
    "unknown": ('<tool_call>{"name": "x", "arguments": {}}</tool_call>',) * 2 + ([],),
    "broken, then one": (f"<tool_call>oh {STOP_CALL}", "<tool_call>oh", ["stop"]),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_an_answer_in_pieces_is_the_same(tools: OfferedTools, name: str, size: int) -> None:
    text, content, names = ANSWERS[name]
    reader = ToolCallReader(tools)
    updates: list[CallUpdate] = []
    for start in range(0, len(text), size):
        updates.append(reader.extend(text[start : start + size], is_end=False))
    updates.append(reader.extend("", is_end=True))
    assert "".join(update.content for update in updates) == content
    assert [call.name for update in updates for call in update.calls] == names


def test_content_is_sent_as_it_comes(tools: OfferedTools) -> None:
    reader = ToolCallReader(tools)
    assert reader.extend("well ", is_end=False).content == "well"
    assert reader.extend("then", is_end=False).content == " then"
    assert reader.extend(" <tool", is_end=False).content == ""
    assert reader.extend("box>", is_end=False).content == " <toolbox>"


def test_an_opening_that_repeats_itself_is_no_content() -> None:
    form = ObjectForm("name", "arguments")
    syntax = ToolSyntax(form, "<calls><call>", None, "</call></calls>")
    reader = ToolCallReader(OfferedTools(syntax, {"stop": {}}))
    text = 'so <calls><call>{"name": "stop", "arguments": {}}</call></calls>'
    updates = [reader.extend(char, is_end=False) for char in text]
    assert "".join(update.content for update in updates) == "so"
    assert [call.name for update in updates for call in update.calls] == ["stop"]


def test_the_deltas_of_two_calls(tools: OfferedTools) -> None:
    renderer: Any = None
    head = AnswerHead("id", "m", "fp", renderer, False, False, False)
    chat_format = ToolChatFormat(head, tools)
    answer = Answer((1,))
    chunks: list[Json] = []
    for text, reason in ((CALL, ""), ("\n" + STOP_CALL, ""), ("", "end")):
        update = AnswerUpdate(0, text, finish_reason=reason)
        answer.extend(update)
        chunks.append(chat_format.format_update(answer, update)["choices"][0])
    calls = [chunk["delta"].get("tool_calls") for chunk in chunks]
    assert [call and (call[0]["index"], call[0]["function"]["name"]) for call in calls] == [
        (0, "get_weather"), (1, "stop"), None,
    ]  # fmt: skip
    assert [chunk["finish_reason"] for chunk in chunks] == [None, None, "tool_calls"]
    (choice,) = ToolChatFormat(head, tools).format_body([answer], {})["choices"]
    assert choice["message"]["content"] is None
    arguments = json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
    assert arguments == {"city": "Zürich", "days": 2}


def test_a_limit_counts_more_than_the_calls_before_it(tools: OfferedTools) -> None:
    renderer: Any = None
    head = AnswerHead("id", "m", "fp", renderer, False, False, False)
    answer = Answer((1,))
    answer.extend(AnswerUpdate(0, CALL, finish_reason="length"))
    (choice,) = ToolChatFormat(head, tools).format_body([answer], {})["choices"]
    assert choice["finish_reason"] == "length"
