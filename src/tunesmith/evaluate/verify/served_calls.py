"""Tool calls of a server's answer, compared with those in the text that a run recorded.

    CallReader(renderer).restore(item, content, calls) -> the answer as a text

A run records what its model wrote, and a server that parses it returns calls. Both are read as
calls: if they are the same, so is the answer, however it was spaced. Otherwise the template writes
the served calls, so that the two texts can be compared. Left out: the syntax of calls
(data/chat_template/tool_syntax.py)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import measure_depth
from tunesmith.core.types import Json
from tunesmith.data.chat_template.conversation import MAX_CALL_DEPTH
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.chat_template.tool_syntax import ToolSyntax, learn_tool_syntax
from tunesmith.evaluate.verify.recorded_items import RecordedItem


@dataclass(frozen=True)
class ServedFunction:
    name: str
    arguments: str  # JSON


@dataclass(frozen=True)
class ServedCall:
    """A call as the API returns it."""

    function: ServedFunction


@dataclass(frozen=True, eq=False)
class CallReader:
    """The calls of a run's chat template."""

    renderer: Renderer

    @functools.cached_property
    def _syntax(self) -> ToolSyntax | None:
        """The syntax of calls; None if the template's calls cannot be read back."""
        try:
            return learn_tool_syntax(self.renderer)
        except InputError:
            return None

    def restore(self, item: RecordedItem, content: str, calls: Sequence[ServedCall]) -> str:
        """Return an answer as a text: a recorded one if it has the same content and calls."""
        if not calls:
            return content
        served = [content.strip(), *(_normalize(call) for call in calls)]
        for recorded in (item.after, item.before):
            if self._read(recorded, item) == served:
                return recorded
        return self._write(item, content, calls)

    def _read(self, text: str, item: RecordedItem) -> list[str]:
        """Return the content of a text and its calls."""
        functions = [cast("Json", tool.get("function", tool)) for tool in item.tools]
        schemas = {function["name"]: function.get("parameters") or {} for function in functions}
        answer = self._syntax.read(text, schemas) if self._syntax is not None else None
        if answer is None:
            return [text.strip()]
        calls = [_dump_call(call.name, call.arguments) for call in answer.calls]
        return [(answer.content + answer.rest).strip(), *calls]

    def _write(self, item: RecordedItem, content: str, calls: Sequence[ServedCall]) -> str:
        """Return what the template writes for calls; the calls themselves if it takes none."""
        plain = "\n".join(filter(None, [content, *map(_normalize, calls)]))
        written: list[Json] = []
        for index, call in enumerate(calls):
            arguments = _parse(call.function.arguments)
            if not isinstance(arguments, dict):
                return plain
            function = {"name": call.function.name, "arguments": arguments}
            written.append({"id": f"call0000{index}", "type": "function", "function": function})
        message: Json = {"role": "assistant", "content": content, "tool_calls": written}
        try:
            prompt = self.renderer.render_text(item.messages, item.tools, has_prompt=True)
            text = self.renderer.render_text([*item.messages, message], item.tools)
        except InputError:
            return plain
        if not text.startswith(prompt):
            return plain
        answer = text[len(prompt) :]
        ends = [answer.find(self.renderer.decode([token])) for token in self.renderer.end_ids]
        return answer[: min((end for end in ends if end >= 0), default=len(answer))]


def _parse(arguments: str) -> object:
    """Return arguments as an object; the text that is none, or that no template would be given."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if measure_depth(value) <= MAX_CALL_DEPTH else arguments


def _normalize(call: ServedCall) -> str:
    return _dump_call(call.function.name, _parse(call.function.arguments))


def _dump_call(name: str, arguments: object) -> str:
    """Return a call as a text that does not depend on spaces and the order of arguments."""
    return json.dumps([name, arguments], ensure_ascii=False, sort_keys=True)
