"""Calls that have to be made, where a template writes arguments one by one: what the template
writes is let through and read back, what breaks the schema is not, and the rest is refused."""

from __future__ import annotations

import re
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from toy_chat import write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.call_forms import PartsForm, ToolCall
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.chat_template.tool_syntax import ToolSyntax, learn_tool_syntax
from tunesmith.model.generation.grammar import Grammar
from tunesmith.serve.call_grammars import describe_calls

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
PROPERTIES: Json = {
    "city": {"type": "string", "description": "A city."},
    "unit": {"type": "string", "enum": ["C", "12", "it's"]},
    "days": {"type": "integer"},
    "is_long": {"type": "boolean"},
    "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
}
SCHEMA: Json = {
    "type": "object",
    "properties": PROPERTIES,
    "required": ["city", "days"],
    "$defs": {"tag": {"type": "string"}},
}
SCHEMAS: dict[str, Json] = {"look": SCHEMA, "stop": {"type": "object"}}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "description": "x", "parameters": schema}}
    for name, schema in SCHEMAS.items()
)
USER: Json = {"role": "user", "content": "hi"}
CALLS: dict[str, ToolCall] = {
    "all": ToolCall(
        "look",
        {"city": "Zürich", "unit": "12", "days": -3, "is_long": True, "tags": ["a", "ü"]},
    ),
    "required": ToolCall("look", {"city": 'it\'s "so"\nand < </ on', "days": 0}),
    "empty text": ToolCall("look", {"city": "", "unit": "it's", "days": 12}),
    "last optional": ToolCall("look", {"city": "é 日本", "days": 1, "tags": []}),
    "none": ToolCall("stop", {}),
}
WRONG: dict[str, ToolCall] = {
    "nothing required": ToolCall("look", {"city": "x"}),
    "no argument": ToolCall("look", {}),
    "type": ToolCall("look", {"city": "x", "days": "two"}),
    "enum": ToolCall("look", {"city": "x", "unit": "K", "days": 1}),
    "unknown argument": ToolCall("look", {"city": "x", "days": 1, "zq": 2}),
    "inside": ToolCall("look", {"city": "x", "days": 1, "tags": [7]}),
    "another tool": ToolCall("peek", {"city": "x", "days": 1}),
}


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


@pytest.fixture(scope="module", params=["glm4moe", "lfm2_v2", "qwen3_5_nothink"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(request.param, tmp_path_factory.mktemp("calls"))


@pytest.mark.parametrize("name", CALLS)
def test_what_the_template_writes_is_let_through_and_read_back(lab: Lab, name: str) -> None:
    assert isinstance(lab.syntax.form, PartsForm)
    text = lab.write(CALLS[name])
    assert lab.accepts(text, SCHEMAS), text
    answer = lab.syntax.read(text, SCHEMAS)
    assert answer is not None
    assert answer.calls == (CALLS[name],)


@pytest.mark.parametrize("name", WRONG)
def test_what_breaks_the_schema_is_not(lab: Lab, name: str) -> None:
    assert not lab.accepts(lab.write(WRONG[name]), SCHEMAS)


def test_a_text_cannot_end_its_argument_early(lab: Lab) -> None:
    text = lab.write(ToolCall("look", {"city": "zq", "days": 1}))
    form = lab.syntax.form
    assert isinstance(form, PartsForm)
    early = {"'": "a', days=2)", "": f"a{form.between}days{form.middle}2{form.after}"}[form.quote]
    assert not lab.accepts(text.replace("zq", early + " b"), SCHEMAS)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "minProperties": 1}, "minProperties is not enforced"),
        (
            {"type": "object", "properties": {"a": {"type": "string", "pattern": "x"}}},
            "pattern of a is not enforced",
        ),
        ({"type": "object", "required": ["a"]}, "not among the properties: a"),
        ({"properties": {"a": {"$ref": "#"}}}, "the reference # is not resolved"),
        ({"properties": ["a"]}, "properties is not an object"),
        ({"required": 1}, "required is not a list"),
        ({"properties": {"a": {"enum": 7}}}, "enum of a is not a list"),
        ({"properties": {"a": {"enum": []}}}, "enum of a is not a list"),
        ({"properties": {"a": False}}, "the schema of a is not an object"),
        ({"properties": {"a": None}}, "the schema of a is not an object"),
    ],
    ids=[
        *("tool", "text", "required", "self", "properties", "required list", "enum", "no values"),
        *("never", "null"),
    ],
)
def test_what_no_grammar_enforces_is_named(lab: Lab, schema: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        describe_calls(lab.syntax, {"look": schema}, lab.renderer)


def test_a_name_that_holds_the_syntax_is_refused(lab: Lab) -> None:
    form = lab.syntax.form
    assert isinstance(form, PartsForm)
    schema: Json = {"properties": {f"a{form.middle}b": {"type": "integer"}}}
    with pytest.raises(InputError, match="contains a part of the syntax"):
        describe_calls(lab.syntax, {"look": schema}, lab.renderer)


def test_a_value_that_holds_the_end_of_its_argument(lab: Lab) -> None:
    form = lab.syntax.form
    assert isinstance(form, PartsForm)
    schema: Json = {"properties": {"a": {"type": "string", "const": f"x{form.between}y"}}}
    if form.quote:  # quotes hold anything
        assert describe_calls(lab.syntax, {"look": schema}, lab.renderer)
        return
    with pytest.raises(InputError, match="cannot be written"):
        describe_calls(lab.syntax, {"look": schema}, lab.renderer)


# ---------------------------------------------------------------- one object


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_nothink"])
def test_arguments_are_an_object_whatever_the_schema_leaves_open(name: str, tmp_path: Path) -> None:
    lab = Lab(name, tmp_path)
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
