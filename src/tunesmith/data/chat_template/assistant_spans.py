"""Locate the trained answers in a rendered conversation, as characters and as tokens.

    Conversation, turn weights -> find_assistant_spans -> AssistantSpan of each trained turn
    AssistantSpan, EncodedText -> find_token_spans     -> (first token, end, weight)
    Conversation, EncodedText, weights -> find_message_spans -> the same for messages of other roles

An answer starts where its generation prompt ends, so the prompt must be a prefix of the text. Some
templates write the prompt differently once an answer follows (Mistral's put the system message in
the last question only). Then the prompt as it is served is put in front of the answer, if the
template starts the answer with the same generation prompt. An answer ends after the first end token
that follows its last character; without one, before anything of the next turn.

Where the render of all messages starts with what is served at every trained turn, as plain Jinja
writes it, `find_spans_in_full` finds the same spans there, from one tracked render."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from tunesmith.core.errors import InputError
from tunesmith.core.types import CharSpan, Example, Json, RowWeight
from tunesmith.data.chat_template.conversation import Conversation
from tunesmith.data.chat_template.encode import EncodedText, TrackedText
from tunesmith.data.chat_template.template import SPLIT_FIX
from tunesmith.data.chat_template.tracked_str import (
    FIELDS,
    TOOLS,
    TrackedStr,
    get_message_index,
    get_plain_text,
    iter_spans,
    make_origin,
)
from tunesmith.data.tokenizer.chat_tokenizer import ChatTokenizer

TokenSpan = tuple[int, int, float]  # first token, one past the last, loss weight
MAX_MESSAGE_RENDERS = 500_000  # trained turns x messages of a row: 1,000 messages that alternate
MAX_TURN_CHARS = 10_000_000  # of a row of which each trained turn is encoded as a document
TOOL_CALLS_FIX = "set a `chat_template` that writes tool calls, or drop such rows"
END_FIX = "set a `chat_template` that writes it only after an answer"
PREFIX_FIX = (
    "set a `chat_template` that starts each answer with its generation prompt, or set"
    " `chat_template_kwargs` such as {enable_thinking: false} and let the server send the same"
)


@dataclass(frozen=True)
class AssistantSpan:
    """A trained answer: characters start:end of `text`, the render up to this message or further.

    If that render does not start with the prompt as it is served, `text` is the served prompt plus
    the render from character `splice_start` on."""

    message_index: int
    weight: float
    text: TrackedText
    start: int
    end: int  # after the end token
    has_end_token: bool  # False: the template writes no end token
    splice_start: int | None = None
    cut_end: int | None = None  # where the next turn begins, which is not in `text`

    def is_served_in(self, full_text: TrackedText) -> bool:
        """Return whether the render of all messages starts with what is served at this turn."""
        is_prefix = full_text.plain.startswith(self.text.plain[: self.end])
        return is_prefix and self.has_end_token and self.splice_start is None

    def render_plain(self, chat: Conversation) -> str:
        """Return `text` as plain Jinja renders it."""
        rendered = chat.render_plain(self.message_index + 1)
        if self.splice_start is not None:
            prompt = chat.render_plain(self.message_index, add_generation_prompt=True)
            rendered = prompt + rendered[self.splice_start :]
        return rendered[: self.cut_end]


def find_assistant_spans(
    chat: Conversation,
    tokenizer: ChatTokenizer,
    weights: Sequence[float],
    end_ids: Sequence[Iterable[int]],
    answer_tail: str | None = None,
    full_text: TrackedText | None = None,
) -> tuple[AssistantSpan, ...]:
    """Return the span of each message with a positive weight. `end_ids` are sets of end tokens, the
    preferred set first; `answer_tail` is the text between an answer and the next turn, which the
    template always begins; `full_text` is the render of all messages, if the template has one.
    Raises InputError for an answer that the template does not write."""
    _refuse_many_renders(chat, weights)
    spans: list[AssistantSpan] = []
    num_chars = 0
    is_joined = full_text is not None  # all turns are in one document
    for message_index, weight in enumerate(weights):
        if weight > 0:
            span = _find_span(chat, tokenizer, message_index, weight, end_ids)
            if not span.has_end_token and answer_tail is not None:
                span = _cut_next_turn(chat, tokenizer, span, answer_tail)
            _check_origins(chat, span)
            _refuse_inner_end(chat, span, end_ids)
            spans.append(span)
            num_chars += len(span.text.plain)
            is_joined = is_joined and full_text is not None and span.is_served_in(full_text)
            if not is_joined:
                _refuse_many_chars(num_chars, weights)
    return tuple(spans)


def find_spans_in_full(
    chat: Conversation,
    full_text: TrackedText,
    weights: Sequence[float],
    end_ids: Sequence[Iterable[int]],
) -> tuple[AssistantSpan, ...] | None:
    """Return the spans of `find_assistant_spans` in the render of all messages; None unless it
    starts with the prompt and with the render up to the answer of each trained turn."""
    _refuse_many_renders(chat, weights)
    content_ends: dict[int, int] = {}  # message index -> end of the last text that it wrote
    for _, end, origin in full_text.origin_spans:
        content_ends[get_message_index(origin)] = end
    spans: list[AssistantSpan] = []
    for message_index, weight in enumerate(weights):
        if weight > 0:
            prompt = chat.render_plain(message_index, add_generation_prompt=True)
            is_last = message_index == len(chat.messages) - 1
            rendered = chat.full_plain_text if is_last else chat.render_plain(message_index + 1)
            content_end = content_ends.get(message_index, 0)
            is_within = len(prompt) < content_end <= len(rendered)
            is_prefix = full_text.plain.startswith(prompt) and full_text.plain.startswith(rendered)
            if not is_within or not is_prefix:
                return None
            answer_end = _find_answer_end(full_text, content_end, len(rendered), end_ids)
            if answer_end is None:
                return None
            start = len(prompt)
            spans.append(AssistantSpan(message_index, weight, full_text, start, answer_end, True))
            _check_origins(chat, spans[-1])
            _refuse_inner_end(chat, spans[-1], end_ids)
    return tuple(spans)


def render_turns(
    chat: Conversation, tokenizer: ChatTokenizer, spans: Sequence[AssistantSpan]
) -> tuple[AssistantSpan, ...]:
    """Return spans of `find_spans_in_full` in the renders up to their messages, each of which is
    encoded as a document. Raises InputError if they are too long."""
    weights = [span.weight for span in spans]
    turns: list[AssistantSpan] = []
    num_chars = 0
    for span in spans:
        rendered = chat.render(span.message_index + 1)
        num_chars += len(rendered)
        _refuse_many_chars(num_chars, weights)
        text = TrackedText(rendered, tokenizer, chat.assistant_indices)
        turns.append(replace(span, text=text))
    return tuple(turns)


def _refuse_many_renders(chat: Conversation, weights: Sequence[float]) -> None:
    num_trained = sum(weight > 0 for weight in weights)
    if num_trained * len(chat.messages) > MAX_MESSAGE_RENDERS:
        message = (
            f"{num_trained:,} trained turns of {len(chat.messages):,} messages: each is rendered"
            f" with all messages before it, and their product is over {MAX_MESSAGE_RENDERS:,}"
        )
        raise InputError(message, fix=SPLIT_FIX)


def _refuse_many_chars(num_chars: int, weights: Sequence[float]) -> None:
    if num_chars > MAX_TURN_CHARS:
        num_trained = sum(weight > 0 for weight in weights)
        message = (
            f"the renders of {num_trained:,} trained turns, each with all messages before it,"
            f" have over {MAX_TURN_CHARS:,} characters"
        )
        raise InputError(message, fix=SPLIT_FIX)


def _find_span(
    chat: Conversation,
    tokenizer: ChatTokenizer,
    message_index: int,
    weight: float,
    end_ids: Sequence[Iterable[int]],
) -> AssistantSpan:
    prompt = chat.render_plain(message_index, add_generation_prompt=True)
    rendered = chat.render(message_index + 1)
    splice_start = None
    if not get_plain_text(rendered).startswith(prompt):
        tracked_prompt = chat.render(message_index, add_generation_prompt=True)
        splice_start = _find_answer_start(chat, tokenizer, message_index, tracked_prompt, rendered)
        rendered = tracked_prompt + rendered[splice_start:]
    text = TrackedText(rendered, tokenizer, chat.assistant_indices)

    content_end = _find_content_end(text, message_index)
    if content_end <= len(prompt):
        raise make_unrendered_error(chat, message_index)

    answer_end = _find_answer_end(text, content_end, len(text.plain), end_ids)
    return AssistantSpan(
        message_index,
        weight,
        text,
        start=len(prompt),
        end=len(text.plain) if answer_end is None else answer_end,
        has_end_token=answer_end is not None,
        splice_start=splice_start,
    )


def _find_answer_end(
    text: TrackedText, content_end: int, text_end: int, end_ids: Sequence[Iterable[int]]
) -> int | None:
    """Return the end of the first end token between two characters, of the preferred set that has
    one there; None if there is none."""
    first = bisect_left(text.controls, content_end, key=lambda match: match.start)
    last = bisect_right(text.controls, text_end, key=lambda match: match.token_end)
    for ids in end_ids:
        for match in text.controls[first:last]:
            if match.control.id in ids:
                return match.token_end
    return None


def _find_content_end(text: TrackedText, message_index: int) -> int:
    """Return the end of the last text that a message wrote, or 0."""
    origins = {make_origin(message_index, field) for field in FIELDS}
    return max((end for _, end, origin in text.origin_spans if origin in origins), default=0)


def _cut_next_turn(
    chat: Conversation, tokenizer: ChatTokenizer, span: AssistantSpan, answer_tail: str
) -> AssistantSpan:
    """Return a span whose text ends before the next turn."""
    end = _find_content_end(span.text, span.message_index)
    for tail_char in answer_tail:
        if span.text.plain[end : end + 1] != tail_char:
            break
        end += 1
    text = TrackedText(span.text.tracked[:end], tokenizer, chat.assistant_indices)
    return replace(span, text=text, end=end, cut_end=end)


def make_unrendered_error(chat: Conversation, message_index: int) -> InputError:
    """Return the error for a message that the template leaves out."""
    message = chat.messages[message_index]
    has_calls = bool(message.get("tool_calls"))
    kind = message["role"] + (" with tool calls" if has_calls else "")
    problem = f"the chat template does not write message {message_index + 1} ({kind})"
    return InputError(problem, fix=TOOL_CALLS_FIX if has_calls else "")


def _find_answer_start(
    chat: Conversation,
    tokenizer: ChatTokenizer,
    message_index: int,
    prompt: TrackedStr,
    rendered: TrackedStr,
) -> int:
    """Return the character of `rendered` at which the answer starts: after the generation prompt
    that follows the previous message, or after its part that only a generation prompt adds, the
    header, or where the generation prompt goes on with thinking. Raises InputError if none of these
    follows there."""
    message_start = len(rendered)
    for start, _, origin in iter_spans(rendered):
        if get_message_index(origin) == message_index:
            message_start = start
            break
    prompt_message, prompt_end = _find_last_message(prompt)
    previous_message, previous_end = _find_last_message(rendered[:message_start])
    generation_prompt = get_plain_text(prompt)[prompt_end:]
    prefix = get_plain_text(rendered)[previous_end:message_start]
    if prompt_message == previous_message:
        if generation_prompt.strip() and prefix.startswith(generation_prompt):
            return previous_end + len(generation_prompt)
        # Hermes closes a last tool result differently; the answer's own header is the same
        header = _find_answer_header(chat, message_index, get_plain_text(prompt))
        header_start = prefix.rfind(header) if header.strip() else -1
        if header_start >= 0:
            return previous_end + header_start + len(header)
        message = chat.messages[message_index]
        start = _find_start_without_thinking(generation_prompt, prefix, tokenizer)
        answer = get_plain_text(rendered)[previous_end + start :]
        if _is_served_thinking(generation_prompt, start, tokenizer, answer, message):
            return previous_end + start
    raise InputError(
        _describe_mismatch(get_plain_text(prompt), get_plain_text(rendered)), fix=PREFIX_FIX
    )


def _find_start_without_thinking(
    generation_prompt: str, prefix: str, tokenizer: ChatTokenizer
) -> int:
    """Return the character at which the two differ, or where the control token starts in which
    they do."""
    num_shared = count_common_prefix(generation_prompt, prefix)
    for match in tokenizer.pattern.finditer(generation_prompt):
        if match.start() <= num_shared < match.end():
            return match.start()
    return num_shared


def _is_served_thinking(
    generation_prompt: str, start: int, tokenizer: ChatTokenizer, answer: str, message: Json
) -> bool:
    """Return whether the generation prompt differs from the render of an answer, from `start` on,
    by thinking alone: an empty block (Gemma 4), one that it opens (DeepSeek R1, QwQ) and that an
    answer without reasoning does not close, or white space in it (Nemotron prompts with `<think>`
    and a newline, and writes `<think></think>`)."""
    controls = list(tokenizer.pattern.finditer(generation_prompt))
    thinking = [match for match in controls if match.start() >= start]
    if not thinking:
        is_space = not generation_prompt[start:].strip()
        return is_space and any(match.end() == start for match in controls)
    opener = thinking[0][0]
    if generation_prompt[start : thinking[0].start()].strip() or opener in answer:
        return False
    is_open = len(thinking) == 1
    has_reasoning = "reasoning_content" in message or opener in str(message.get("content"))
    return not (is_open and has_reasoning)


def _find_answer_header(chat: Conversation, message_index: int, prompt: str) -> str:
    """Return what a generation prompt adds to the messages before it; "" if it changes them."""
    messages_text = get_plain_text(chat.render(message_index))
    return prompt[len(messages_text) :] if prompt.startswith(messages_text) else ""


def _find_last_message(text: TrackedStr) -> tuple[int, int]:
    """Return (message index, end) of the last text that a message wrote, or (-1, 0)."""
    last_message = (-1, 0)
    for _, end, origin in iter_spans(text):
        if get_message_index(origin) >= 0:
            last_message = (get_message_index(origin), end)
    return last_message


def _describe_mismatch(prompt: str, answer: str) -> str:
    length = count_common_prefix(prompt, answer)
    before = prompt[:length][-20:]
    expected = before + prompt[length:][:40]
    actual = before + answer[length:][:40]
    return f"the chat template prompts for an answer with {expected!r}, but writes it as {actual!r}"


def count_common_prefix(first: str, second: str) -> int:
    """Return how many characters two texts share from the start."""
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return count


def _check_origins(chat: Conversation, span: AssistantSpan) -> None:
    """Raise InputError if another message is inside the answer, or its tool calls are not."""
    origins = span.text.get_origins(span.start, span.end)
    writers = {get_message_index(origin) for origin in origins}
    if TOOLS in origins or writers - {-1, span.message_index}:
        raise InputError("the chat template writes another message inside an answer")
    has_calls = bool(chat.messages[span.message_index].get("tool_calls"))
    if has_calls and make_origin(span.message_index, "tool_calls") not in origins:
        raise InputError(
            "the chat template does not write the tool calls of an answer", fix=TOOL_CALLS_FIX
        )


def _refuse_inner_end(
    chat: Conversation, span: AssistantSpan, end_ids: Sequence[Iterable[int]]
) -> None:
    """Raise InputError if text of the answer follows a token that ends answers: a model stops
    there, and is never asked for the rest."""
    ids = set(chain.from_iterable(end_ids))
    first = bisect_left(span.text.controls, span.start, key=lambda match: match.start)
    last = bisect_right(span.text.controls, span.end, key=lambda match: match.token_end)
    for match in span.text.controls[first:last]:
        if match.control.id not in ids:
            continue
        origins = span.text.get_origins(match.token_end, span.end)
        if span.message_index in map(get_message_index, origins):
            has_calls = bool(chat.messages[span.message_index].get("tool_calls"))
            message = (
                f"the chat template writes the end token {match.control.text!r} inside an answer:"
                " a model stops there"
            )
            fix = "drop the text next to the tool calls, or " if has_calls else ""
            raise InputError(message, fix=f"{fix}{END_FIX}")


# ---------------------------------------------------------------- tokens


def find_token_spans(
    encoded: EncodedText, span: AssistantSpan, example: Example
) -> list[TokenSpan]:
    """Return the token spans of a trained turn: the answer, or only its banned parts."""
    if not example.banned_spans:
        first_token = encoded.get_token_index(span.start)
        return [(first_token, encoded.get_token_index(span.end), span.weight)]
    answer = example.messages[span.message_index]["content"].strip()
    banned = [banned for banned in example.banned_spans if banned.message == span.message_index]
    token_spans = find_banned_token_spans(encoded, span.start, span.end, answer, banned)
    return [(start, end, span.weight) for start, end in token_spans]


def find_banned_token_spans(
    encoded: EncodedText, start: int, end: int, answer: str, spans: Sequence[CharSpan]
) -> list[tuple[int, int]]:
    """Return the tokens that hold any character of `spans`, which count from the first character of
    `answer` within the characters start:end. Raises InputError if the answer is not there."""
    answer_start = encoded.text.plain.find(answer, start, end)
    if answer_start < 0:
        fix = "drop the row, or write the answer exactly as the template renders it"
        message = "the chat template changes the answer: its banned parts cannot be located"
        raise InputError(message, fix=fix)
    token_spans: list[tuple[int, int]] = []
    for span in spans:
        first_token = snap_to_token(encoded, answer_start + span.start, start, -1)
        token_spans.append((first_token, snap_to_token(encoded, answer_start + span.end, end, 1)))
    return token_spans


def snap_to_token(encoded: EncodedText, character: int, limit: int, step: int) -> int:
    """Return the token index at the nearest token boundary from `character` towards `limit`."""
    while encoded.count_tokens_before(character) is None and character != limit:
        character += step
    return encoded.get_token_index(character)


# ---------------------------------------------------------------- messages of other roles

# A message is trained from the first token with any of its text through the end token that closes
# it: the first control token that ends answers, if the template writes it before the next message;
# where there is none (`[/INST]`), through its last token. Its header is not trained.

TrainedRoles = str | tuple[str, ...]  # "answers", "all" or roles
ROLE_NAMES = {"developer": "system"}


def is_training_answers(train_on: TrainedRoles) -> bool:
    """Return whether the answers of the assistant are among the trained text."""
    return train_on in ("answers", "all") or "assistant" in _list_roles(train_on)


def _list_roles(train_on: TrainedRoles) -> tuple[str, ...]:
    return (train_on,) if isinstance(train_on, str) else train_on


def weigh_messages(example: Example, train_on: TrainedRoles) -> tuple[float, ...]:
    """Return the weight of each message: that of the row if it sets one, else 1 if its role is
    trained."""
    weights: list[float] = []
    trained_roles = _list_roles(train_on)
    for message, weight in zip(example.messages, example.turn_weights, strict=True):
        role = str(message["role"])
        is_trained = train_on == "all" or ROLE_NAMES.get(role, role) in trained_roles
        is_set = isinstance(weight, RowWeight)
        weights.append(weight if is_trained and is_set else float(is_trained))
    return tuple(weights)


def find_message_spans(
    encoded: EncodedText, weights: Mapping[int, float], end_ids: Container[int]
) -> list[TokenSpan]:
    """Return the token span of each message in `weights` (message index -> weight) that the
    template writes; the first token of a text is never a target."""
    bounds = find_message_bounds(encoded.text)
    spans: list[TokenSpan] = []
    for index, weight in weights.items():
        if index not in bounds:
            continue
        start, content_end = bounds[index]
        next_start = min(
            (first for first, _ in bounds.values() if first >= content_end),
            default=len(encoded.text.plain),
        )
        end = _find_end(encoded.text, content_end, next_start, end_ids)
        first_token = snap_to_token(encoded, start, 0, -1)
        last_token = snap_to_token(encoded, end, len(encoded.text.plain), 1)
        spans.append((max(1, first_token), last_token, weight))
    return spans


def find_message_bounds(text: TrackedText) -> dict[int, tuple[int, int]]:
    """Return the first and one past the last character of each message that is written."""
    bounds: dict[int, tuple[int, int]] = {}
    for start, end, origin in text.origin_spans:
        index = get_message_index(origin)
        if index >= 0:
            bounds[index] = (bounds.get(index, (start, end))[0], end)
    return bounds


def select_messages(
    weights: Sequence[float], messages: range, roles: Sequence[str]
) -> dict[int, float]:
    """Return the weights of the messages of this range that are no answers."""
    selected: dict[int, float] = {}
    for index in messages:
        if weights[index] and roles[index] != "assistant":
            selected[index] = weights[index]
    return selected


def _find_end(text: TrackedText, content_end: int, limit: int, end_ids: Container[int]) -> int:
    """Return the end of the token that closes a message, or the end of its text."""
    for match in text.controls:
        if content_end <= match.start and match.token_end <= limit and match.control.id in end_ids:
            return match.token_end
    return content_end
