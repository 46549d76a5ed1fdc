"""One conversation before a chat template: the messages as it wants them, each text knowing its message.

    messages, tools -> Chat; Chat.render(count) -> tracked text of the first `count` messages

Messages reach the template as transformers hands them over: null fields gone, thinking under both of its names. Two
habits of templates are met on top: content as a list of parts, and tool-call arguments as an object or as text.
Roles come from a short list or from the template's own words, so a role counts as the template's text.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.chat_template.tracked_str import TEMPLATE, TOOLS, Tracked, literal, origin_of

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
REASONING = ("reasoning_content", "thinking", "reasoning")
TOLD = "chat_template_kwargs"  # the recipe's key
_FIELD = {"content": "content", "tool_calls": "tool_calls"} | dict.fromkeys(REASONING, "reasoning")
_WORD = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True)
class Habits:
    """What a template expects of messages, found out by trying."""

    parts: bool = False  # content as [{"type": "text", "text": ...}]
    object_arguments: bool = True  # it can write arguments given as an object
    text_arguments: bool = True  # ... given as JSON text


class Variables:
    """What a template sees beside the conversation: special tokens and the user's settings; the template's own text."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.plain, self.tracked = dict(values), track(dict(values), TEMPLATE)


def refuse_unasked(told: Iterable[str], templates: Iterable[ChatTemplate], named: Iterable[str]) -> None:
    """InputError for a name in `told` that no template looks up, or that is not the user's to set."""
    reserved = {*_given([], None, False), *named}
    asks = sorted({name for template in templates for name in template.asks} - reserved)
    for name in told:
        if name in reserved:
            raise InputError(f"{name} is not yours to set: it comes from the rows or the tokenizer", where=TOLD)
        if name not in asks:
            near = difflib.get_close_matches(name, asks, n=1)
            fix = f"did you mean {near[0]}?" if near else f"it looks up: {', '.join(asks) or 'nothing'}"
            raise InputError(f"the chat template never looks up {name}", where=TOLD, fix=fix)


class Chat:
    """Raises InputError for a role that the template does not know."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Json],
        tools: Sequence[Json],
        variables: Variables,
        habits: Habits,
    ) -> None:
        self.template, self.variables = template, variables
        self.messages = [_as_wanted(self._known(message), habits) for message in messages]
        self.tools = list(tools) or None
        self.assistants = frozenset(i for i, message in enumerate(self.messages) if message.get("role") == "assistant")
        self._tracked = [self._track(i, message) for i, message in enumerate(self.messages)]

    def _known(self, message: Json) -> Json:
        """OpenAI's newer name of the system role, where a template does not know it."""
        if message.get("role") == "developer" and "developer" not in self.template.literals:
            return {**message, "role": "system"}
        return message

    def render(self, count: int, *, prompt: bool = False) -> Tracked:
        """The first `count` messages; with `prompt`, and the start of an answer after them."""
        return self.template.render(
            {**self.variables.tracked, **_given(self._tracked[:count], self._tracked_tools, prompt)}
        )

    def stock(self, count: int, *, prompt: bool = False) -> str:
        """The same text as inference engines write it."""
        return self.template.stock({**self.variables.plain, **_given(self.messages[:count], self.tools, prompt)})

    @cached_property
    def _tracked_tools(self) -> list[Any] | None:
        return None if self.tools is None else track(self.tools, TOOLS)

    def _track(self, index: int, message: Json) -> dict[Tracked, Any]:
        tracked: dict[Tracked, Any] = {}
        for key, value in message.items():
            origin = origin_of(index, _FIELD.get(key, "other"))
            tracked[literal(key, origin)] = track(value, origin)
        tracked[literal("role")] = literal(self._role(message.get("role")))
        return tracked

    def _role(self, role: Any) -> str:
        if isinstance(role, str) and (role in ROLES or (role in self.template.literals and _WORD.fullmatch(role))):
            return role
        raise InputError(f"the chat template knows no role {role!r}", fix=f"use one of {', '.join(sorted(ROLES))}")


def _given(messages: list[Any], tools: list[Any] | None, prompt: bool) -> dict[str, Any]:
    return {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}


def track(value: Any, origin: int) -> Any:
    """A JSON value whose texts, keys included, are all of one origin."""
    if isinstance(value, str):
        return literal(value, origin)
    if isinstance(value, dict):
        return {literal(key, origin): track(inner, origin) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [track(inner, origin) for inner in value]
    return value


def _as_wanted(message: Json, habits: Habits) -> Json:
    wanted = {key: value for key, value in message.items() if value is not None}
    reasoning = next((wanted[key] for key in REASONING if key in wanted), None)
    if reasoning is not None:
        wanted = {"thinking": reasoning} | wanted | {"reasoning_content": reasoning}
    if habits.parts and isinstance(wanted.get("content"), str):
        wanted["content"] = [{"type": "text", "text": wanted["content"]}]
    if wanted.get("tool_calls"):
        wanted["tool_calls"] = [_call(call, habits) for call in wanted["tool_calls"]]
    return wanted


def _call(call: Any, habits: Habits) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments")
    if isinstance(arguments, str) and habits.object_arguments and not habits.text_arguments:
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InputError(
                f"the arguments of a tool call are not JSON: {error}", fix="write a JSON object"
            ) from error
    elif isinstance(arguments, dict) and habits.text_arguments and not habits.object_arguments:
        arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        return call
    changed = function | {"arguments": arguments}
    return call | {"function": changed} if "function" in call else changed
