"""Where an answer begins and ends in what a template writes, and what the template left out.

    Chat, message -> Turn: the text up to that message, and the span of its answer

An answer begins where its prompt ends, so the prompt must be the start of the text. Some templates write the prompt
differently once an answer follows (Mistral's write the system message before the last question only): then the prompt
as it is served stands before the answer, if the template asks for an answer and begins it with the same words. It ends
behind the first control token after its last character that is known to end answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.conversation import Chat
from tunesmith.data.chat_template.encode import MarkedText
from tunesmith.data.chat_template.tracked_str import FIELDS, TOOLS, Tracked, message_of, origin_of, plain, stretches
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer

FOREIGN = "text that looks like a control token is trained as text"
STRUCTURAL = "structural tokens inside an answer stay tokens"
NO_TOOLS = "the template does not write the tools"
NO_SYSTEM = "the template does not write a system message"
NO_THINKING = "the template leaves out the thinking of an answer"
NO_CONTENT = "the template leaves out the text beside a tool call"
CALLS_FIX = "name a template that writes tool calls (`template:`), or leave such rows out"
SERVED = "the prompt stands as it is served: with an answer behind it the template writes it differently"


@dataclass(frozen=True)
class Turn:
    """A trained answer: characters start:end of `marked`, which is rendered up to this message. `spliced`: where the
    answer begins in that render, if it does not begin with the prompt as served, which then stands there instead."""

    message: int
    weight: float
    marked: MarkedText
    start: int
    end: int  # behind the end token
    closed: bool  # False: the template writes no end token
    spliced: int | None = None

    def stock(self, chat: Chat) -> str:
        """The text of `marked` as inference engines write it."""
        written = chat.stock(self.message + 1)
        return written if self.spliced is None else chat.stock(self.message, prompt=True) + written[self.spliced :]


def find_turn(
    chat: Chat, tokenizer: ChatTokenizer, message: int, weight: float, end_ids: Sequence[Iterable[int]]
) -> Turn:
    """`end_ids`: sets of ids that end answers, the better known first. Raises InputError."""
    prompt, written = chat.render(message, prompt=True), chat.render(message + 1)
    spliced = None if plain(written).startswith(plain(prompt)) else _answer_begins(prompt, written, message)
    text = written if spliced is None else prompt + written[spliced:]
    marked = MarkedText(text, tokenizer, chat.assistants)
    own = {origin_of(message, field) for field in FIELDS}
    last = max((end for _, end, origin in marked.stretches if origin in own and end > len(prompt)), default=0)
    if not last:
        raise _unwritten(chat, message)
    closing = [found for found in marked.controls if found.start >= last]
    end = next((found for ids in end_ids for found in closing if found.control.id in ids), None)
    ends = end.core if end else len(marked.plain)
    turn = Turn(message, weight, marked, len(prompt), ends, end is not None, spliced)
    _check_span(chat, turn)
    return turn


def _unwritten(chat: Chat, message: int) -> InputError:
    role, calls = chat.messages[message]["role"], bool(chat.messages[message].get("tool_calls"))
    what = f"the chat template writes nothing of message {message + 1} ({role}{', which calls tools' if calls else ''})"
    return InputError(what, fix=CALLS_FIX if calls else "")


def _answer_begins(prompt: Tracked, written: Tracked, message: int) -> int:
    """Where in `written`, if behind the message before it the template goes on with the words that end `prompt`. Raises
    InputError for an answer that begins otherwise."""
    own = next((start for start, _, origin in stretches(written) if message_of(origin) == message), len(written))
    (asker, asked), (before, begun) = _last_said(prompt), _last_said(written[:own])
    words = plain(prompt)[asked:]
    if asker != before or not words.strip() or not plain(written)[begun:own].startswith(words):
        fix = "give a `template` that begins its answers as it asks for them, or answers that it can write so"
        raise InputError(_mismatch(plain(prompt), plain(written)), fix=fix)
    return begun + len(words)


def _last_said(text: Tracked) -> tuple[int, int]:
    """The message that wrote last, and where its words end."""
    said = [(message_of(origin), end) for _, end, origin in stretches(text) if message_of(origin) >= 0]
    return said[-1] if said else (-1, 0)


def _check_span(chat: Chat, turn: Turn) -> None:
    writers = turn.marked.writers(turn.start, turn.end)
    if TOOLS in writers or {message_of(origin) for origin in writers} - {-1, turn.message}:
        raise InputError("the chat template writes another message inside an answer")
    if chat.messages[turn.message].get("tool_calls") and origin_of(turn.message, "tool_calls") not in writers:
        raise InputError("the chat template does not write the tool calls of an answer", fix=CALLS_FIX)


def _mismatch(prompt: str, answer: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(prompt, answer, strict=False)) if a != b), len(answer))
    return (
        f"the chat template asks for an answer with {prompt[:same][-20:] + prompt[same:][:40]!r}, but would write this"
        f" one as {answer[:same][-20:] + answer[same:][:40]!r}"
    )


def check_written(chat: Chat, text: MarkedText, stock: str, count: int) -> None:
    """The text must be what plain Jinja writes, `stock`, with something of every user and tool message in it."""
    if stock != text.plain:
        raise InputError("the tracked render differs from plain Jinja's", fix="please report this template")
    writers = _writers(text)
    for i, message in enumerate(chat.messages[:count]):
        silent = _says_something(message) and origin_of(i, "content") not in writers
        if silent and message["role"] not in ("system", "assistant"):
            raise _unwritten(chat, i)


def notes_on(chat: Chat, text: MarkedText, turns: Sequence[Turn]) -> list[str]:
    writers = _writers(text)
    lost = [i for i, message in enumerate(chat.messages) if _says_something(message)]
    lost = [i for i in lost if i <= turns[-1].message and origin_of(i, "content") not in writers]
    notes = {
        FOREIGN: text.foreign,
        STRUCTURAL: text.structural,
        NO_TOOLS: chat.tools is not None and TOOLS not in writers,
        NO_SYSTEM: any(chat.messages[i]["role"] == "system" for i in lost),
        NO_THINKING: any(_lost_thinking(chat.messages[turn.message], turn) for turn in turns),
        NO_CONTENT: any(turn.message in lost for turn in turns),
        SERVED: any(turn.spliced is not None for turn in turns),
    }
    return [note for note, holds in notes.items() if holds]


def _writers(text: MarkedText) -> set[int]:
    return {origin for _, _, origin in text.stretches}


def _says_something(message: Json) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        return any(isinstance(part, dict) and str(part.get("text", "")).strip() for part in content)
    return bool(content) and bool(str(content).strip())


def _lost_thinking(message: Json, turn: Turn) -> bool:
    if message.get("reasoning_content"):
        return origin_of(turn.message, "reasoning") not in turn.marked.writers(turn.start, turn.end)
    return "</think>" in str(message.get("content")) and "</think>" not in turn.marked.plain[turn.start : turn.end]
