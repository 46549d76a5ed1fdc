"""What kind of template this is, found out by rendering a few made-up messages.

    template, tokenizer -> Protocol: its habits, and the tokens that end an answer

The token that ends an answer is the last control token that the template writes after an answer whether or not another
message follows (`<|im_end|>`; not Phi-3's closing `<|endoftext|>`); if the two differ at once, the first after a last
answer (`<|return|>`). Some templates write none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.conversation import Chat, Habits, Variables
from tunesmith.data.chat_template.encode import Found, MarkedText
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer, Control

QUESTION, ANSWER, NEXT, NAME, KEY, VALUE = "Zqhello", "Zqanswer", "Zqnext", "zq_search", "zq_key", "zqvalue"
USER: Json = {"role": "user", "content": QUESTION}
ASSISTANT: Json = {"role": "assistant", "content": ANSWER}
NEXT_USER: Json = {"role": "user", "content": NEXT}
RESULT: Json = {"role": "tool", "tool_call_id": "call_1", "name": NAME, "content": NEXT}
TOOL: Json = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Search.",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "What."}}},
    },
}


@dataclass(frozen=True)
class Protocol:
    habits: Habits
    end_ids: tuple[int, ...]


def probe(template: ChatTemplate, tokenizer: ChatTokenizer, variables: Variables) -> Protocol:
    """Tokens that mark turns are made control tokens in the tokenizer: they must not come from an answer's text."""
    prober = _Prober(template, tokenizer, variables)
    parts = not prober.writes_answers(Habits()) and prober.writes_answers(Habits(parts=True))
    as_object, as_text = _call({KEY: VALUE}), _call(json.dumps({KEY: VALUE}))
    from_object = prober.plain([USER, as_object], Habits(parts))
    habits = Habits(
        parts,
        object_arguments=KEY in from_object and VALUE in from_object and f"'{KEY}'" not in from_object,
        text_arguments=json.dumps({KEY: VALUE}) in prober.plain([USER, as_text], Habits(parts)),
    )
    tokenizer.demote(prober.around_users(habits))
    call = as_object if habits.object_arguments else as_text
    ends = [
        prober.end(habits, [USER, ASSISTANT], NEXT_USER, ANSWER),
        prober.end(habits, [USER, call], RESULT, VALUE),
    ]
    controls = [end for end in ends if end is not None]
    tokenizer.demote(controls)
    return Protocol(habits, tuple(dict.fromkeys(control.id for control in controls)))


def _call(arguments: Any) -> Json:
    call = {"id": "call_1", "type": "function", "function": {"name": NAME, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@dataclass(frozen=True)
class _Prober:
    template: ChatTemplate
    tokenizer: ChatTokenizer
    variables: Variables

    def marked(self, messages: Sequence[Json], habits: Habits) -> MarkedText | None:
        """None if the template cannot render these messages."""
        tools = [TOOL] if any("tool_calls" in message for message in messages) else []
        try:
            chat = Chat(self.template, messages, tools, self.variables, habits)
            return MarkedText(chat.render(len(messages)), self.tokenizer, chat.assistants)
        except InputError:
            return None

    def plain(self, messages: Sequence[Json], habits: Habits) -> str:
        marked = self.marked(messages, habits)
        return marked.plain if marked else ""

    def writes_answers(self, habits: Habits) -> bool:
        text = self.plain([USER, ASSISTANT], habits)
        return QUESTION in text and ANSWER in text

    def around_users(self, habits: Habits) -> list[Control]:
        """What stands between an answer and the next question, and behind that question."""
        marked = self.marked([USER, ASSISTANT, NEXT_USER], habits)
        if marked is None or ANSWER not in marked.plain:
            return []
        begin = marked.plain.index(ANSWER)
        return [found.control for found in marked.controls if found.start > begin]

    def end(self, habits: Habits, messages: Sequence[Json], following: Json, answer: str) -> Control | None:
        """The token that ends the last of the messages, whose last text is `answer`."""
        last = self.marked(messages, habits)
        middle = self.plain([*messages, following], habits)
        if last is None or answer not in last.plain:
            return None
        begin = last.plain.rindex(answer) + len(answer)
        closing: list[Found] = [f for f in last.controls if f.start >= begin and not f.control.structural]
        if answer in middle:
            after = middle[middle.rindex(answer) + len(answer) :]
            shared = begin + _common(last.plain[begin:], after)
            both = [found for found in closing if found.core <= shared]
            closing = both[-1:] or closing
        return closing[0].control if closing else None


def _common(left: str, right: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
