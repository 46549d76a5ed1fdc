"""Violations by kind of prompt and constraint, and the likelihood of bad tokens."""

import pytest

from tunesmith.core.types import Example, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.constraints import ConstraintSet
from tunesmith.evaluate.constraint_violations import (
    ELICITING,
    NEUTRAL,
    RIGHTFUL,
    measure_bad_logp,
    measure_violations,
)
from tunesmith.evaluate.generate_until import EvalPrompt, build_prompts
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.recipe.fields import Constraint

SORRY, ROBOT = (
    Constraint.model_validate({"check": "apology"}),
    Constraint.model_validate({"match": "(?i)robot"}),
)
BOTH = (SORRY, ROBOT)


def question(number: int, expected: str, negative: object = None) -> EvalPrompt:
    return EvalPrompt(f"test:{number}", (1, 2), "?", expected, 3, negative)  # type: ignore[arg-type]


def chat(answer: str, system: str = "", **more: object) -> Example:
    turns: list[Json] = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": answer},
    ]
    turns = [{"role": "system", "content": system}, *turns] if system else turns
    weights = tuple(float(turn["role"] == "assistant") for turn in turns)
    return Example(**{"id": "test:1", "messages": tuple(turns), "turn_weights": weights, **more})  # type: ignore[arg-type]


def test_the_mark_says_what_a_prompt_is_for() -> None:
    questions = [
        question(1, "fine"),
        question(2, "fine"),
        question(3, "sorry", negative=True),
        question(4, "rude", negative="whole"),
        question(5, "a robot", negative=True),
        question(6, "sorry, dear", negative=False),
        question(7, "sorry, sir", negative=False),
    ]
    answers = ["a robot", "I'm sorry", " sorry ", "no", "sorry", "sorry!", "no"]
    result = {
        (item.task, item.metric): item for item in measure_violations(BOTH, questions, answers)
    }
    assert {key: (item.ids, item.values) for key, item in result.items()} == {
        (NEUTRAL, "breaks apology"): (("test:1", "test:2"), (0, 1)),
        (ELICITING, "breaks apology"): (("test:3", "test:4"), (1, 0)),
        (RIGHTFUL, "says apology"): (("test:6", "test:7"), (1, 0)),
        (NEUTRAL, "breaks (?i)robot"): (("test:1", "test:2", "test:6", "test:7"), (1, 0, 0, 0)),
        (ELICITING, "breaks (?i)robot"): (("test:4", "test:5"), (0, 0)),
    }
    assert [item.higher_is_better for item in result.values()] == [False, False, True, False, False]


def test_one_prompt_of_a_kind_is_no_measure() -> None:
    assert not list(measure_violations(BOTH, [question(1, "fine")], ["sorry"]))


def test_a_bad_row_asks_its_prompt_and_expects_nothing(renderer: Renderer) -> None:
    judged = ConstraintSet(BOTH, is_held_out=True).mark_violations(
        chat("well, sorry", negative=True)
    )
    assert judged.banned_spans
    bad, good = build_prompts([judged, chat("well, sorry")], renderer)
    assert (bad.prompt_ids, bad.expected) == (good.prompt_ids, good.expected)
    assert (bad.negative, good.negative) == (True, None)


def test_the_logp_is_of_the_bad_tokens_alone(renderer: Renderer, model: PackedCausalLM) -> None:
    rows = [
        chat(output, id=f"test:{n}", negative=True)
        for n, output in enumerate(("so sorry for it", "sorry", "no robot"))
    ]
    documents = [
        d
        for row in rows
        for d in renderer.render(
            ConstraintSet(BOTH, is_held_out=True).mark_violations(row)
        ).documents
    ]
    result = measure_bad_logp(model, documents, task="test", pack_length=512)
    assert result.weights == (5, 5, 5), "one token a byte"
    for i, nats, tokens in compute_nll(model, documents, 512):
        assert result.values[i] == pytest.approx(-nats / tokens)
    assert not result.higher_is_better
