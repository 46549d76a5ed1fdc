"""What a chat template receives of a row: normalized messages, each string with its writer."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.compiled_template import REASONING_KEYS, TemplateVariables
from tunesmith.data.chat_template.conversation import (
    MAX_CALL_DEPTH,
    ROLES,
    Conversation,
    TemplateQuirks,
    refuse_unused_kwargs,
)
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.chat_template.tracked_str import (
    TEMPLATE,
    TOOLS,
    get_plain_text,
    iter_spans,
    make_origin,
)

NOW = datetime(2026, 3, 4)
LISTED = (
    "{{ bos }}{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    "{% if tools is none %}no tools{% else %}{{ tools[0].name }}{% endif %}"
    "{% if documents is none %}.{% endif %}{% if add_generation_prompt %}>{% endif %}"
)
PLAIN = TemplateQuirks()
ONLY_OBJECTS = TemplateQuirks(can_render_text_args=False)
ONLY_TEXT = TemplateQuirks(can_render_dict_args=False)


def make_chat(
    *messages: Json,
    source: str = LISTED,
    tools: Sequence[Json] = (),
    quirks: TemplateQuirks = PLAIN,
) -> Conversation:
    template = ChatTemplate(source, now=NOW)
    return Conversation(template, messages, tools, TemplateVariables({"bos": "<s>"}), quirks)


def normalize(message: Json, quirks: TemplateQuirks = PLAIN) -> Json:
    return make_chat(message, quirks=quirks).messages[0]


def convert(arguments: Any, quirks: TemplateQuirks) -> Any:
    call = {"id": "1", "function": {"name": "look", "arguments": arguments}}
    (converted,) = normalize({"role": "assistant", "tool_calls": [call]}, quirks)["tool_calls"]
    assert converted | {"function": {}} == {"id": "1", "function": {}}
    assert converted["function"]["name"] == "look"
    return converted["function"]["arguments"]


def list_writers(chat: Conversation) -> dict[str, int]:
    text = chat.render(len(chat.messages))
    plain = get_plain_text(text)
    return {plain[start:end]: origin for start, end, origin in iter_spans(text)}


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_thinking_stands_under_both_keys_and_null_under_none(key: str) -> None:
    message = {"role": "assistant", "content": None, key: "hm"}
    expected = {"role": "assistant", "thinking": "hm", "reasoning_content": "hm", key: "hm"}
    assert normalize(message) == expected
    assert normalize({"role": "assistant", "content": "", key: None}) == {
        "role": "assistant",
        "content": "",
    }


def test_the_first_of_two_thoughts_is_the_one_of_the_answer() -> None:
    message = {"role": "assistant", "thinking": "two", "reasoning_content": "one"}
    assert normalize(message) == message
    message = {"role": "assistant", "reasoning": "three", "thinking": "two"}
    assert normalize(message) == message | {"reasoning_content": "two"}


def test_content_becomes_a_part_only_where_it_is_text() -> None:
    parts = TemplateQuirks(needs_content_parts=True)
    text = [{"type": "text", "text": "a"}]
    assert normalize({"role": "user", "content": "a"}, parts)["content"] == text
    assert normalize({"role": "user", "content": text}, parts)["content"] == text
    assert "content" not in normalize({"role": "assistant"}, parts)
    assert normalize({"role": "user", "content": "a"})["content"] == "a"


def test_the_first_messages_are_rendered_as_plain_jinja_does() -> None:
    chat = make_chat(
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    )
    assert chat.assistant_indices == {1}
    expected = "<s>user: a|assistant: b|no tools."
    assert get_plain_text(chat.render(2)) == chat.render_plain(2) == expected
    asked = chat.render(2, add_generation_prompt=True)
    assert get_plain_text(asked) == f"{expected}>"
    assert chat.render_plain(2, add_generation_prompt=True) == f"{expected}>"
    assert chat.full_plain_text == "<s>user: a|assistant: b|user: c|no tools."


def test_each_text_has_its_writer() -> None:
    source = (
        "{{ bos }}{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.thinking }}"
        "{{ m.name }}{% if m.tool_calls %}{{ m.tool_calls[0].id }}{% endif %}{% endfor %}"
        "{{ tools[0].name }}"
    )
    user = {"role": "user", "content": "[question]", "name": "[sender]"}
    answer = {
        "role": "assistant",
        "content": "[answer]",
        "reasoning": "[thought]",
        "tool_calls": [{"id": "[call]", "function": {"name": "f", "arguments": {}}}],
    }
    chat = make_chat(user, answer, source=source, tools=[{"name": "[tool]"}])
    assert list_writers(chat) == {
        "<s>user": TEMPLATE,
        "[question]": make_origin(0, "content"),
        "[sender]": make_origin(0, "other"),
        "assistant": TEMPLATE,
        "[answer]": make_origin(1, "content"),
        "[thought]": make_origin(1, "reasoning"),
        "[call]": make_origin(1, "tool_calls"),
        "[tool]": TOOLS,
    }


def test_keys_and_lists_have_the_writer_of_their_message() -> None:
    """Whatever the type of a field is: no text of a row counts as the template's."""
    source = "{% for k, v in messages[0].extra.items() %}{{ k }}={{ v[0] }}{{ v[1] }}{% endfor %}"
    chat = make_chat({"role": "user", "extra": {"[key]": ("[value]", True)}}, source=source)
    other = make_origin(0, "other")
    assert list_writers(chat)["[key]"] == list_writers(chat)["[value]"] == other


@pytest.mark.parametrize("role", sorted(ROLES))
def test_a_known_role_is_text_of_the_template(role: str) -> None:
    chat = make_chat({"role": role, "content": "[]"}, source="{{ messages[0].role }}")
    written = "system" if role == "developer" else role
    assert list_writers(chat) == {written: TEMPLATE}


def test_a_role_that_the_template_names_is_supported() -> None:
    source = "{% if messages[0].role == 'ipython' %}{{ messages[0].role }}{% endif %}<s>"
    assert list_writers(make_chat({"role": "ipython"}, source=source)) == {"ipython<s>": TEMPLATE}


@pytest.mark.parametrize("role", ["boss", "<s>", "", None, 3, ["user"]])
def test_another_role_is_refused(role: Any) -> None:
    """Among them a control token that the template itself writes: no row may pass for it."""
    with pytest.raises(InputError, match="does not support the role") as refused:
        make_chat({"role": role, "content": "a"}, source="<s>{{ messages[0].role }}")
    assert repr(role) in refused.value.message
    assert refused.value.fix == "use one of assistant, developer, system, tool, user"


def test_a_message_without_a_role_is_refused() -> None:
    with pytest.raises(InputError, match="does not support the role None"):
        make_chat({"content": "a"})


def test_arguments_are_converted_only_where_the_template_needs_it() -> None:
    text, same = '{"x":  "ö"}', {"x": "ö"}
    assert convert(text, ONLY_OBJECTS) == same
    assert convert(same, ONLY_OBJECTS) == same
    assert convert(same, ONLY_TEXT) == '{"x": "ö"}'
    assert convert(text, ONLY_TEXT) == text
    neither = TemplateQuirks(can_render_dict_args=False, can_render_text_args=False)
    for quirks in (PLAIN, neither):
        assert convert(text, quirks) == text
        assert convert(same, quirks) == same
    for quirks in (ONLY_TEXT, ONLY_OBJECTS):
        assert convert(None, quirks) is None


def test_calls_of_other_forms_are_kept() -> None:
    flat = {"name": "look", "arguments": "{}"}
    message = {"role": "assistant", "tool_calls": [flat, {"name": "stop"}, "look"]}
    converted = normalize(message, ONLY_OBJECTS)["tool_calls"]
    assert converted == [flat | {"arguments": {}}, {"name": "stop"}, "look"]
    assert normalize({"role": "assistant", "tool_calls": []})["tool_calls"] == []


def test_arguments_that_are_no_json_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be read") as refused:
        convert("{x", ONLY_OBJECTS)
    assert refused.value.fix == "write a JSON object"


def test_arguments_may_be_nested_up_to_a_limit() -> None:
    def nest(depth: int) -> str:
        return "[" * depth + "]" * depth

    assert json.dumps(convert(nest(MAX_CALL_DEPTH), ONLY_OBJECTS)) == nest(MAX_CALL_DEPTH)
    with pytest.raises(InputError, match="deeper than 100 levels"):
        convert(nest(MAX_CALL_DEPTH + 1), ONLY_OBJECTS)


TEMPLATES = (
    ChatTemplate("{{ tone }}{{ messages }}{{ bos_token }}", now=NOW),
    ChatTemplate("{{ enable_thinking }}{{ tools }}{{ documents }}", now=NOW),
)


def test_variables_that_a_user_may_set() -> None:
    refuse_unused_kwargs(["tone", "enable_thinking"], TEMPLATES, ["bos_token"])


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "bos_token"]
)
def test_what_rows_and_tokenizer_set_is_reserved(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} cannot be set") as refused:
        refuse_unused_kwargs([name], TEMPLATES, ["bos_token"])
    assert refused.value.where == "chat_template_kwargs"


def test_a_variable_without_a_use_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(InputError, match="does not use ton") as refused:
        refuse_unused_kwargs(["tone", "ton"], TEMPLATES, ["bos_token"])
    assert (refused.value.where, refused.value.fix) == (
        "chat_template_kwargs",
        "did you mean tone?",
    )
    with pytest.raises(InputError, match="does not use zzz") as refused:
        refuse_unused_kwargs(["zzz"], TEMPLATES, ["bos_token"])
    assert refused.value.fix == "the template uses: enable_thinking, tone"
    with pytest.raises(InputError, match="does not use zzz") as refused:
        refuse_unused_kwargs(["zzz"], [ChatTemplate("a", now=NOW)], [])
    assert refused.value.fix == "the template uses: no variables"
