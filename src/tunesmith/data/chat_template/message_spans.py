"""Locate the text of single messages in a rendered conversation, to train roles besides answers.

    train_on, Example                -> weigh_messages     -> the weight of each message
    Conversation, EncodedText, weights -> find_message_spans -> (first token, end, weight)

A message is trained from the first token with any of its text through the end token that closes it:
the first control token that ends answers, if the template writes it before the next message; where
there is none (`[/INST]`), through its last token. The header of a message is not trained. Answers
start at their generation prompt, and are located in assistant_spans.py."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from tunesmith.core.types import Example, RowWeight
from tunesmith.data.chat_template.assistant_spans import TokenSpan, snap_to_token
from tunesmith.data.chat_template.encode import EncodedText, TrackedText
from tunesmith.data.chat_template.tracked_str import get_message_index

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
