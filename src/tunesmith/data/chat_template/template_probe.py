"""Probe a chat template: render made-up messages to learn what it expects and how answers end.

    template, tokenizer -> TemplateProtocol: its quirks, and the tokens that end an answer

The end token is the last control token that the template writes after an answer whether or not
another message follows (`<|im_end|>`; not Phi-3's closing `<|endoftext|>`). If the two renders have
none in common, it is the first after a last answer (`<|return|>`). Some templates write none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.conversation import (
    Conversation,
    TemplateQuirks,
    TemplateVariables,
)
from tunesmith.data.chat_template.encode import TrackedText
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer, ControlToken

# Words that no template contains.
QUESTION = "Zqhello"
ANSWER = "Zqanswer"
NEXT_QUESTION = "Zqnext"
TOOL_NAME = "zq_search"
ARG_KEY = "zq_key"
ARG_VALUE = "zqvalue"
USER: Json = {"role": "user", "content": QUESTION}
ASSISTANT: Json = {"role": "assistant", "content": ANSWER}
NEXT_USER: Json = {"role": "user", "content": NEXT_QUESTION}
TOOL_RESULT: Json = {
    "role": "tool",
    "tool_call_id": "call_1",
    "name": TOOL_NAME,
    "content": NEXT_QUESTION,
}
TOOL: Json = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Search.",
        "parameters": {
            "type": "object",
            "properties": {ARG_KEY: {"type": "string", "description": "What."}},
        },
    },
}


@dataclass(frozen=True)
class TemplateProtocol:
    quirks: TemplateQuirks
    end_ids: tuple[int, ...]


def probe_template(
    template: ChatTemplate, tokenizer: ChatTokenizer, variables: TemplateVariables
) -> TemplateProtocol:
    """Return the protocol of a template.

    Structural tokens that mark turns are demoted to control tokens in the tokenizer, since the text
    of an answer must not make them."""
    prober = _Prober(template, tokenizer, variables)
    quirks = prober.probe_quirks()
    tokenizer.demote_structural(prober.find_user_controls(quirks))
    call = _make_tool_call({ARG_KEY: ARG_VALUE})
    if not quirks.can_render_dict_args:
        call = _make_tool_call(json.dumps({ARG_KEY: ARG_VALUE}))
    end_controls: list[ControlToken] = []
    for messages, following, last_text in (
        ([USER, ASSISTANT], NEXT_USER, ANSWER),
        ([USER, call], TOOL_RESULT, ARG_VALUE),
    ):
        end_control = prober.find_end_control(quirks, messages, following, last_text)
        if end_control is not None:
            end_controls.append(end_control)
    tokenizer.demote_structural(end_controls)
    end_ids = dict.fromkeys(control.id for control in end_controls)
    return TemplateProtocol(quirks, tuple(end_ids))


def _make_tool_call(arguments: Any) -> Json:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": TOOL_NAME, "arguments": arguments},
    }
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@dataclass(frozen=True)
class _Prober:
    template: ChatTemplate
    tokenizer: ChatTokenizer
    variables: TemplateVariables

    def render_tracked(
        self, messages: Sequence[Json], quirks: TemplateQuirks
    ) -> TrackedText | None:
        """Render messages, or return None if the template cannot."""
        tools = [TOOL] if any("tool_calls" in message for message in messages) else []
        try:
            chat = Conversation(self.template, messages, tools, self.variables, quirks)
            return TrackedText(chat.render(len(messages)), self.tokenizer, chat.assistant_indices)
        except InputError:
            return None

    def render_plain(self, messages: Sequence[Json], quirks: TemplateQuirks) -> str:
        rendered = self.render_tracked(messages, quirks)
        return rendered.plain if rendered else ""

    def probe_quirks(self) -> TemplateQuirks:
        plain_quirks = TemplateQuirks()
        part_quirks = TemplateQuirks(needs_content_parts=True)
        needs_parts = not self.can_render(plain_quirks) and self.can_render(part_quirks)
        quirks = part_quirks if needs_parts else plain_quirks
        arguments = {ARG_KEY: ARG_VALUE}
        dict_text = self.render_plain([USER, _make_tool_call(arguments)], quirks)
        arguments_text = json.dumps(arguments)
        json_text = self.render_plain([USER, _make_tool_call(arguments_text)], quirks)
        is_python_repr = f"'{ARG_KEY}'" in dict_text
        has_arguments = ARG_KEY in dict_text and ARG_VALUE in dict_text
        return TemplateQuirks(
            needs_parts,
            can_render_dict_args=has_arguments and not is_python_repr,
            can_render_text_args=arguments_text in json_text,
        )

    def can_render(self, quirks: TemplateQuirks) -> bool:
        text = self.render_plain([USER, ASSISTANT], quirks)
        return QUESTION in text and ANSWER in text

    def find_user_controls(self, quirks: TemplateQuirks) -> list[ControlToken]:
        """Return the control tokens after an answer that a user message follows."""
        rendered = self.render_tracked([USER, ASSISTANT, NEXT_USER], quirks)
        if rendered is None or ANSWER not in rendered.plain:
            return []
        answer_start = rendered.plain.index(ANSWER)
        return [match.control for match in rendered.controls if match.start > answer_start]

    def find_end_control(
        self, quirks: TemplateQuirks, messages: Sequence[Json], following: Json, last_text: str
    ) -> ControlToken | None:
        """Return the token that ends the last message, whose text ends in `last_text`."""
        rendered = self.render_tracked(messages, quirks)
        continued = self.render_plain([*messages, following], quirks)
        if rendered is None or last_text not in rendered.plain:
            return None
        answer_end = rendered.plain.rindex(last_text) + len(last_text)
        closing = [
            match
            for match in rendered.controls
            if match.start >= answer_end and not match.control.is_structural
        ]
        if last_text in continued:
            tail = continued[continued.rindex(last_text) + len(last_text) :]
            shared_end = answer_end + _count_common_prefix(rendered.plain[answer_end:], tail)
            shared = [match for match in closing if match.token_end <= shared_end]
            closing = shared[-1:] or closing
        return closing[0].control if closing else None


def _count_common_prefix(first: str, second: str) -> int:
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return count
