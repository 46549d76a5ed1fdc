"""One conversation before a chat template: the messages as it wants them, each text knowing its
message.

    messages, tools -> Chat; Chat.render(count) -> tracked text of the first `count` messages

Messages reach the template as transformers hands them over: null fields gone, thinking under both
of its names. Two habits of templates are met on top: content as a list of parts, and tool-call
arguments as an object or as text. Roles come from a short list or from the template's own words, so
a role counts as the template's text."""

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
from tunesmith.data.chat_template.tracked_str import (
    TEMPLATE,
    TOOLS,
    TrackedStr,
    make_origin,
    track_str,
)

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
TEMPLATE_KWARGS_KEY = "chat_template_kwargs"  # the recipe's key
_FIELD_BY_KEY = {"content": "content", "tool_calls": "tool_calls"} | dict.fromkeys(
    REASONING_KEYS, "reasoning"
)
_WORD = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True)
class TemplateQuirks:
    """What a template expects of messages, found out by trying."""

    needs_content_parts: bool = False  # content as [{"type": "text", "text": ...}]
    can_render_dict_args: bool = True  # it can write arguments given as an object
    can_render_text_args: bool = True  # ... given as JSON text


class TemplateVariables:
    """What a template sees beside the conversation: special tokens and the user's settings; the
    template's own text."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.plain, self.tracked = dict(values), track_value(dict(values), TEMPLATE)


def refuse_unused_kwargs(
    names: Iterable[str], templates: Iterable[ChatTemplate], special_token_names: Iterable[str]
) -> None:
    """InputError for a name in `told` that no template looks up, or that is not the user's to
    set."""
    reserved = {*_build_context([], None, False), *special_token_names}
    used_names = sorted(
        {name for template in templates for name in template.undeclared_variables} - reserved
    )
    for name in names:
        if name in reserved:
            raise InputError(
                f"{name} is not yours to set: it comes from the rows or the tokenizer",
                where=TEMPLATE_KWARGS_KEY,
            )
        if name not in used_names:
            close_matches = difflib.get_close_matches(name, used_names, n=1)
            fix = (
                f"did you mean {close_matches[0]}?"
                if close_matches
                else f"it looks up: {', '.join(used_names) or 'nothing'}"
            )
            raise InputError(
                f"the chat template never looks up {name}", where=TEMPLATE_KWARGS_KEY, fix=fix
            )


class Conversation:
    """Raises InputError for a role that the template does not know."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Json],
        tools: Sequence[Json],
        variables: TemplateVariables,
        quirks: TemplateQuirks,
    ) -> None:
        self.template, self.variables = template, variables
        self.messages = [
            _normalize_message(self._map_developer_role(message), quirks) for message in messages
        ]
        self.tools = list(tools) or None
        self.assistant_indices = frozenset(
            i for i, message in enumerate(self.messages) if message.get("role") == "assistant"
        )
        self._tracked_messages = [
            self._track_message(i, message) for i, message in enumerate(self.messages)
        ]

    def _map_developer_role(self, message: Json) -> Json:
        """OpenAI's newer name of the system role, where a template does not know it."""
        if message.get("role") == "developer" and "developer" not in self.template.literals:
            return {**message, "role": "system"}
        return message

    def render(self, count: int, *, add_generation_prompt: bool = False) -> TrackedStr:
        """The first `count` messages; with `prompt`, and the start of an answer after them."""
        return self.template.render(
            {
                **self.variables.tracked,
                **_build_context(
                    self._tracked_messages[:count], self._tracked_tools, add_generation_prompt
                ),
            }
        )

    def render_plain(self, count: int, *, add_generation_prompt: bool = False) -> str:
        """The same text as inference engines write it."""
        return self.template.render_plain(
            {
                **self.variables.plain,
                **_build_context(self.messages[:count], self.tools, add_generation_prompt),
            }
        )

    @cached_property
    def _tracked_tools(self) -> list[Any] | None:
        return None if self.tools is None else track_value(self.tools, TOOLS)

    def _track_message(self, index: int, message: Json) -> dict[TrackedStr, Any]:
        tracked: dict[TrackedStr, Any] = {}
        for key, value in message.items():
            origin = make_origin(index, _FIELD_BY_KEY.get(key, "other"))
            tracked[track_str(key, origin)] = track_value(value, origin)
        tracked[track_str("role")] = track_str(self._check_role(message.get("role")))
        return tracked

    def _check_role(self, role: Any) -> str:
        if isinstance(role, str) and (
            role in ROLES or (role in self.template.literals and _WORD.fullmatch(role))
        ):
            return role
        raise InputError(
            f"the chat template knows no role {role!r}",
            fix=f"use one of {', '.join(sorted(ROLES))}",
        )


def _build_context(
    messages: list[Any], tools: list[Any] | None, add_generation_prompt: bool
) -> dict[str, Any]:
    return {
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }


def track_value(value: Any, origin: int) -> Any:
    """A JSON value whose texts, keys included, are all of one origin."""
    if isinstance(value, str):
        return track_str(value, origin)
    if isinstance(value, dict):
        return {track_str(key, origin): track_value(inner, origin) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [track_value(inner, origin) for inner in value]
    return value


def _normalize_message(message: Json, quirks: TemplateQuirks) -> Json:
    normalized = {key: value for key, value in message.items() if value is not None}
    reasoning = next((normalized[key] for key in REASONING_KEYS if key in normalized), None)
    if reasoning is not None:
        normalized = {"thinking": reasoning} | normalized | {"reasoning_content": reasoning}
    if quirks.needs_content_parts and isinstance(normalized.get("content"), str):
        normalized["content"] = [{"type": "text", "text": normalized["content"]}]
    if normalized.get("tool_calls"):
        normalized["tool_calls"] = [
            _convert_call(call, quirks) for call in normalized["tool_calls"]
        ]
    return normalized


def _convert_call(call: Any, quirks: TemplateQuirks) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments")
    if (
        isinstance(arguments, str)
        and quirks.can_render_dict_args
        and not quirks.can_render_text_args
    ):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InputError(
                f"the arguments of a tool call are not JSON: {error}", fix="write a JSON object"
            ) from error
    elif (
        isinstance(arguments, dict)
        and quirks.can_render_text_args
        and not quirks.can_render_dict_args
    ):
        arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        return call
    converted = function | {"arguments": arguments}
    return call | {"function": converted} if "function" in call else converted
