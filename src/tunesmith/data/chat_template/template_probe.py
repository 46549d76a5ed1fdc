"""What kind of template this is, found out by rendering a few made-up messages.

    template, tokenizer -> Protocol: its habits, and the tokens that end an answer

The token that ends an answer is the last control token that the template writes after an answer
whether or not another message follows (`<|im_end|>`; not Phi-3's closing `<|endoftext|>`); if the
two differ at once, the first after a last answer (`<|return|>`). Some templates write none."""

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
from tunesmith.data.chat_template.encode import ControlMatch, TrackedText
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer, ControlToken

QUESTION, ANSWER, NEXT_QUESTION, TOOL_NAME, ARG_KEY, ARG_VALUE = (
    "Zqhello",
    "Zqanswer",
    "Zqnext",
    "zq_search",
    "zq_key",
    "zqvalue",
)
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
    """Tokens that mark turns are made control tokens in the tokenizer: they must not come from an
    answer's text."""
    prober = _Prober(template, tokenizer, variables)
    needs_parts = not prober.can_write_answers(TemplateQuirks()) and prober.can_write_answers(
        TemplateQuirks(needs_content_parts=True)
    )
    dict_call, text_call = (
        _make_tool_call({ARG_KEY: ARG_VALUE}),
        _make_tool_call(json.dumps({ARG_KEY: ARG_VALUE})),
    )
    dict_call_text = prober.render_plain([USER, dict_call], TemplateQuirks(needs_parts))
    quirks = TemplateQuirks(
        needs_parts,
        can_render_dict_args=ARG_KEY in dict_call_text
        and ARG_VALUE in dict_call_text
        and f"'{ARG_KEY}'" not in dict_call_text,
        can_render_text_args=json.dumps({ARG_KEY: ARG_VALUE})
        in prober.render_plain([USER, text_call], TemplateQuirks(needs_parts)),
    )
    tokenizer.demote_structural(prober.find_user_controls(quirks))
    call = dict_call if quirks.can_render_dict_args else text_call
    end_controls = [
        prober.find_end_control(quirks, [USER, ASSISTANT], NEXT_USER, ANSWER),
        prober.find_end_control(quirks, [USER, call], TOOL_RESULT, ARG_VALUE),
    ]
    controls = [end for end in end_controls if end is not None]
    tokenizer.demote_structural(controls)
    return TemplateProtocol(quirks, tuple(dict.fromkeys(control.id for control in controls)))


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
        """None if the template cannot render these messages."""
        tools = [TOOL] if any("tool_calls" in message for message in messages) else []
        try:
            chat = Conversation(self.template, messages, tools, self.variables, quirks)
            return TrackedText(chat.render(len(messages)), self.tokenizer, chat.assistant_indices)
        except InputError:
            return None

    def render_plain(self, messages: Sequence[Json], quirks: TemplateQuirks) -> str:
        rendered = self.render_tracked(messages, quirks)
        return rendered.plain if rendered else ""

    def can_write_answers(self, quirks: TemplateQuirks) -> bool:
        text = self.render_plain([USER, ASSISTANT], quirks)
        return QUESTION in text and ANSWER in text

    def find_user_controls(self, quirks: TemplateQuirks) -> list[ControlToken]:
        """What stands between an answer and the next question, and behind that question."""
        rendered = self.render_tracked([USER, ASSISTANT, NEXT_USER], quirks)
        if rendered is None or ANSWER not in rendered.plain:
            return []
        answer_start = rendered.plain.index(ANSWER)
        return [match.control for match in rendered.controls if match.start > answer_start]

    def find_end_control(
        self, quirks: TemplateQuirks, messages: Sequence[Json], following: Json, answer: str
    ) -> ControlToken | None:
        """The token that ends the last of the messages, whose last text is `answer`."""
        rendered = self.render_tracked(messages, quirks)
        continued = self.render_plain([*messages, following], quirks)
        if rendered is None or answer not in rendered.plain:
            return None
        answer_end = rendered.plain.rindex(answer) + len(answer)
        closing: list[ControlMatch] = [
            candidate
            for candidate in rendered.controls
            if candidate.start >= answer_end and not candidate.control.is_structural
        ]
        if answer in continued:
            tail = continued[continued.rindex(answer) + len(answer) :]
            shared_end = answer_end + _count_common_prefix(rendered.plain[answer_end:], tail)
            shared_matches = [match for match in closing if match.token_end <= shared_end]
            closing = shared_matches[-1:] or closing
        return closing[0].control if closing else None


def _count_common_prefix(first: str, second: str) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
