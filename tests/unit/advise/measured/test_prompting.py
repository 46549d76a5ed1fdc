"""Prompts with shots and passages keep the question and the answer."""

from __future__ import annotations

import itertools
from datetime import datetime
from pathlib import Path

import pytest

from tunesmith.advise.measured.arms import SHOT_LAYOUTS, Arm, ArmOptions, build_arms
from tunesmith.advise.measured.prompting import add_passages, add_shots, get_answer, get_question
from tunesmith.core.types import Example
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.generate_until import build_prompts


def make_example(question: str, answer: str, system: str = "") -> Example:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages = ([{"role": "system", "content": system}] if system else []) + turns
    return Example(question, tuple(messages), (*[0.0] * (len(messages) - 1), 1.0))


SHOTS = (make_example("one?", "1", "count"), make_example("two?", "2", "count"))


@pytest.fixture(scope="module")
def renderer(tiny_folder: Path) -> Renderer:
    return Renderer.from_folder(tiny_folder, now=datetime(2026, 1, 1))


@pytest.mark.parametrize("layout", SHOT_LAYOUTS)
@pytest.mark.parametrize("passages", [(), ("three is 3", "a text")])
def test_the_answer_is_unchanged_and_everything_else_precedes_it(
    layout: str, passages: tuple[str, ...], renderer: Renderer
) -> None:
    example = make_example("three?", "3", "count")
    (question,) = build_prompts(
        [add_shots(add_passages(example, passages), SHOTS, layout)], renderer
    )
    prompt = renderer.decode(question.prompt_ids)
    assert question.expected == "3"
    assert prompt.count("count") == 1, "the system message of an example is not repeated"
    positions = [prompt.index(text) for text in ("one?", "1", "two?", "2", *passages, "three?")]
    assert positions == sorted(positions)
    assert prompt.endswith("assistant\n")


def test_rows_without_a_template_are_asked_by_text() -> None:
    row = Example("a", text="B", prompt="A: ")
    shot = Example("c", text="D", prompt="C: ")
    assert (get_question(row), get_answer(row)) == ("A: ", "B")
    prompted = add_shots(add_passages(row, ("text",)), (shot,))
    assert prompted.text == "B"
    assert prompted.prompt is not None
    assert prompted.prompt.index("C: ") < prompted.prompt.index("D") < prompted.prompt.index("text")
    assert prompted.prompt.endswith("Output: ")


def test_the_last_supervised_turn_is_the_answer() -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)
    ]
    example = Example("row", tuple(turns), (0.0, 1.0, 0.0, 1.0))
    assert (get_question(example), get_answer(example)) == ("c", "d")
    prompted = add_shots(example, SHOTS[:1])
    assert [turn["content"] for turn in prompted.messages] == ["one?", "1", "a", "b", "c", "d"]
    assert prompted.turn_weights == (0.0, 0.0, 0.0, 1.0, 0.0, 1.0)


def test_an_example_that_calls_a_tool_shows_its_call() -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look"}}],
    }
    shot = Example("tool", ({"role": "user", "content": "where?"}, call), (0.0, 1.0))
    assert add_shots(make_example("three?", "3"), (shot,)).messages[1] == call


def test_arms_are_unique_and_possible_and_zero_shot_is_first() -> None:
    everything = build_arms(ArmOptions(rows=400, has_documents=True, has_schema=True))
    assert everything[0] == Arm()
    assert len(everything) == len(set(everything))
    assert {arm.examples for arm in everything} == {0, 25, 50, 100, 200, 400}
    prompts = {(arm.shots, arm.shot_layout, arm.seed) for arm in everything}
    assert prompts >= set(itertools.product((2, 4, 8), SHOT_LAYOUTS, (0, 1, 2)))
    few = build_arms(ArmOptions(rows=3, has_documents=False, has_schema=False))
    assert {arm.shots for arm in few} == {0, 2}
    assert not any(arm.passages or arm.is_constrained or arm.examples for arm in few)


def test_arms_have_names_and_an_order_of_cost() -> None:
    arms = [
        Arm(),
        Arm(is_constrained=True),
        Arm(shots=2),
        Arm(shots=8),
        Arm(passages=3),
        Arm(shots=2, passages=3),
    ]
    arms += [Arm(examples=25), Arm(examples=400), Arm(examples=25, passages=3)]
    assert [arm.cost_key for arm in arms] == sorted({arm.cost_key for arm in arms})
    assert (
        Arm(shots=4, passages=3, is_constrained=True).name
        == "4 shots, retrieval of 3 passages, schema enforced"
    )
    assert Arm(examples=50, seed=2).row_key == Arm(examples=50)
