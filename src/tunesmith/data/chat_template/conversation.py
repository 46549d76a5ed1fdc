"""One conversation in the form that a chat template receives, each string tracked to its message.

    messages, tools -> Conversation; .render(count) -> TrackedStr of the first `count` messages

Messages are normalized as transformers does: null fields dropped, thinking under both of its keys.
Two quirks of templates are handled as well: content as a list of parts, and tool-call arguments as
an object or as JSON text. A role comes from a short list or from the template's own literals, so it
counts as text of the template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import suggest_name
from tunesmith.core.json_io import (
    MAX_TEXT_VALUES,
    describe_json_error,
    has_more_values,
    measure_depth,
)
from tunesmith.core.types import Json
from tunesmith.data.chat_template.sandbox_limits import MAX_WORK
from tunesmith.data.chat_template.template import ChatTemplate, RowSteps
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
TRACKED_COST = 2  # a step takes twice as long in a render with origins
# Of all renders of a row: some 2 or 3 s. Their characters have bounds of their own.
MAX_ROW_STEPS = 6 * MAX_WORK
SPLIT_FIX = "split the row, or set `train: false` on some answers"
MAX_CALL_DEPTH = 100  # of arguments in JSON text; those of an object are bounded with its row
_FIELD_BY_KEY = {"content": "content", "tool_calls": "tool_calls"} | dict.fromkeys(
    REASONING_KEYS, "reasoning"
)
_WORD = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True)
class TemplateQuirks:
    """The messages that a template expects, as probed by `template_probe.py`."""

    needs_content_parts: bool = False  # content as [{"type": "text", "text": ...}]
    can_render_dict_args: bool = True  # tool-call arguments as an object
    can_render_text_args: bool = True  # tool-call arguments as JSON text
    has_all_calls: bool = True  # not only one of several tool calls
    has_arguments: bool = True  # of tool calls, in any form


class TemplateVariables:
    """Variables of a template besides the conversation: special tokens and the user's settings.
    Their text counts as the template's."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.plain = dict(values)
        self.tracked = track_value(self.plain, TEMPLATE)


def list_settable_names(
    templates: Iterable[ChatTemplate], special_token_names: Iterable[str]
) -> list[str]:
    """Return the variables of templates that a user may set."""
    reserved = {*_build_context([], None, False), *special_token_names}
    names: set[str] = set()
    for template in templates:
        names |= template.undeclared_variables - reserved
    return sorted(names)


def refuse_unused_kwargs(
    names: Iterable[str], templates: Iterable[ChatTemplate], special_token_names: Iterable[str]
) -> None:
    """Raise InputError for a variable in `names` that no template uses, or that is reserved."""
    reserved = {*_build_context([], None, False), *special_token_names}
    used_names = list_settable_names(templates, special_token_names)
    for name in names:
        if name in reserved:
            message = f"{name} cannot be set: it comes from the rows or the tokenizer"
            raise InputError(message, where=TEMPLATE_KWARGS_KEY)
        if name not in used_names:
            fix = f"the template uses: {', '.join(used_names) or 'no variables'}"
            fix = suggest_name(name, used_names, default=fix)
            message = f"the chat template does not use {name}"
            raise InputError(message, where=TEMPLATE_KWARGS_KEY, fix=fix)


class Conversation:
    """Normalized messages (`messages`, `tools`) with the template that renders them."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Json],
        tools: Sequence[Json],
        variables: TemplateVariables,
        quirks: TemplateQuirks,
    ) -> None:
        """Raises InputError for a role that the template does not support."""
        self.template = template
        self.variables = variables
        self.quirks = quirks
        self.messages: list[Json] = []
        for message in messages:
            self.messages.append(_normalize_message(self._map_developer_role(message), quirks))
        self.tools = list(tools) or None
        self.assistant_indices = frozenset(
            i for i, message in enumerate(self.messages) if message.get("role") == "assistant"
        )
        self._steps = RowSteps()
        self._tracked_messages = [
            self._track_message(i, message) for i, message in enumerate(self.messages)
        ]

    def _map_developer_role(self, message: Json) -> Json:
        """Rename OpenAI's developer role to system, unless the template supports it."""
        if message.get("role") == "developer" and "developer" not in self.template.literals:
            return {**message, "role": "system"}
        return message

    def render(self, count: int, *, add_generation_prompt: bool = False) -> TrackedStr:
        """Render the first `count` messages. Raises InputError if the template refuses them."""
        messages = self._tracked_messages[:count]
        context = _build_context(messages, self._tracked_tools, add_generation_prompt)
        text = self.template.render(self.variables.tracked | context, self._steps)
        self._check_steps()
        return text

    def render_plain(self, count: int, *, add_generation_prompt: bool = False) -> str:
        """Render the first `count` messages with plain Jinja, as inference engines do."""
        context = _build_context(self.messages[:count], self.tools, add_generation_prompt)
        text = self.template.render_plain(self.variables.plain | context, self._steps)
        self._check_steps()
        return text

    def _check_steps(self) -> None:
        if self._steps.plain + TRACKED_COST * self._steps.tracked > MAX_ROW_STEPS:
            message = (
                f"rendering each trained turn of the {len(self.messages):,} messages with all"
                " messages before it is too much work for the chat template"
            )
            raise InputError(message, fix=SPLIT_FIX)

    @cached_property
    def full_plain_text(self) -> str:
        return self.render_plain(len(self.messages))

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
        if isinstance(role, str):
            is_literal = role in self.template.literals and _WORD.fullmatch(role)
            if role in ROLES or is_literal:
                return role
        raise InputError(
            f"the chat template does not support the role {role!r}",
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
    """Return a JSON value with all its strings, keys included, tracked to one origin."""
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
    if calls := normalized.get("tool_calls"):
        normalized["tool_calls"] = [_convert_call(call, quirks) for call in calls]
    return normalized


def _convert_call(call: Any, quirks: TemplateQuirks) -> Any:
    """Convert the arguments of a tool call between object and JSON text if the template renders
    only the other form."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments")
    if quirks.can_render_dict_args == quirks.can_render_text_args:
        return call
    if isinstance(arguments, str) and quirks.can_render_dict_args:
        if has_more_values(arguments, MAX_TEXT_VALUES):
            message = f"the arguments of a tool call have more than {MAX_TEXT_VALUES:,} values"
            raise InputError(message, fix="split or remove this row")
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            message = f"the arguments of a tool call cannot be read: {describe_json_error(error)}"
            raise InputError(message, fix="write a JSON object") from error
        if measure_depth(arguments) > MAX_CALL_DEPTH:
            message = f"the arguments of a tool call are nested deeper than {MAX_CALL_DEPTH} levels"
            raise InputError(message, fix="flatten them")
    elif isinstance(arguments, dict) and quirks.can_render_text_args:
        arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        return call
    converted = function | {"arguments": arguments}
    return call | {"function": converted} if "function" in call else converted
