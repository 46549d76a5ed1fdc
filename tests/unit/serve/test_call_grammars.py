"""Calls that have to be made: what the template writes is let through and read back, what breaks
the schema is not, and the rest is refused."""

from __future__ import annotations

import re
from datetime import datetime
from importlib.resources import files
from pathlib import Path

import pytest

from toy_chat import write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.chat_template.tool_syntax import ToolCall, ToolSyntax, learn_tool_syntax
from tunesmith.model.generation.grammar import Grammar
from tunesmith.serve.tool_calls import describe_calls

VOCAB_SIZE = 512
CONTROLS = {  # of each template: those around a call, and others that its text has
    "qwen3_5_nothink": ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
    "glm4moe": (
        *("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<think>", "</think>"),
        *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "qwen3": ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    "lfm2_v2": ("<|im_start|>", "<|im_end|>", "<|tool_call_start|>", "<|tool_call_end|>"),
}
SCHEMA: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
SCHEMAS: dict[str, Json] = {"look": SCHEMA, "stop": {"type": "object"}}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "description": "x", "parameters": schema}}
    for name, schema in SCHEMAS.items()
)
USER: Json = {"role": "user", "content": "hi"}


class Lab:
    """A template's renderer, its syntax, and whether a grammar lets a call through."""

    def __init__(self, name: str, folder: Path) -> None:
        template = files("trl").joinpath("chat_templates", f"{name}.jinja").read_text()
        tokens = ("<|endoftext|>", *CONTROLS[name])
        self.folder = write_model_folder(folder / name, template, tokens, bos_token="<s>")
        self.renderer = Renderer.from_folder(self.folder, now=datetime(2026, 1, 1))
        self.syntax: ToolSyntax = learn_tool_syntax(self.renderer)

    def write(self, call: ToolCall) -> str:
        """Return what the template writes for a call, from the prompt to the end of the answer."""
        function = {"name": call.name, "arguments": call.arguments}
        calls = [{"id": "abcdefghi", "type": "function", "function": function}]
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        prompt = self.renderer.render_text([USER], TOOLS, has_prompt=True)
        text = self.renderer.render_text([USER, message], TOOLS)
        assert text.startswith(prompt)
        answer = text[len(prompt) :]
        ends = [answer.find(self.renderer.decode([token])) for token in self.renderer.end_ids]
        return answer[: min((end for end in ends if end >= 0), default=len(answer))].rstrip()

    def accepts(self, text: str, schemas: dict[str, Json]) -> bool:
        """Whether the grammar lets a text through, token by token, and may end after it."""
        lark = describe_calls(self.syntax, schemas, self.renderer)
        end_ids = self.renderer.end_ids
        grammar = Grammar(
            lark, self.folder, vocab_size=VOCAB_SIZE, end_ids=end_ids, is_strict=True
        ).start_answer()
        tokenizer = self.renderer.tokenizer
        ids: list[int] = []
        for part in re.split(f"({tokenizer.pattern.pattern})", text):
            control = tokenizer.controls.get(part)
            ids += [control.id] if control is not None else self.renderer.encode_text(part)
        for position, token in enumerate(ids):
            if not grammar.find_allowed(ids[:position])[token]:
                return False
        return bool(grammar.find_allowed(ids)[list(end_ids)].any())


@pytest.mark.parametrize("name", ["glm4moe", "lfm2_v2", "qwen3_5_nothink"])
def test_arguments_one_by_one_are_read_and_not_forced(name: str, tmp_path: Path) -> None:
    lab = Lab(name, tmp_path)
    call = ToolCall("look", {"city": 'it\'s "so"\nand < </ on', "days": 0})
    answer = lab.syntax.read(lab.write(call), SCHEMAS)
    assert answer is not None
    assert answer.calls == (call,)
    with pytest.raises(InputError, match="does not write arguments as an object"):
        describe_calls(lab.syntax, SCHEMAS, lab.renderer)


def test_arguments_are_an_object_whatever_the_schema_leaves_open(tmp_path: Path) -> None:
    lab = Lab("qwen3", tmp_path)
    for schema in ({}, {"properties": {"at": {"type": "integer"}}}, {"type": ["object", "null"]}):
        call = lab.write(ToolCall("look", {}))
        assert lab.accepts(call, {"look": schema})
        assert not lab.accepts(call.replace("{}", "null"), {"look": schema}) or "{}" not in call
    with pytest.raises(InputError, match="must be of type object"):
        describe_calls(lab.syntax, {"look": {"type": "array"}}, lab.renderer)


@pytest.mark.parametrize("space", ["", " "])
def test_references_are_those_of_the_arguments(tmp_path: Path, space: str) -> None:
    lab = Lab("qwen3", tmp_path)
    schema: Json = {
        "type": "object",
        "properties": {"tag": {"$ref": "#/$defs/tag"}, "next": {"$ref": "#"}},
        "additionalProperties": False,
        "$defs": {"tag": {"type": "integer"}},
    }
    begin = "<think>\n\n</think>\n\n" if "think" in (lab.syntax.forced_opening or "") else ""
    for arguments, is_right in (
        ('{"tag":1}', True),
        ('{"tag":1,"next":{"tag":2}}', True),
        ('{"tag":"1"}', False),
        ('{"next":{"name":"look","arguments":{}}}', False),
    ):
        body = f'{{"name":{space}"look",{space}"arguments":{space}{arguments}}}'
        text = f"{begin}<tool_call>\n{body}\n</tool_call>"
        assert lab.accepts(text, {"look": schema}) is is_right, text
