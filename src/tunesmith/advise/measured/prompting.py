"""One question asked in other ways: with examples before it, with passages of documents before it.

    Example, passages -> looked_up(...); Example, shots, form -> prompted(...): the same answer, for the renderer

The answer and its mask stay as they are, so a question can be asked so and trained so. A form says where the examples
stand: as turns of the conversation, or in the message itself under two kinds of labels. Left out: which examples
(asking.py) and which passages (passages.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tunesmith.core.types import Example

Form = Callable[[Example, Sequence[Example]], Example]


def prompted(example: Example, shots: Sequence[Example], form: str = "turns") -> Example:
    """The examples stand before the question."""
    return FORMS[form](example, shots) if shots else example


def asked_turn(example: Example) -> int:
    """The place of the last trained answer; the turn before it asks."""
    return max(place for place, weight in enumerate(example.turn_weights) if weight > 0)


def question_of(example: Example) -> str:
    """The last thing said before the answer."""
    return example.messages[asked_turn(example) - 1]["content"] if example.messages else example.prompt or ""


def answer_of(example: Example) -> str:
    return example.messages[asked_turn(example)]["content"] if example.messages else example.text or ""


def looked_up(example: Example, passages: Sequence[str]) -> Example:
    """The passages stand with the question."""
    if not passages:
        return example
    told = "\n\n".join(f"Text {number}:\n{passage}" for number, passage in enumerate(passages, start=1))
    return _asking(example, f"Answer from these texts.\n\n{told}\n\n{question_of(example)}")


def _asking(example: Example, question: str) -> Example:
    """The same with another question."""
    if not example.messages:
        return dataclasses.replace(example, prompt=question)
    place = asked_turn(example) - 1
    turn = {**example.messages[place], "content": question}
    return dataclasses.replace(example, messages=(*example.messages[:place], turn, *example.messages[place + 1 :]))


# ---------------------------------------------------------------- forms


def turns(example: Example, shots: Sequence[Example]) -> Example:
    """Examples are earlier turns of the conversation, after its system message."""
    if not example.messages:
        return labelled(example, shots)
    said = [turn for shot in shots for turn in shot.messages[asked_turn(shot) - 1 : asked_turn(shot) + 1]]
    first = 1 if example.messages[0]["role"] in ("system", "developer") else 0
    messages = (*example.messages[:first], *said, *example.messages[first:])
    weights = (*example.turn_weights[:first], *[0.0] * len(said), *example.turn_weights[first:])
    return dataclasses.replace(example, messages=messages, turn_weights=weights)


def labelled(example: Example, shots: Sequence[Example]) -> Example:
    """Examples stand in the message, under Input and Output."""
    told = "".join(f"Input: {question_of(shot)}\nOutput: {answer_of(shot)}\n\n" for shot in shots)
    return _asking(example, f"{told}Input: {question_of(example)}\nOutput:" + ("" if example.messages else " "))


def headed(example: Example, shots: Sequence[Example]) -> Example:
    """Examples stand in the message, under headings, and a sentence says what they are for."""
    told = "".join(f"## Question\n{question_of(shot)}\n\n## Answer\n{answer_of(shot)}\n\n" for shot in shots)
    ask = f"## Question\n{question_of(example)}\n\n## Answer\n"
    return _asking(example, f"Answer the last question as the others are answered.\n\n{told}{ask}")


FORMS: dict[str, Form] = {"turns": turns, "labelled": labelled, "headed": headed}
