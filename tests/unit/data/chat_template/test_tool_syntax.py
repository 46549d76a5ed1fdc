"""Tool calls are read from what a template writes, for real templates, or the template is named."""

from __future__ import annotations

import json
import re
from datetime import datetime
from importlib.resources import files
from pathlib import Path

import pytest

from toy_chat import CHATML, CHATML_TOKENS, write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.chat_template.tool_syntax import ToolCall, ToolSyntax, learn_tool_syntax

GOLDEN = Path(__file__).parents[3] / "golden"
CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|</?[a-z_]+>|<\|[a-z_]+>|<[a-z_]+\|>")
# Templates of the trl wheel that write tool calls, but not so that they can be read back.
UNREADABLE = {
    "deepseek_r1_distill": "does not write tool calls",  # only with null as content
    "diffusion_gemma": "with other content",  # content comes after calls
    "gemma4": "with other content",
    "gemma4_v2": "with other content",
    "gemma4_v3": "with other content",
    "gemma4_v4": "with other content",
    "gemma4_v5": "with other content",
    "gptoss": "the content is not read back",  # it is in a channel
    "lfm2_2_5": "nested arguments",  # line breaks in quotes
    "lfm2_2_5_v2": "nested arguments",
    "muse_glimmer": "the second of two",  # an end token between them
}
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMAS = {"look": {"type": "object", "properties": {"at": {"type": "string"}}}, "stop": {}}


def load(folder: Path, template: str) -> Renderer:
    tokens = sorted({*CONTROL.findall(template), "<|endoftext|>"})
    path = write_model_folder(folder, template, tokens, bos_token="<s>")
    return Renderer.from_folder(path, now=datetime(2026, 1, 1))


@pytest.fixture
def qwen(tmp_path: Path) -> ToolSyntax:
    return learn_tool_syntax(load(tmp_path, QWEN))


def list_templates() -> list[str]:
    """Return the templates that write tool calls. Copies for training write the same."""
    found: list[str] = []
    for path in sorted(files("trl").joinpath("chat_templates").iterdir(), key=lambda f: f.name):
        name = path.name.removesuffix(".jinja")
        is_copy = name.endswith("_training")
        if path.name.endswith(".jinja") and not is_copy and "tool_calls" in path.read_text():
            found.append(name)
    return found


# ---------------------------------------------------------------- real templates


@pytest.mark.promise
def test_the_templates_of_trl(tmp_path: Path) -> None:
    learned: list[str] = []
    for name in list_templates():
        text = files("trl").joinpath("chat_templates", f"{name}.jinja").read_text()
        renderer = load(tmp_path / name, text)
        if reason := UNREADABLE.get(name):
            with pytest.raises(InputError, match=reason):
                learn_tool_syntax(renderer)
        else:
            learn_tool_syntax(renderer)
            learned.append(name)
    assert len(learned) >= 16
    assert {"qwen2_5", "qwen3", "qwen3_6", "llama3_1", "deepseekv3", "glm4moe"} <= set(learned)


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5"])
def test_templates_with_their_own_tokenizers(name: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"chat_{name}.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(golden["tokenizer"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(golden["config"]))
    (tmp_path / "chat_template.jinja").write_text(golden["template"])
    renderer = Renderer.from_folder(tmp_path, now=datetime.fromisoformat(golden["date"]))
    syntax = learn_tool_syntax(renderer)
    assert syntax.separator is not None


def test_a_template_without_tools_is_named(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, CHATML, CHATML_TOKENS)
    renderer = Renderer.from_folder(folder, now=datetime(2026, 1, 1))
    with pytest.raises(InputError, match="does not write tool calls"):
        learn_tool_syntax(renderer)


def test_a_template_that_loses_what_it_is_given_is_not_learned(tmp_path: Path) -> None:
    lossy = QWEN.replace("| tojson", "| tojson | replace('zwei', 'drei')")
    with pytest.raises(InputError, match=r"nested arguments and unicode: .* not read back"):
        learn_tool_syntax(load(tmp_path, lossy))


# ---------------------------------------------------------------- answers of a model


def test_white_space_does_not_matter(qwen: ToolSyntax) -> None:
    text = 'Well. <tool_call>{"name":"look","arguments":{"at":"é"}}</tool_call>'
    answer = qwen.read(text, SCHEMAS)
    assert answer is not None
    assert (answer.content, answer.calls) == ("Well.", (ToolCall("look", {"at": "é"}),))
    assert answer.rest == ""


def test_two_calls_and_text_after_them(qwen: ToolSyntax) -> None:
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    answer = qwen.read(f"{call}\n{call} and more", SCHEMAS)
    assert answer is not None
    assert len(answer.calls) == 2
    assert answer.rest == "and more"


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        "<tool_call>",
        '<tool_call>{"name": "look", "arguments": {"at": ',  # cut off
        '<tool_call>{"name": "look", "arguments": "at"}</tool_call>',
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>" + '{"name": "look", "arguments": ' + "[" * 10**5,
    ],
    ids=lambda text: text[:50],
)
def test_what_is_no_call_stays_text(qwen: ToolSyntax, text: str) -> None:
    assert qwen.read(text, SCHEMAS) is None


def test_unquoted_values_follow_the_schema_of_the_tool(tmp_path: Path) -> None:
    template = files("trl").joinpath("chat_templates", "qwen3_5_nothink.jinja").read_text()
    syntax = learn_tool_syntax(load(tmp_path, template))
    text = (
        "<tool_call>\n<function=look>\n<parameter=at>\n12\n</parameter>\n</function>\n</tool_call>"
    )
    for kind, value in (("string", "12"), ("integer", 12)):
        schemas = {"look": {"properties": {"at": {"type": kind}}}}
        answer = syntax.read(text, schemas)
        assert answer is not None
        assert answer.calls == (ToolCall("look", {"at": value}),)
