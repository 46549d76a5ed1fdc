"""The tools of a request: what the template gets, and the calls of an answer.

    find_tools(body, model) -> OfferedTools, or RequestError 400
    ToolChatFormat(head, tools)     the format of a chat whose request has tools

Strict: tools are refused for a template whose calls cannot be read back, and so is whatever an
answer could break: `strict` arguments, one call at most, a schema beside tools. A call is sent when
it is complete, never a part of one, and what only looks like a call is content. A stream and a
body say the same, as one reader makes both. Left out: the syntax of calls
(data/chat_template/tool_syntax.py)."""

from __future__ import annotations

import functools
import json
import secrets
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.chat_template.tool_syntax import (
    ObjectForm,
    ToolCall,
    ToolSyntax,
    learn_tool_syntax,
)
from tunesmith.serve.bodies import ChatBody, ChatMessage, parse_json
from tunesmith.serve.errors import RequestError
from tunesmith.serve.formats import FINISH_REASONS, Answer, AnswerHead, ChatFormat
from tunesmith.serve.registry import ServedModel
from tunesmith.serve.scheduler import AnswerUpdate

ANY_ARGUMENTS: Json = {"type": "object"}
ID_CHARS = 9  # letters and digits, as Mistral's templates want them
TOOL_CALLS = "tool_calls"


@dataclass(frozen=True)
class OfferedTools:
    """The tools that an answer may call: name -> schema of the arguments."""

    syntax: ToolSyntax
    schemas: Mapping[str, Json]


def to_template_message(message: ChatMessage) -> Json:
    """Return a message as templates take it, with objects as arguments. Raises RequestError."""
    content: Json = {"role": message.role, "content": message.get_text()}
    for key in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, key)) is not None:
            content[key] = value
    calls: list[Json] = []
    for call in message.tool_calls or ():
        arguments = _parse_arguments(call.function.arguments)
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id, "type": "function", "function": function})
    return {**content, "tool_calls": calls} if calls else content


def _parse_arguments(text: str) -> Json:
    try:
        arguments = parse_json(text.encode())
    except RequestError as error:
        message = f"the arguments of a tool call cannot be read: {error.message}"
        raise RequestError(400, message, param="messages") from None
    if not isinstance(arguments, dict):
        message = "the arguments of a tool call are not a JSON object"
        raise RequestError(400, message, param="messages")
    return arguments


def list_tools(body: ChatBody) -> list[Json]:
    """Return the tools as templates take them."""
    tools: list[Json] = []
    for tool in body.active_tools:
        function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
        tools.append({"type": "function", "function": function})
    return tools


def find_tools(body: ChatBody, model: ServedModel) -> OfferedTools:
    """Return the tools of a request that has some. Raises RequestError 400 for what this model
    cannot do. Slow for a new template: runs on a worker."""
    tools = body.active_tools
    if isinstance(syntax := _learn_once(model.renderer), str):
        message = f"this model has no tools: {syntax}"
        raise RequestError(400, message, code="tools_not_supported", param="tools")
    _refuse_unenforceable(body, model, syntax)
    schemas = {tool.function.name: tool.function.parameters or ANY_ARGUMENTS for tool in tools}
    return OfferedTools(syntax, schemas)


@functools.lru_cache(maxsize=64)
def _learn_once(renderer: Renderer) -> ToolSyntax | str:
    """Return the syntax of a template's calls, or why there is none."""
    try:
        return learn_tool_syntax(renderer)
    except InputError as error:
        return error.message


def _refuse_unenforceable(body: ChatBody, model: ServedModel, syntax: ToolSyntax) -> None:
    """Raise RequestError 400 for a promise that an answer could break."""
    wanted = body.response_format
    if (wanted is not None and wanted.type != "text") or (wanted is None and model.schema):
        message = "an answer cannot follow a schema and call tools; send tool_choice: none"
        raise RequestError(400, message, code="tools_not_supported", param="response_format")
    for index, tool in enumerate(body.active_tools):
        if tool.function.strict:
            message = "arguments are not enforced; leave strict out and check them"
            param = f"tools[{index}].function.strict"
            raise RequestError(400, message, code="tools_not_supported", param=param)
    if body.parallel_tool_calls is False and syntax.separator is not None:
        message = "this template may write several calls; leave parallel_tool_calls out"
        raise RequestError(400, message, code="tools_not_supported", param="parallel_tool_calls")


@dataclass(frozen=True)
class CallUpdate:
    """The content and the complete calls that a piece of text adds to an answer."""

    content: str = ""
    calls: tuple[ToolCall, ...] = ()


class ToolCallReader:
    """Splits an answer that arrives in pieces into content and calls."""

    def __init__(self, tools: OfferedTools) -> None:
        self._tools = tools
        self._text = ""
        self._num_content_chars = 0
        self.num_calls = 0

    def extend(self, text: str, *, is_end: bool) -> CallUpdate:
        """Return what a further piece decides; at the end, everything."""
        self._text += text
        answer = self._tools.syntax.read(self._text, self._tools.schemas)
        if answer is None:
            end = len(self._text) if is_end else self._find_settled_end()
            return CallUpdate(self._take_content(self._text[:end]))
        content = answer.content
        if is_end:
            content += answer.rest  # after the calls: nothing is lost
        calls = answer.calls[self.num_calls :]
        self.num_calls = len(answer.calls)
        return CallUpdate(self._take_content(content), calls)

    def _take_content(self, content: str) -> str:
        """Return the part of the content that was not taken before."""
        new = content[self._num_content_chars :]
        self._num_content_chars = max(self._num_content_chars, len(content))
        return new

    def _find_settled_end(self) -> int:
        """Return where the text ends that cannot become a call, or the space before one."""
        word = self._tools.syntax.first_word
        if not word:
            start = self._text.lstrip()[:1]
            is_object = isinstance(self._tools.syntax.form, ObjectForm)
            return len(self._text) if is_object and start not in ("", "{") else 0
        end = self._text.find(word)
        if end < 0:
            end = max(0, len(self._text) - len(word) + 1)
            while not word.startswith(self._text[end:]):
                end += 1
        return len(self._text[:end].rstrip())


class ToolChatFormat(ChatFormat):
    """/v1/chat/completions with tools."""

    def __init__(self, head: AnswerHead, tools: OfferedTools) -> None:
        super().__init__(head)
        self._tools = tools
        self._readers: defaultdict[int, ToolCallReader] = defaultdict(lambda: ToolCallReader(tools))

    def _format_message(self, answer: Answer) -> tuple[Json, str]:
        reader = ToolCallReader(self._tools)
        update = reader.extend(answer.text, is_end=True)
        message: Json = {"role": "assistant", "content": update.content, "refusal": None}
        if update.calls:
            message["content"] = update.content or None
            message["tool_calls"] = [_format_call(call) for call in update.calls]
        return message, _name_finish(answer.finish_reason, reader)

    def _format_delta(self, update: AnswerUpdate) -> tuple[Json, str | None]:
        reader = self._readers[update.index]
        first = reader.num_calls
        gain = reader.extend(update.text, is_end=bool(update.finish_reason))
        delta: Json = {"content": gain.content} if gain.content else {}
        calls: list[Json] = []
        for index, call in enumerate(gain.calls, start=first):
            calls.append({"index": index, **_format_call(call)})
        if calls:
            delta["tool_calls"] = calls
        return delta, _name_finish(update.finish_reason, reader) if update.finish_reason else None


def _format_call(call: ToolCall) -> Json:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": secrets.token_hex(ID_CHARS)[:ID_CHARS], "type": "function", "function": function}


def _name_finish(finish_reason: str, reader: ToolCallReader) -> str:
    """Return OpenAI's word for why an answer ended: a limit counts more than calls before it."""
    reason = FINISH_REASONS[finish_reason]
    return TOOL_CALLS if reader.num_calls and reason == "stop" else reason
