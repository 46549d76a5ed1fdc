"""One question asked in other ways: with examples before it, with passages of documents before it.

    Example, passages -> looked_up(...); Example, shots, form -> prompted(...): the same answer, for the renderer

The answer and its mask stay as they are, so a question can be asked so and trained so. A form says
where the examples stand: as turns of the conversation, or in the message itself under two kinds of
labels. Left out: which examples (asking.py) and which passages (passages.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tunesmith.core.types import Example

ShotLayout = Callable[[Example, Sequence[Example]], Example]


def add_shots(example: Example, shots: Sequence[Example], shot_layout: str = "turns") -> Example:
    """The examples stand before the question."""
    return SHOT_LAYOUTS[shot_layout](example, shots) if shots else example


def find_answer_turn(example: Example) -> int:
    """The place of the last trained answer; the turn before it asks."""
    return max(index for index, weight in enumerate(example.turn_weights) if weight > 0)


def get_question(example: Example) -> str:
    """The last thing said before the answer."""
    return (
        example.messages[find_answer_turn(example) - 1]["content"]
        if example.messages
        else example.prompt or ""
    )


def get_answer(example: Example) -> str:
    return (
        example.messages[find_answer_turn(example)]["content"]
        if example.messages
        else example.text or ""
    )


def add_passages(example: Example, passages: Sequence[str]) -> Example:
    """The passages stand with the question."""
    if not passages:
        return example
    passage_text = "\n\n".join(
        f"Text {number}:\n{passage}" for number, passage in enumerate(passages, start=1)
    )
    return _replace_question(
        example, f"Answer from these texts.\n\n{passage_text}\n\n{get_question(example)}"
    )


def _replace_question(example: Example, question: str) -> Example:
    """The same with another question."""
    if not example.messages:
        return dataclasses.replace(example, prompt=question)
    index = find_answer_turn(example) - 1
    turn = {**example.messages[index], "content": question}
    return dataclasses.replace(
        example, messages=(*example.messages[:index], turn, *example.messages[index + 1 :])
    )


# ---------------------------------------------------------------- forms


def add_shot_turns(example: Example, shots: Sequence[Example]) -> Example:
    """Examples are earlier turns of the conversation, after its system message."""
    if not example.messages:
        return add_labelled_shots(example, shots)
    shot_turns = [
        turn
        for shot in shots
        for turn in shot.messages[find_answer_turn(shot) - 1 : find_answer_turn(shot) + 1]
    ]
    num_system_turns = 1 if example.messages[0]["role"] in ("system", "developer") else 0
    messages = (
        *example.messages[:num_system_turns],
        *shot_turns,
        *example.messages[num_system_turns:],
    )
    weights = (
        *example.turn_weights[:num_system_turns],
        *[0.0] * len(shot_turns),
        *example.turn_weights[num_system_turns:],
    )
    return dataclasses.replace(example, messages=messages, turn_weights=weights)


def add_labelled_shots(example: Example, shots: Sequence[Example]) -> Example:
    """Examples stand in the message, under Input and Output."""
    shot_text = "".join(
        f"Input: {get_question(shot)}\nOutput: {get_answer(shot)}\n\n" for shot in shots
    )
    return _replace_question(
        example,
        f"{shot_text}Input: {get_question(example)}\nOutput:" + ("" if example.messages else " "),
    )


def add_headed_shots(example: Example, shots: Sequence[Example]) -> Example:
    """Examples stand in the message, under headings, and a sentence says what they are for."""
    shot_text = "".join(
        f"## Question\n{get_question(shot)}\n\n## Answer\n{get_answer(shot)}\n\n" for shot in shots
    )
    question_text = f"## Question\n{get_question(example)}\n\n## Answer\n"
    return _replace_question(
        example,
        f"Answer the last question as the others are answered.\n\n{shot_text}{question_text}",
    )


SHOT_LAYOUTS: dict[str, ShotLayout] = {
    "turns": add_shot_turns,
    "labelled": add_labelled_shots,
    "headed": add_headed_shots,
}
