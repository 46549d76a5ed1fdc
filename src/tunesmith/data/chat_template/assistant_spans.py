"""Where an answer begins and ends in what a template writes, and what the template left out.

    Chat, message -> Turn: the text up to that message, and the span of its answer

An answer begins where its prompt ends, so the prompt must be the start of the text. Some templates
write the prompt differently once an answer follows (Mistral's write the system message before the
last question only): then the prompt as it is served stands before the answer, if the template asks
for an answer and begins it with the same words. It ends behind the first control token after its
last character that is known to end answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.conversation import Conversation
from tunesmith.data.chat_template.encode import TrackedText
from tunesmith.data.chat_template.tracked_str import (
    FIELDS,
    TOOLS,
    TrackedStr,
    get_message_index,
    iter_spans,
    make_origin,
    to_plain,
)
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer

CONTROL_LIKE_TEXT = "text that looks like a control token is trained as text"
STRUCTURAL = "structural tokens inside an answer stay tokens"
NO_TOOLS = "the template does not write the tools"
NO_SYSTEM = "the template does not write a system message"
NO_THINKING = "the template leaves out the thinking of an answer"
NO_CONTENT = "the template leaves out the text beside a tool call"
TOOL_CALLS_FIX = "name a template that writes tool calls (`template:`), or leave such rows out"
SERVED_PROMPT = (
    "the prompt stands as it is served: with an answer behind it the template writes it differently"
)


@dataclass(frozen=True)
class AssistantSpan:
    """A trained answer: characters start:end of `marked`, which is rendered up to this message.
    `spliced`: where the answer begins in that render, if it does not begin with the prompt as
    served, which then stands there instead."""

    message_index: int
    weight: float
    text: TrackedText
    start: int
    end: int  # behind the end token
    has_end_token: bool  # False: the template writes no end token
    splice_start: int | None = None

    def render_plain(self, chat: Conversation) -> str:
        """The text of `marked` as inference engines write it."""
        rendered = chat.render_plain(self.message_index + 1)
        return (
            rendered
            if self.splice_start is None
            else chat.render_plain(self.message_index, add_generation_prompt=True)
            + rendered[self.splice_start :]
        )


def find_assistant_span(
    chat: Conversation,
    tokenizer: ChatTokenizer,
    message_index: int,
    weight: float,
    end_ids: Sequence[Iterable[int]],
) -> AssistantSpan:
    """`end_ids`: sets of ids that end answers, the better known first. Raises InputError."""
    prompt, rendered = (
        chat.render(message_index, add_generation_prompt=True),
        chat.render(message_index + 1),
    )
    splice_start = (
        None
        if to_plain(rendered).startswith(to_plain(prompt))
        else _find_answer_start(prompt, rendered, message_index)
    )
    text = rendered if splice_start is None else prompt + rendered[splice_start:]
    tracked_text = TrackedText(text, tokenizer, chat.assistant_indices)
    answer_origins = {make_origin(message_index, field) for field in FIELDS}
    content_end = max(
        (
            end
            for _, end, origin in tracked_text.origin_spans
            if origin in answer_origins and end > len(prompt)
        ),
        default=0,
    )
    if not content_end:
        raise _make_unrendered_error(chat, message_index)
    closing_matches = [match for match in tracked_text.controls if match.start >= content_end]
    end_match = next(
        (match for ids in end_ids for match in closing_matches if match.control.id in ids), None
    )
    answer_end = end_match.token_end if end_match else len(tracked_text.plain)
    turn = AssistantSpan(
        message_index,
        weight,
        tracked_text,
        len(prompt),
        answer_end,
        end_match is not None,
        splice_start,
    )
    _check_span(chat, turn)
    return turn


def _make_unrendered_error(chat: Conversation, message_index: int) -> InputError:
    role, has_calls = (
        chat.messages[message_index]["role"],
        bool(chat.messages[message_index].get("tool_calls")),
    )
    problem = f"the chat template writes nothing of message {message_index + 1} ({role}{', which calls tools' if has_calls else ''})"
    return InputError(problem, fix=TOOL_CALLS_FIX if has_calls else "")


def _find_answer_start(prompt: TrackedStr, rendered: TrackedStr, message_index: int) -> int:
    """Where in `written`, if behind the message before it the template goes on with the words that
    end `prompt`. Raises InputError for an answer that begins otherwise."""
    message_start = next(
        (
            start
            for start, _, origin in iter_spans(rendered)
            if get_message_index(origin) == message_index
        ),
        len(rendered),
    )
    (prompt_message, prompt_end), (previous_message, previous_end) = (
        _find_last_message(prompt),
        _find_last_message(rendered[:message_start]),
    )
    generation_prompt = to_plain(prompt)[prompt_end:]
    if (
        prompt_message != previous_message
        or not generation_prompt.strip()
        or not to_plain(rendered)[previous_end:message_start].startswith(generation_prompt)
    ):
        fix = "give a `template` that begins its answers as it asks for them, or answers that it can write so"
        raise InputError(_describe_mismatch(to_plain(prompt), to_plain(rendered)), fix=fix)
    return previous_end + len(generation_prompt)


def _find_last_message(text: TrackedStr) -> tuple[int, int]:
    """The message that wrote last, and where its words end."""
    message_ends = [
        (get_message_index(origin), end)
        for _, end, origin in iter_spans(text)
        if get_message_index(origin) >= 0
    ]
    return message_ends[-1] if message_ends else (-1, 0)


def _check_span(chat: Conversation, turn: AssistantSpan) -> None:
    origins = turn.text.get_origins(turn.start, turn.end)
    if TOOLS in origins or {get_message_index(origin) for origin in origins} - {
        -1,
        turn.message_index,
    }:
        raise InputError("the chat template writes another message inside an answer")
    if (
        chat.messages[turn.message_index].get("tool_calls")
        and make_origin(turn.message_index, "tool_calls") not in origins
    ):
        raise InputError(
            "the chat template does not write the tool calls of an answer", fix=TOOL_CALLS_FIX
        )


def _describe_mismatch(prompt: str, answer: str) -> str:
    common_length = next(
        (i for i, (a, b) in enumerate(zip(prompt, answer, strict=False)) if a != b), len(answer)
    )
    return (
        f"the chat template asks for an answer with {prompt[:common_length][-20:] + prompt[common_length:][:40]!r}, but would write this"
        f" one as {answer[:common_length][-20:] + answer[common_length:][:40]!r}"
    )


def check_render(chat: Conversation, text: TrackedText, plain_text: str, count: int) -> None:
    """The text must be what plain Jinja writes, `stock`, with something of every user and tool
    message in it."""
    if plain_text != text.plain:
        raise InputError(
            "the tracked render differs from plain Jinja's", fix="please report this template"
        )
    origins = _get_origins(text)
    for i, message in enumerate(chat.messages[:count]):
        is_unrendered = _has_content(message) and make_origin(i, "content") not in origins
        if is_unrendered and message["role"] not in ("system", "assistant"):
            raise _make_unrendered_error(chat, i)


def collect_render_notes(
    chat: Conversation, text: TrackedText, turns: Sequence[AssistantSpan]
) -> list[str]:
    origins = _get_origins(text)
    unrendered = [i for i, message in enumerate(chat.messages) if _has_content(message)]
    unrendered = [
        i
        for i in unrendered
        if i <= turns[-1].message_index and make_origin(i, "content") not in origins
    ]
    notes = {
        CONTROL_LIKE_TEXT: text.has_control_like_text,
        STRUCTURAL: text.has_structural_tokens,
        NO_TOOLS: chat.tools is not None and TOOLS not in origins,
        NO_SYSTEM: any(chat.messages[i]["role"] == "system" for i in unrendered),
        NO_THINKING: any(
            _is_thinking_dropped(chat.messages[turn.message_index], turn) for turn in turns
        ),
        NO_CONTENT: any(turn.message_index in unrendered for turn in turns),
        SERVED_PROMPT: any(turn.splice_start is not None for turn in turns),
    }
    return [note for note, is_present in notes.items() if is_present]


def _get_origins(text: TrackedText) -> set[int]:
    return {origin for _, _, origin in text.origin_spans}


def _has_content(message: Json) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        return any(isinstance(part, dict) and str(part.get("text", "")).strip() for part in content)
    return bool(content) and bool(str(content).strip())


def _is_thinking_dropped(message: Json, turn: AssistantSpan) -> bool:
    if message.get("reasoning_content"):
        return make_origin(turn.message_index, "reasoning") not in turn.text.get_origins(
            turn.start, turn.end
        )
    return (
        "</think>" in str(message.get("content"))
        and "</think>" not in turn.text.plain[turn.start : turn.end]
    )
