"""Check a render against plain Jinja, and note what the template left out of a row.

A note has the same words for every row, so that the data check can count its rows."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.assistant_spans import AssistantSpan, make_unrendered_error
from tunesmith.data.chat_template.conversation import Conversation
from tunesmith.data.chat_template.encode import TrackedText
from tunesmith.data.chat_template.tracked_str import TOOLS, make_origin

CONTROL_LIKE_TEXT = "text that looks like a control token is encoded as plain text"
STRUCTURAL = "structural tokens (such as <think>) in an answer are kept as tokens"
NO_TOOLS = "the chat template leaves out the tools"
NO_SYSTEM = "the chat template leaves out a system message"
NO_THINKING = "the chat template leaves out the thinking of an answer"
NO_CONTENT = "the chat template leaves out the text next to a tool call"
SERVED_PROMPT = "the chat template changes a prompt that an answer follows: the served one is used"
PER_TURN = "one document per assistant turn: the chat template rewrites earlier turns"
BOUNDARY = "prompt and answer are encoded separately: the tokenizer would merge across them"
CUT_OFF = "messages after the last trained answer are cut: they change how it is rendered"
END_TOKEN_APPENDED = "the chat template writes no end token after an answer: one is appended"


def check_render(chat: Conversation, text: TrackedText, plain_text: str, count: int) -> None:
    """Raise InputError unless the render of the first `count` messages equals `plain_text`, the
    render by plain Jinja, and holds something of every user and tool message."""
    if plain_text != text.plain:
        raise InputError(
            "the tracked render differs from plain Jinja's", fix="please report this chat template"
        )
    for i, message in enumerate(chat.messages[:count]):
        is_optional = message["role"] in ("system", "assistant")
        if not is_optional and _is_omitted(i, message, text):
            raise make_unrendered_error(chat, i)


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
        NO_CONTENT: any(span.message_index in omitted for span in spans),
        SERVED_PROMPT: any(span.splice_start is not None for span in spans),
    }
    return [note for note, is_present in notes.items() if is_present]


def _is_omitted(index: int, message: Json, text: TrackedText) -> bool:
    """Return whether a message has content and none of it is in the text."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [str(part.get("text", "")) for part in content if isinstance(part, dict)]
        content = "".join(texts)
    has_content = bool(content) and bool(str(content).strip())
    return has_content and make_origin(index, "content") not in text.origins


def _is_thinking_dropped(chat: Conversation, span: AssistantSpan) -> bool:
    message = chat.messages[span.message_index]
    if message.get("reasoning_content"):
        origins = span.text.get_origins(span.start, span.end)
        return make_origin(span.message_index, "reasoning") not in origins
    answer = span.text.plain[span.start : span.end]
    return "</think>" in str(message.get("content")) and "</think>" not in answer
