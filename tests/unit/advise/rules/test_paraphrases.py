"""A question asked in other ways keeps its answer."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from tunesmith.advise.measured.arms import SHOT_LAYOUTS, Arm, ArmOptions, build_arms
from tunesmith.advise.measured.prompting import add_passages, add_shots, get_answer, get_question
from tunesmith.core.types import Example
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.generate_until import build_prompts


def asked(question: str, answer: str, system: str = "") -> Example:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages = ([{"role": "system", "content": system}] if system else []) + turns
    return Example(question, tuple(messages), (*[0.0] * (len(messages) - 1), 1.0))


SHOTS = (asked("one?", "1", "count"), asked("two?", "2", "count"))


@pytest.fixture(scope="module")
def renderer(tiny_folder: Path) -> Renderer:
    return Renderer.from_folder(tiny_folder, now=datetime(2026, 1, 1))


@pytest.mark.parametrize("form", SHOT_LAYOUTS)
@pytest.mark.parametrize("passages", [(), ("three is 3", "a text")])
def test_the_answer_stays_and_everything_else_stands_before_it(
    form: str, passages: tuple[str, ...], renderer: Renderer
) -> None:
    example = asked("three?", "3", "count")
    (question,) = build_prompts([add_shots(add_passages(example, passages), SHOTS, form)], renderer)
    told = renderer.decode(question.prompt_ids)
    assert question.expected == "3"
    assert told.count("count") == 1, "the system message of an example is not repeated"
    places = [told.index(text) for text in ("one?", "1", "two?", "2", *passages, "three?")]
    assert places == sorted(places)
    assert told.endswith("assistant\n")


def test_rows_without_a_template_are_asked_by_text() -> None:
    row, shot = Example("a", text="B", prompt="A: "), Example("c", text="D", prompt="C: ")
    assert (get_question(row), get_answer(row)) == ("A: ", "B")
    asked = add_shots(add_passages(row, ("text",)), (shot,))
    assert asked.text == "B"
    assert asked.prompt is not None
    assert asked.prompt.index("C: ") < asked.prompt.index("D") < asked.prompt.index("text")
    assert asked.prompt.endswith("Output: ")


def test_of_several_turns_the_last_trained_one_is_asked() -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)
    ]
    example = Example("row", tuple(turns), (0.0, 1.0, 0.0, 1.0))
    assert (get_question(example), get_answer(example)) == ("c", "d")
    shown = add_shots(example, SHOTS[:1])
    assert [turn["content"] for turn in shown.messages] == ["one?", "1", "a", "b", "c", "d"]
    assert shown.turn_weights == (0.0, 0.0, 0.0, 1.0, 0.0, 1.0)


def test_an_example_that_calls_a_tool_shows_its_call() -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look"}}],
    }
    shot = Example("tool", ({"role": "user", "content": "where?"}, call), (0.0, 1.0))
    assert add_shots(asked("three?", "3"), (shot,)).messages[1] == call


def test_arms_are_what_can_be_tried_each_once_and_zero_shot_first() -> None:
    everything = build_arms(ArmOptions(rows=400, has_documents=True, has_schema=True))
    assert everything[0] == Arm()
    assert len(everything) == len(set(everything))
    assert {arm.examples for arm in everything} == {0, 25, 50, 100, 200, 400}
    assert {(arm.shots, arm.shot_layout, arm.seed) for arm in everything} >= {
        (k, f, s) for k in (2, 4, 8) for f in SHOT_LAYOUTS for s in (0, 1, 2)
    }
    little = build_arms(ArmOptions(rows=3, has_documents=False, has_schema=False))
    assert {arm.shots for arm in little} == {0, 2}
    assert not any(arm.passages or arm.is_constrained or arm.examples for arm in little)


def test_the_order_of_cost_and_the_names() -> None:
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
