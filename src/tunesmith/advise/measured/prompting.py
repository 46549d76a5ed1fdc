"""Prompt a question in other ways: with shots or passages before it.

    add_passages(example, passages), add_shots(example, shots, layout) -> Example for the renderer

The answer and its mask stay as they are, so the same prompt serves for asking and for training. A
layout says where the shots go: as turns of the conversation, or inside the message under two kinds
of labels. Left out: which shots (run_arm.py) and which passages (retrieval.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tunesmith.core.types import Example, Json

ShotLayout = Callable[[Example, Sequence[Example]], Example]


def add_shots(example: Example, shots: Sequence[Example], shot_layout: str = "turns") -> Example:
    return SHOT_LAYOUTS[shot_layout](example, shots) if shots else example


def find_answer_turn(example: Example) -> int:
    """Return the index of the last supervised turn; the turn before it is the question."""
    return max(index for index, weight in enumerate(example.turn_weights) if weight > 0)


def get_question(example: Example) -> str:
    """Return the last message before the answer."""
    if example.messages:
        return example.messages[find_answer_turn(example) - 1]["content"]
    return example.prompt or ""


def get_answer(example: Example) -> str:
    if example.messages:
        return example.messages[find_answer_turn(example)]["content"]
    return example.text or ""


def add_passages(example: Example, passages: Sequence[str]) -> Example:
    if not passages:
        return example
    texts = [f"Text {number}:\n{passage}" for number, passage in enumerate(passages, start=1)]
    parts = ["Answer from these texts.", *texts, get_question(example)]
    return _replace_question(example, "\n\n".join(parts))


def _replace_question(example: Example, question: str) -> Example:
    if not example.messages:
        return dataclasses.replace(example, prompt=question)
    index = find_answer_turn(example) - 1
    turn = {**example.messages[index], "content": question}
    messages = (*example.messages[:index], turn, *example.messages[index + 1 :])
    return dataclasses.replace(example, messages=messages)


# ---------------------------------------------------------------- layouts


def add_shot_turns(example: Example, shots: Sequence[Example]) -> Example:
    """Insert shots as earlier turns of the conversation, after its system message."""
    if not example.messages:
        return add_labelled_shots(example, shots)
    shot_turns: list[Json] = []
    for shot in shots:
        index = find_answer_turn(shot)
        shot_turns += shot.messages[index - 1 : index + 1]
    start = 1 if example.messages[0]["role"] in ("system", "developer") else 0
    weights = example.turn_weights
    return dataclasses.replace(
        example,
        messages=(*example.messages[:start], *shot_turns, *example.messages[start:]),
        turn_weights=(*weights[:start], *[0.0] * len(shot_turns), *weights[start:]),
    )


def add_labelled_shots(example: Example, shots: Sequence[Example]) -> Example:
    """Put shots into the message, labelled Input and Output."""
    parts = [f"Input: {get_question(shot)}\nOutput: {get_answer(shot)}\n\n" for shot in shots]
    question = f"Input: {get_question(example)}\nOutput:" + ("" if example.messages else " ")
    return _replace_question(example, "".join([*parts, question]))


def add_headed_shots(example: Example, shots: Sequence[Example]) -> Example:
    """Put shots into the message under headings, with an instruction before them."""
    parts = ["Answer the last question as the others are answered."]
    for shot in (*shots, example):
        parts.append(f"## Question\n{get_question(shot)}")
        parts.append(f"## Answer\n{'' if shot is example else get_answer(shot)}")
    return _replace_question(example, "\n\n".join(parts))


SHOT_LAYOUTS: dict[str, ShotLayout] = {
    "turns": add_shot_turns,
    "labelled": add_labelled_shots,
    "headed": add_headed_shots,
}
