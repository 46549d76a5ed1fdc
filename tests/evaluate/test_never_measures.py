"""Constraints measured: by kind of prompt, per constraint; bad places by likelihood; baselines are told and banned."""

import pytest

from tunesmith.core.types import Example, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.constraints import Never
from tunesmith.evaluate.constraint_baselines import LONGEST_BAN, bad_strings, bans, rules, told
from tunesmith.evaluate.constraint_violations import ELICITING, NEUTRAL, RIGHTFUL, bad_logp, violations
from tunesmith.evaluate.generate_until import Question, questions_of
from tunesmith.evaluate.loglikelihood import negative_log_likelihoods
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.recipe.fields import Constraint

SORRY, ROBOT = Constraint.model_validate({"check": "apology"}), Constraint.model_validate({"match": "(?i)robot"})
BOTH = (SORRY, ROBOT)


def question(number: int, expected: str, negative: object = None) -> Question:
    return Question(f"test:{number}", (1, 2), "?", expected, 3, negative)  # type: ignore[arg-type]


def chat(answer: str, system: str = "", **more: object) -> Example:
    turns: list[Json] = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": answer}]
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
    found = {(one.task, one.metric): one for one in violations(BOTH, questions, answers)}
    assert {key: (one.ids, one.values) for key, one in found.items()} == {
        (NEUTRAL, "breaks apology"): (("test:1", "test:2"), (0, 1)),
        (ELICITING, "breaks apology"): (("test:3", "test:4"), (1, 0)),
        (RIGHTFUL, "says apology"): (("test:6", "test:7"), (1, 0)),
        (NEUTRAL, "breaks (?i)robot"): (("test:1", "test:2", "test:6", "test:7"), (1, 0, 0, 0)),
        (ELICITING, "breaks (?i)robot"): (("test:4", "test:5"), (0, 0)),
    }
    assert [one.higher_is_better for one in found.values()] == [False, False, True, False, False]


def test_one_prompt_of_a_kind_is_no_measure() -> None:
    assert not list(violations(BOTH, [question(1, "fine")], ["sorry"]))


def test_a_bad_row_asks_its_prompt_and_expects_nothing(renderer: Renderer) -> None:
    judged = Never(BOTH, held_out=True).judged(chat("well, sorry", negative=True))
    assert judged.banned
    bad, good = questions_of([judged, chat("well, sorry")], renderer)
    assert (bad.prompt, bad.expected) == (good.prompt, good.expected)
    assert (bad.negative, good.negative) == (True, None)


def test_the_logp_is_of_the_bad_tokens_alone(renderer: Renderer, model: LanguageModel) -> None:
    rows = [
        chat(said, id=f"test:{n}", negative=True) for n, said in enumerate(("so sorry for it", "sorry", "no robot"))
    ]
    documents = [d for row in rows for d in renderer.documents(Never(BOTH, held_out=True).judged(row)).documents]
    found = bad_logp(model, documents, task="test", pack_length=512)
    assert found.weights == (5, 5, 5), "one token a byte"
    for i, nats, tokens in negative_log_likelihoods(model, documents, 512):
        assert found.values[i] == pytest.approx(-nats / tokens)
    assert not found.higher_is_better


# ---------------------------------------------------------------- baselines


def test_the_rules_quote_what_was_said() -> None:
    bad = bad_strings(BOTH, [("a", "a robot"), ("b", "A Robot, robot, sorry"), ("c", "fine")])
    assert bad == {"apology": ["sorry"], "(?i)robot": ["robot", "Robot"]}
    text = rules(BOTH, bad)
    assert text.splitlines() == [
        "Rules for every answer:",
        "- Never apologise or say sorry.",
        '- Never write "robot" or "Robot".',
    ]
    assert rules(BOTH, {"apology": [], "(?i)robot": []}).endswith('- Never write "(?i)robot".')


def test_the_model_is_told_in_its_system_message(renderer: Renderer) -> None:
    plain, kept = told(chat("fine"), "RULES"), told(chat("fine", system="Be brief."), "RULES")
    assert plain.messages[0] == {"role": "system", "content": "RULES"}
    assert kept.messages[0] == {"role": "system", "content": "Be brief.\n\nRULES"}
    for example, before in ((plain, chat("fine")), (kept, chat("fine", system="Be brief."))):
        (asked,), (first,) = questions_of([example], renderer), questions_of([before], renderer)
        assert asked.expected == first.expected
        assert "RULES" in renderer.decode(asked.prompt)
    assert told(Example("a", text=" b", prompt="a"), "RULES").prompt == "RULES\n\na"


def test_bans_are_how_bad_strings_begin(renderer: Renderer) -> None:
    found = bans({"a": ["no", "sorry"], "b": ["no"]}, renderer)
    assert [renderer.decode(tokens) for tokens in found] == ["no", " no", "sorr", " sor"]
    assert max(map(len, found)) == LONGEST_BAN
