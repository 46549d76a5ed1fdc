"""Check a render against plain Jinja, and note what the template left out of a row.

A note has the same words for every row, so that the data check can count its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.assistant_spans import (
    TOOL_CALLS_FIX,
    AssistantSpan,
    make_unrendered_error,
)
from tunesmith.data.chat_template.conversation import Conversation
from tunesmith.data.chat_template.encode import TrackedText
from tunesmith.data.chat_template.tracked_str import (
    TOOLS,
    get_message_index,
    make_origin,
)
from tunesmith.data.tokenizer.chat_tokenizer import get_partner

CONTROL_LIKE_TEXT = "text that looks like a control token is encoded as plain text"
STRUCTURAL = "structural tokens (such as <think>) in an answer are kept as tokens"
NO_TOOLS = "the chat template leaves out the tools"
NO_SYSTEM = "the chat template leaves out a system message"
NO_THINKING = "the chat template leaves out the thinking of an answer"
NO_CALLS = "the chat template leaves out the tool calls of an earlier turn"
NO_CONTENT = "the chat template leaves out the text next to a tool call"
PART_LOST = "the chat template leaves out a part of a message"
SERVED_PROMPT = "the chat template changes a prompt that an answer follows: the served one is used"
OPEN_THINKING = "the served prompt opens a block of thinking that the answer does not close"
PER_TURN = "one document per assistant turn: the chat template rewrites earlier turns"
BOUNDARY = "prompt and answer are encoded separately: the tokenizer would merge across them"
CUT_OFF = "messages after the last trained answer are cut: they change how it is rendered"
END_TOKEN_APPENDED = "the chat template writes no end token after an answer: one is appended"


def check_render(chat: Conversation, text: TrackedText, plain_text: str, count: int) -> None:
    """Raise InputError unless the render of the first `count` messages equals `plain_text`, the
    render by plain Jinja, and holds something of every user and tool message, and all tool calls if
    it holds any."""
    if plain_text != text.plain:
        raise InputError(
            "the tracked render differs from plain Jinja's", fix="please report this chat template"
        )
    for i, message in enumerate(chat.messages[:count]):
        _refuse_lost_calls(chat, i, message)
        is_optional = message["role"] in ("system", "assistant")
        if not is_optional and _is_omitted(i, message, text):
            raise make_unrendered_error(chat, i)


def _refuse_lost_calls(chat: Conversation, index: int, message: Json) -> None:
    """Raise InputError for tool calls of which the template writes only a part."""
    calls = message.get("tool_calls") or ()
    problem = ""
    fix = TOOL_CALLS_FIX
    if len(calls) > 1 and not chat.quirks.has_all_calls:
        problem = "writes only one of several tool calls"
        fix = f"put each call into a message of its own, followed by its result; or {fix}"
    elif not chat.quirks.has_arguments and any(map(_has_arguments, calls)):
        problem = "leaves out the arguments of tool calls"
    if problem:
        raise InputError(f"the chat template {problem} (message {index + 1})", fix=fix)


def _has_arguments(call: Json) -> bool:
    return call.get("function", call).get("arguments") not in (None, {}, "", "{}")


def collect_render_notes(
    chat: Conversation, text: TrackedText, spans: Sequence[AssistantSpan]
) -> list[str]:
    """Return the notes on a render that ends with the last of the trained turns `spans`, or of the
    full conversation without any."""
    count = spans[-1].message_index + 1 if spans else len(chat.messages)
    omitted = {
        i for i, message in enumerate(chat.messages[:count]) if _is_omitted(i, message, text)
    }
    notes = {
        CONTROL_LIKE_TEXT: text.has_control_like_text,
        STRUCTURAL: text.has_structural_tokens,
        NO_TOOLS: chat.tools is not None and TOOLS not in text.origins,
        NO_SYSTEM: any(chat.messages[i]["role"] == "system" for i in omitted),
        NO_THINKING: any(_is_thinking_dropped(chat, span) for span in spans),
        NO_CALLS: any(_has_unwritten_calls(i, chat.messages[i], text) for i in range(count)),
        NO_CONTENT: any(span.message_index in omitted for span in spans),
        PART_LOST: _is_part_lost(chat, text, spans, count),
        SERVED_PROMPT: any(span.splice_start is not None for span in spans),
        OPEN_THINKING: any(map(_is_in_thinking, spans)),
    }
    return [note for note, is_present in notes.items() if is_present]


def _is_in_thinking(span: AssistantSpan) -> bool:
    """Return whether the prompt of a spliced answer ends in a tag that nothing closes."""
    before = [match for match in span.text.controls if match.end <= span.start][-2:]
    if span.splice_start is None or not before:
        return False
    last = before[-1]
    partner = get_partner(last.control.text)
    is_at_end = not span.text.plain[last.end : span.start].strip()
    is_closed = before[0].control.text == partner or partner in span.text.plain[span.start :]
    return bool(partner) and is_at_end and not is_closed


def _is_omitted(index: int, message: Json, text: TrackedText) -> bool:
    """Return whether a message has content and none of it is in the text."""
    has_content = bool(_get_content(message).strip())
    return has_content and make_origin(index, "content") not in text.origins


def _get_content(message: Json) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        texts = [str(part.get("text", "")) for part in content if isinstance(part, dict)]
        content = "".join(texts)
    return str(content)


def _has_unwritten_calls(index: int, message: Json, text: TrackedText) -> bool:
    has_calls = bool(message.get("tool_calls"))
    return has_calls and make_origin(index, "tool_calls") not in text.origins


def _is_part_lost(
    chat: Conversation, text: TrackedText, spans: Sequence[AssistantSpan], count: int
) -> bool:
    """Return whether only a part of the content of a message is in the text. White space does not
    count, nor do earlier answers, of which templates cut the thinking."""
    num_chars: Counter[int] = Counter()
    for start, end, origin in text.origin_spans:
        num_chars[origin] += end - start
    answers = {span.message_index for span in spans if not _is_thinking_dropped(chat, span)}
    shortened: dict[int, str] = {}
    for i, message in enumerate(chat.messages[:count]):
        content = _get_content(message)
        is_checked = i in answers or message["role"] != "assistant"
        if is_checked and 0 < num_chars[make_origin(i, "content")] < len(content.strip()):
            shortened[i] = "".join(content.split())
    turns = _find_turns(text) if shortened else {}
    return any(turns[i].is_cut(content, text.plain) for i, content in shortened.items())


@dataclass
class _Turn:
    """Hold where a text has a message, between its neighbors, and how much of it."""

    start: int
    end: int
    num_written: int = 0  # characters of the message, without white space

    def is_cut(self, content: str, plain: str) -> bool:
        """Return whether a part of the content, without white space, was written neither from the
        message nor by the template, which may write the tags around thinking itself."""
        written = "".join(plain[self.start : self.end].split())
        return self.num_written < len(content) and content not in written


def _find_turns(text: TrackedText) -> dict[int, _Turn]:
    """Return the turn of each message that the text has, in one pass."""
    turns: dict[int, _Turn] = {}
    last_index = -1
    last_end = 0
    for start, end, origin in text.origin_spans:
        index = get_message_index(origin)
        if index < 0:
            continue
        if index != last_index and last_index >= 0:
            turns[last_index].end = min(turns[last_index].end, start)
        turn = turns.setdefault(index, _Turn(last_end, len(text.plain)))
        turn.num_written += len("".join(text.plain[start:end].split()))
        last_index = index
        last_end = end
    return turns


def _is_thinking_dropped(chat: Conversation, span: AssistantSpan) -> bool:
    message = chat.messages[span.message_index]
    if message.get("reasoning_content"):
        origins = span.text.get_origins(span.start, span.end)
        return make_origin(span.message_index, "reasoning") not in origins
    answer = span.text.plain[span.start : span.end]
    return "</think>" in str(message.get("content")) and "</think>" not in answer
