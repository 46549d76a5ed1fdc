"""gpt-oss's template (harmony): what ends an answer is not what ends a message."""

import re
from datetime import datetime
from importlib.resources import files
from pathlib import Path

import pytest

from toy_chat import write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example, Json
from tunesmith.data.chat_template.renderer import Renderer

SOURCE = files("trl").joinpath("chat_templates", "gptoss.jinja").read_text()
TOKENS = sorted({*re.findall(r"<\|[a-z]+\|>", SOURCE), "<|endoftext|>"})
DAY = datetime(2026, 11, 27)
TURNS: tuple[Json, ...] = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "eins", "reasoning_content": "count"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "zwei", "reasoning_content": "count on"},
)


def make_renderer(folder: Path, *, eos_token: str = "<|return|>", now: datetime = DAY) -> Renderer:
    path = write_model_folder(folder, SOURCE, TOKENS, eos_token=eos_token)
    return Renderer.from_folder(path, now=now)


def split(renderer: Renderer, document: Document) -> tuple[str, str]:
    """Return the text before the targets, and that of the targets."""
    is_target_L = document.weights_L > 0
    return (
        renderer.decode(document.tokens_L[~is_target_L]),
        renderer.decode(document.tokens_L[is_target_L]),
    )


def test_every_trained_turn_ends_in_return_and_no_prompt_does(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path)
    row = Example("row:1", messages=TURNS, turn_weights=(0.0, 1.0, 0.0, 1.0))
    first, second = [split(renderer, document) for document in renderer.render(row).documents]
    channel = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
    answer = channel + "<|channel|>final<|message|>{}<|return|>"
    assert first[1] == answer.format("count", "eins")
    assert second[1] == answer.format("count on", "zwei")
    # earlier turns are served without their thinking, and closed like any message
    assert second[0].endswith(
        "<|start|>assistant<|channel|>final<|message|>eins<|end|>"
        "<|start|>user<|message|>two<|end|><|start|>assistant"
    )
    assert "<|return|>" not in first[0] + second[0]


@pytest.mark.parametrize("eos_token", ["<|return|>", "<|endoftext|>"])
def test_generation_stops_at_return_and_at_calls_only(eos_token: str, tmp_path: Path) -> None:
    """`<|end|>` closes the analysis: a model that stopped there would never answer."""
    renderer = make_renderer(tmp_path, eos_token=eos_token)
    ends = [renderer.decode([token]) for token in renderer.end_ids]
    assert ends == list(dict.fromkeys(["<|return|>", "<|call|>", eos_token]))


def test_a_call_ends_in_call(tmp_path: Path) -> None:
    renderer = make_renderer(tmp_path)
    call = {"type": "function", "function": {"name": "get", "arguments": {"city": "Rome"}}}
    tool = {
        "type": "function",
        "function": {"name": "get", "description": "Get.", "parameters": {}},
    }
    turns: tuple[Json, ...] = (
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
    )
    row = Example("row:1", messages=turns, tools=(tool,), turn_weights=(0.0, 1.0))
    (document,) = renderer.render(row).documents
    _, trained = split(renderer, document)
    assert trained == (
        ' to=functions.get<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
    )


def test_several_calls_are_refused_until_each_has_its_message(tmp_path: Path) -> None:
    """The template writes the first of them, and the results of all."""
    renderer = make_renderer(tmp_path)
    calls: list[Json] = []
    for city in ("Rome", "Oslo"):
        function = {"name": "get", "arguments": {"city": city}}
        calls.append({"type": "function", "function": function})
    result: Json = {"role": "tool", "name": "get", "content": "21"}
    both: Json = {"role": "assistant", "content": "", "tool_calls": calls}
    apart: list[Json] = []
    for call in calls:
        apart += [{"role": "assistant", "content": "", "tool_calls": [call]}, result]
    together = (TURNS[0], both, result, result, TURNS[1])
    with pytest.raises(InputError, match="only one of several tool calls") as caught:
        renderer.render(Example("row:1", messages=together, turn_weights=(0, 1, 0, 0, 1)))
    assert "each call into a message of its own" in caught.value.fix
    messages = (TURNS[0], *apart, TURNS[1])
    row = renderer.render(Example("row:1", messages=messages, turn_weights=(0, 1, 0, 1, 0, 1)))
    text = renderer.decode(row.documents[-1].tokens_L)
    assert text.count('{"city": "') == 2


def test_the_date_of_the_system_turn_is_the_plans(tmp_path: Path) -> None:
    row = Example("row:1", messages=TURNS[:2], turn_weights=(0.0, 1.0))
    texts: list[str] = []
    for number, day in enumerate((DAY, DAY, datetime(2031, 1, 2))):
        renderer = make_renderer(tmp_path / str(number), now=day)
        texts.append(split(renderer, renderer.render(row).documents[0])[0])
        assert renderer.has_date
    assert texts[0] == texts[1]
    assert "Current date: 2026-11-27" in texts[0]
    assert texts[2] == texts[0].replace("2026-11-27", "2031-01-02")
