"""Rows that would cost much to check or to render: cases for hostile_inputs.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from toy_chat import write_model_folder
from tunesmith import api
from tunesmith.core.types import Example, Json
from tunesmith.data.chat_template.renderer import Renderer

NOW = datetime(2026, 3, 4, 5, 6, 7)
Call = Callable[[], Any]


def check_rows(rows: Callable[[], list[Json]], folder: Path) -> Call:
    """Check a data file with `data check`."""
    model = Path(os.environ["HOSTILE_TINY"])
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return partial(api.data_check, model=str(model), data=str(folder / "train.jsonl"))


def make_row(text: str, **keys: Any) -> Json:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]
    return {"messages": turns, **keys}


def check_text(text: str, times: int = 1) -> Callable[[Path], Call]:
    return partial(check_rows, lambda: [make_row(text * times)])


def render_turns(count: int) -> Callable[[Path], Call]:
    """A template without control tokens of the tokenizer, which makes a document of each turn."""

    def write(folder: Path) -> Call:
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        template += "{% if add_generation_prompt %}<assistant>{% endif %}"
        renderer = Renderer.from_folder(write_model_folder(folder / "m", template), now=NOW)
        pair = [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b" * 40}]
        messages = tuple(pair * (count // 2))
        weights = tuple(float(message["role"] == "assistant") for message in messages)
        return partial(renderer.render, Example("a:1", messages=messages, turn_weights=weights))

    return write


def make_tools(count: int) -> list[Json]:
    parameters: Json = {"type": "object", "properties": {}}
    return [
        {"type": "function", "function": {"name": f"f{i}", "parameters": parameters}}
        for i in range(count)
    ]


def make_turns(count: int) -> list[Json]:
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return [{"messages": pair * (count // 2)}]


CASES: dict[str, Callable[[Path], Call]] = {
    "eyJ- 60000 times": check_text("eyJ-", 60_000),
    "eyJa.eyJ 60000 times": check_text("eyJaaaaaaaaaa.", 20_000),
    "a document a turn, 400 messages": render_turns(400),
    "a document a turn, 600 messages": render_turns(600),
    "a row of 500 messages": partial(check_rows, lambda: make_turns(500)),
    "a row of 1000 messages": partial(check_rows, lambda: make_turns(1000)),
    "a row of 4000 messages": partial(check_rows, lambda: make_turns(4000)),
    "a row of 100000 messages": partial(check_rows, lambda: make_turns(100_000)),
    "100000 unused keys": partial(
        check_rows, lambda: [make_row("a", **{f"key{i}": 1 for i in range(100_000)})]
    ),
    "10 unused keys of 100000 letters": partial(
        check_rows, lambda: [make_row("a", **{f"{i}" + "k" * 100_000: 1 for i in range(10)})]
    ),
    "a role of 100000 letters": partial(
        check_rows, lambda: [{"messages": [{"role": "r" * 100_000, "content": "a"}]}]
    ),
    "unknown keys alone": partial(
        check_rows, lambda: [{f"key{i}" + "k" * 1000: 1 for i in range(10_000)}]
    ),
    "a text of a million letters": check_text("a", 1_000_000),
    "a text of a million line ends": check_text("\n", 1_000_000),
    "a text of a million spaces": check_text(" ", 1_000_000),
    "a text of a million digits": check_text("1", 1_000_000),
    "a text of ligatures": check_text("\ufdfa", 100_000),
    "a text of four-byte letters": check_text("🤗", 200_000),
    "5000 tools": partial(check_rows, lambda: [make_row("a", tools=make_tools(5000))]),
    "20000 tools": partial(check_rows, lambda: [make_row("a", tools=make_tools(20_000))]),
    "a text of open braces": check_text("{", 300_000),
    "a text of open tags": check_text("<a", 300_000),
    "control tokens by the thousand": check_text("<|start|>", 100_000),
}  # fmt: skip
