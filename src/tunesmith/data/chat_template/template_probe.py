"""Probe a chat template: render made-up messages to learn what it expects and how answers end.

    template, tokenizer -> TemplateProtocol: its quirks, and the tokens that end an answer

The end token is a control token that the template writes after an answer whether or not another
message follows (`<|im_end|>`; not Phi-3's closing `<|endoftext|>`), and before anything of the next
turn: its header, which some templates always write, a separator, a reminder. If the two renders
have none in common, it is the first after a last answer (`<|return|>`). Of several, it is one that
the model folder names as an end. Some templates write none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.assistant_spans import count_common_prefix
from tunesmith.data.chat_template.conversation import (
    Conversation,
    TemplateQuirks,
    TemplateVariables,
)
from tunesmith.data.chat_template.encode import ControlMatch, TrackedText
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.chat_template.tracked_str import get_message_index
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer, ControlToken

# Words that no template contains, without upper and lower case: some templates change it.
QUESTION = "7310562481"
ANSWER = "9604827153"
NEXT_QUESTION = "5829174036"
TOOL_NAME = "zq_search"
OTHER_TOOL_NAME = "zq_fetch"
ARG_KEY = "zq_key"
ARG_VALUE = "zqvalue"
SYSTEM_TEXT = "Zqsystem"
SYSTEM: Json = {"role": "system", "content": SYSTEM_TEXT}
USER: Json = {"role": "user", "content": QUESTION}
ASSISTANT: Json = {"role": "assistant", "content": ANSWER}
REASONED: Json = {**ASSISTANT, "reasoning_content": "3162095748", "thinking": "3162095748"}
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
    """A probe's result. `answer_tail` is set for a template that writes no end token but always
    begins the next turn: the text between an answer and that."""

    quirks: TemplateQuirks
    end_ids: tuple[int, ...]
    answer_tail: str | None = None


def probe_template(
    template: ChatTemplate, tokenizer: ChatTokenizer, variables: TemplateVariables
) -> TemplateProtocol:
    """Return the protocol of a template.

    Structural tokens that mark turns are demoted to control tokens in the tokenizer, since the text
    of an answer must not make them."""
    quirks = _QuirkProber(template, tokenizer, variables, TemplateQuirks()).probe_quirks()
    prober = _Prober(template, tokenizer, variables, quirks)
    prober.refuse_changed_answer()
    tokenizer.demote_structural(prober.find_user_controls())
    call = _make_tool_call({ARG_KEY: ARG_VALUE})
    if not quirks.can_render_dict_args:
        call = _make_tool_call(json.dumps({ARG_KEY: ARG_VALUE}))
    closing = prober.list_closing([USER, ASSISTANT], NEXT_USER, ANSWER)
    thinking_closing = prober.list_closing([USER, REASONED], NEXT_USER, ANSWER)
    end_control = prober.choose_end(closing, thinking_closing)
    call_closing = prober.list_closing([USER, call], TOOL_RESULT, ARG_VALUE)
    call_end = call_closing[-1] if call_closing else None
    if end_control in call_closing:
        call_end = end_control
    end_controls = [control for control in (end_control, call_end) if control is not None]
    tokenizer.demote_structural(end_controls)
    end_ids = dict.fromkeys(control.id for control in end_controls)
    answer_tail = prober.find_answer_tail() if end_control is None else None
    return TemplateProtocol(quirks, tuple(end_ids), answer_tail)


def _make_tool_call(arguments: Any, *names: str) -> Json:
    calls: list[Json] = []
    for i, name in enumerate(names or (TOOL_NAME,), start=1):
        function = {"name": name, "arguments": arguments}
        calls.append({"id": f"call_{i}", "type": "function", "function": function})
    return {"role": "assistant", "content": "", "tool_calls": calls}


@dataclass(frozen=True)
class _Prober:
    template: ChatTemplate
    tokenizer: ChatTokenizer
    variables: TemplateVariables
    quirks: TemplateQuirks

    def render_tracked(self, messages: Sequence[Json]) -> TrackedText | None:
        """Render messages, or return None if the template cannot. Some render only with tools."""
        has_calls = any("tool_calls" in message for message in messages)
        for tools in ([TOOL],) if has_calls else ([], [TOOL]):
            try:
                chat = Conversation(self.template, messages, tools, self.variables, self.quirks)
                text = chat.render(len(messages))
            except InputError:
                continue
            return TrackedText(text, self.tokenizer, chat.assistant_indices)
        return None

    def render_plain(self, messages: Sequence[Json]) -> str:
        rendered = self.render_tracked(messages)
        return rendered.plain if rendered else ""

    @cached_property
    def dialog(self) -> TrackedText | None:
        """An answer that a user message follows, or None if the template does not write both."""
        rendered = self.render_tracked([USER, ASSISTANT, NEXT_USER])
        if rendered is None:
            return None
        texts = (QUESTION, ANSWER, NEXT_QUESTION)
        return rendered if all(text in rendered.plain for text in texts) else None

    def refuse_changed_answer(self) -> None:
        """Raise InputError for a template that writes an answer, but not all of its text: its end
        would not be recognized, and the model would learn the changed text."""
        rendered = self.render_tracked([USER, ASSISTANT])
        if rendered is None or ANSWER in rendered.plain:
            return
        spans = [span for span in rendered.origin_spans if get_message_index(span[2]) == 1]
        written = "".join(rendered.plain[start:end] for start, end, _ in spans)
        if written:
            message = f"the chat template changes the text of answers: {ANSWER} to {written!r:.40}"
            raise InputError(message, fix="set a `chat_template` that writes answers as they are")

    def find_user_controls(self) -> list[ControlToken]:
        """Return the control tokens after an answer that a user message follows."""
        rendered = self.render_tracked([USER, ASSISTANT, NEXT_USER])
        if rendered is None or ANSWER not in rendered.plain:
            return []
        answer_start = rendered.plain.index(ANSWER)
        return [match.control for match in rendered.controls if match.start > answer_start]

    @cached_property
    def opener_ids(self) -> frozenset[int]:
        """The tokens that start a turn: those before the first message, and those of an answer's
        header. Tokens that the model folder names as ends are not among them."""
        openers: set[int] = set()
        for messages in ([SYSTEM, USER, ASSISTANT], [USER, ASSISTANT]):
            rendered = self.render_tracked(messages)
            first_text = messages[0]["content"]
            if rendered is not None and first_text in rendered.plain:
                openers |= _find_opening_ids(rendered, rendered.plain.index(first_text))
        if self.dialog is not None:
            openers |= self.user_closing_ids - _find_ids(self.dialog, ANSWER, NEXT_QUESTION)
        return frozenset(openers - set(self.tokenizer.end_ids))

    @cached_property
    def user_closing_ids(self) -> set[int]:
        """The control tokens between a question and its answer."""
        rendered = self.dialog or self.render_tracked([USER, ASSISTANT])
        return set() if rendered is None else _find_ids(rendered, QUESTION, ANSWER)

    @cached_property
    def start_ids(self) -> set[int | None]:
        """The tokens that start answers or texts."""
        bos_id = self.tokenizer.token_to_id(self.tokenizer.special_tokens.get("bos_token", ""))
        return {*self.user_closing_ids, bos_id}

    def list_closing(
        self, messages: Sequence[Json], following: Json, last_text: str
    ) -> list[ControlToken]:
        """Return the control tokens, at least one if there are any, that close the last message,
        whose text ends in `last_text`; none of the next turn."""
        rendered = self.render_tracked(messages)
        if rendered is None or last_text not in rendered.plain:
            return []
        answer_end = rendered.plain.rindex(last_text) + len(last_text)
        closing = self._cut_next_turn(rendered, answer_end)
        continued = self.render_plain([*messages, following])
        if last_text in continued:
            tail = continued[continued.rindex(last_text) + len(last_text) :]
            shared_end = answer_end + count_common_prefix(rendered.plain[answer_end:], tail)
            shared = [match for match in closing if match.token_end <= shared_end]
            is_opener = bool(closing) and closing[0].control.id in self.opener_ids
            closing = shared or closing[: 0 if is_opener else 1]
        return [match.control for match in closing]

    def _cut_next_turn(self, rendered: TrackedText, answer_end: int) -> list[ControlMatch]:
        """Return the control tokens after an answer up to one that starts a turn, or up to words
        after the first of them."""
        closing: list[ControlMatch] = []
        position = answer_end
        for match in rendered.controls:
            if match.start < answer_end:
                continue
            has_words = any(char.isalnum() for char in rendered.plain[position : match.start])
            is_role_change = not closing and match.control.id not in self.start_ids
            is_opener = match.control.id in self.opener_ids
            if is_opener and is_role_change and not has_words:
                return [match]  # GLM ends an answer by the token of the next user message
            if is_opener or (closing and has_words):
                break
            position = match.end
            if not match.control.is_structural:
                closing.append(match)
        return closing

    def choose_end(
        self, closing: Sequence[ControlToken], thinking_closing: Sequence[ControlToken]
    ) -> ControlToken | None:
        """Return the first token that the model folder names as an end, after an answer or else
        after one with reasoning (Unsloth's gpt-oss ends the others by `<|end|>`, as its reasoning).
        Without such a token, the first that closes questions too, else the first: a separator or a
        reminder comes after it."""
        for control in (*closing, *thinking_closing):
            if control.id in self.tokenizer.end_ids:
                return control
        question_ids = self.user_closing_ids - self.opener_ids
        return next(
            (each for each in closing if each.id in question_ids), next(iter(closing), None)
        )

    def find_answer_tail(self) -> str | None:
        """Return the text between an answer and the next turn, or None if the template begins no
        next turn after a last answer."""
        rendered = self.render_tracked([USER, ASSISTANT])
        if rendered is None or ANSWER not in rendered.plain:
            return None
        answer_end = rendered.plain.rindex(ANSWER) + len(ANSWER)
        tail = rendered.plain[answer_end:]
        if not any(char.isalnum() for char in tail):
            return None
        for match in rendered.controls:
            if match.start >= answer_end and match.control.id in self.opener_ids:
                tail = rendered.plain[answer_end : match.start]
                break
        if self.dialog is None:
            return tail
        before_question = self.dialog.plain[: self.dialog.plain.index(QUESTION)][::-1]
        next_turn = self.dialog.plain[
            self.dialog.plain.index(ANSWER) + len(ANSWER) : self.dialog.plain.index(NEXT_QUESTION)
        ]
        num_header_chars = count_common_prefix(before_question, next_turn[::-1])
        closing_text = next_turn[: len(next_turn) - num_header_chars]
        return tail[: count_common_prefix(tail, closing_text)]


class _QuirkProber(_Prober):
    """Probe the quirks, before a template can be rendered with them."""

    def probe_quirks(self) -> TemplateQuirks:
        quirks = TemplateQuirks(needs_content_parts=True)
        part_prober = _QuirkProber(self.template, self.tokenizer, self.variables, quirks)
        needs_parts = not self.can_render() and part_prober.can_render_parts()
        prober = part_prober if needs_parts else self
        arguments = {ARG_KEY: ARG_VALUE}
        dict_text = prober.render_plain([USER, _make_tool_call(arguments)])
        arguments_text = json.dumps(arguments)
        json_text = prober.render_plain([USER, _make_tool_call(arguments_text)])
        is_python_repr = f"'{ARG_KEY}'" in dict_text
        has_arguments = ARG_KEY in dict_text and ARG_VALUE in dict_text
        can_render_dict_args = has_arguments and not is_python_repr
        pair_arguments = arguments if can_render_dict_args else arguments_text
        pair = _make_tool_call(pair_arguments, TOOL_NAME, OTHER_TOOL_NAME)
        pair_text = prober.render_plain([USER, pair])
        call_texts = dict_text + json_text
        return TemplateQuirks(
            needs_parts,
            can_render_dict_args=can_render_dict_args,
            can_render_text_args=arguments_text in json_text,
            has_all_calls=(TOOL_NAME in pair_text) == (OTHER_TOOL_NAME in pair_text),
            has_arguments=TOOL_NAME not in call_texts or ARG_VALUE in call_texts,
        )

    def can_render(self) -> bool:
        text = self.render_plain([USER, ASSISTANT])
        return QUESTION in text and ANSWER in text

    def can_render_parts(self) -> bool:
        """Return whether content as parts is written as text, not as a list."""
        text = self.render_plain([USER, ASSISTANT])
        is_list = f"'text': '{QUESTION}'" in text or f'"text": "{QUESTION}"' in text
        return QUESTION in text and ANSWER in text and not is_list


def _find_ids(rendered: TrackedText, first_text: str, last_text: str) -> set[int]:
    """Return the ids of the control tokens between two texts, none if a text is missing."""
    if first_text not in rendered.plain or last_text not in rendered.plain:
        return set()
    start = rendered.plain.index(first_text)
    end = rendered.plain.index(last_text)
    return {match.control.id for match in rendered.controls if start < match.start < end}


def _find_opening_ids(rendered: TrackedText, end: int) -> set[int]:
    """Return the control tokens at the start of a text, up to character `end`: with one word at
    most between them (a role). What comes after may close a default message, an empty one too."""
    opening_ids: list[int] = []
    position = 0
    for match in rendered.controls:
        num_words = len(rendered.plain[position : match.start].split())
        if match.start >= end or num_words > 1:
            break
        if match.control.id in opening_ids:  # it starts a turn, the second here
            return set(opening_ids[: opening_ids.index(match.control.id) + 1])
        opening_ids.append(match.control.id)
        position = match.end
    return set(opening_ids)
