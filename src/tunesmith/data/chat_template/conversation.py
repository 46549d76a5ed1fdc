"""One conversation in the form that a chat template receives, each string tracked to its message.

    messages, tools -> Conversation; .render(count) -> TrackedStr of the first `count` messages

Messages are normalized as transformers does: null fields dropped, thinking under both of its keys.
Two quirks of templates are handled as well: content as a list of parts, and tool-call arguments as
an object or as JSON text. A role comes from a short list or from the template's own literals, so it
counts as text of the template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
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
from tunesmith.data.chat_template.compiled_template import (
    REASONING_KEYS,
    TemplateInput,
    TemplateVariables,
    build_context,
)
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.chat_template.tracked_str import TrackedStr

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
TEMPLATE_KWARGS_KEY = "chat_template_kwargs"  # the recipe's key
MAX_CALL_DEPTH = 100  # of arguments in JSON text; those of an object are bounded with its row
_WORD = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True)
class TemplateQuirks:
    """The messages that a template expects, as probed by `template_probe.py`."""

    needs_content_parts: bool = False  # content as [{"type": "text", "text": ...}]
    can_render_dict_args: bool = True  # tool-call arguments as an object
    can_render_text_args: bool = True  # tool-call arguments as JSON text
    has_all_calls: bool = True  # not only one of several tool calls
    has_arguments: bool = True  # of tool calls, in any form


def refuse_unused_kwargs(
    names: Iterable[str], templates: Iterable[ChatTemplate], special_token_names: Iterable[str]
) -> None:
    """Raise InputError for a variable in `names` that no template uses, or that is reserved."""
    reserved = {*build_context([], None, False), *special_token_names}
    used_names = sorted(set().union(*(each.undeclared_variables for each in templates)) - reserved)
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
        self.quirks = quirks
        self.messages: list[Json] = []
        for message in messages:
            self.messages.append(_normalize_message(self._map_developer_role(message), quirks))
        self.tools = list(tools) or None
        self.assistant_indices = frozenset(
            i for i, message in enumerate(self.messages) if message.get("role") == "assistant"
        )
        for message in self.messages:
            self._check_role(message.get("role"))
        self._input = TemplateInput(self.messages, self.tools, variables)

    def _map_developer_role(self, message: Json) -> Json:
        """Rename OpenAI's developer role to system, unless the template supports it."""
        if message.get("role") == "developer" and "developer" not in self.template.literals:
            return {**message, "role": "system"}
        return message

    def render(self, count: int, *, add_generation_prompt: bool = False) -> TrackedStr:
        """Render the first `count` messages. Raises InputError if the template refuses them."""
        return self.template.render(self._input, count, has_prompt=add_generation_prompt)

    def render_plain(self, count: int, *, add_generation_prompt: bool = False) -> str:
        """Render the first `count` messages with plain Jinja, as inference engines do."""
        return self.template.render_plain(self._input, count, has_prompt=add_generation_prompt)

    @cached_property
    def full_plain_text(self) -> str:
        return self.render_plain(len(self.messages))

    def _check_role(self, role: Any) -> None:
        if isinstance(role, str):
            is_literal = role in self.template.literals and _WORD.fullmatch(role)
            if role in ROLES or is_literal:
                return
        raise InputError(
            f"the chat template does not support the role {role!r}",
            fix=f"use one of {', '.join(sorted(ROLES))}",
        )


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
