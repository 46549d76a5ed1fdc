"""Tool calls in answers: read while the answer grows, and written as OpenAI's deltas.

    ToolCallReader(tools).extend(text, is_end=...) -> CallUpdate
    ToolChatFormat(head, tools)     the format of a chat whose request has tools

A call is sent when it is complete, never a part of one, and what only looks like a call is content.
A stream and a body say the same, as one reader makes both. Left out: which tools there are
(tool_requests.py), the syntax (data/chat_template/tool_syntax.py)."""

from __future__ import annotations

import json
import secrets
from collections import defaultdict
from dataclasses import dataclass

from tunesmith.core.types import Json
from tunesmith.data.chat_template.call_forms import ObjectForm, ToolCall
from tunesmith.serve.formats import FINISH_REASONS, AnswerHead, ChatFormat, FinishedAnswer
from tunesmith.serve.scheduler import AnswerUpdate
from tunesmith.serve.tool_requests import OfferedTools

ID_CHARS = 9  # letters and digits, as Mistral's templates want them
TOOL_CALLS = "tool_calls"


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
        content = "" if self._tools.is_forced else answer.content
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
        if self._tools.is_forced:
            return 0
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

    def _format_message(self, answer: FinishedAnswer) -> tuple[Json, str]:
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
