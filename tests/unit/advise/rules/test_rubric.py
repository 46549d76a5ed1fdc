"""The rubric: what it answers, why, and that each rule and each fact changes an answer."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from typing import Any, get_args

import pytest

from tunesmith.advise.rules import rubric
from tunesmith.advise.rules.advice import Advice, advise, apply_rules
from tunesmith.advise.rules.questionnaire import NEEDS, QUESTIONS, Need, Requirements
from tunesmith.advise.rules.reason import APPROACHES, TRAINING_APPROACHES, RuleConfidence
from tunesmith.advise.rules.rubric import RULES

CD = "constrained decoding"


def answered(*need: Need, **facts: Any) -> Advice:
    return advise(Requirements(need, **facts))


CASES: list[tuple[tuple[Need, ...], dict[str, Any], tuple[str, ...]]] = [
    # the usual table, and its exceptions
    (("facts",), {}, ("retrieval",)),
    (("facts",), {"raw_text": 100_000}, ("prompt",)),
    (
        ("facts",),
        {"paraphrases": 10, "examples": 900, "facts_change": "yearly"},
        ("retrieval", "sft"),
    ),
    (("facts",), {"paraphrases": 10, "examples": 900, "facts_change": "daily"}, ("retrieval",)),
    (
        ("facts",),
        {"paraphrases": 10, "examples": 900, "facts_change": "never", "private": True},
        ("retrieval",),
    ),
    (("facts",), {"paraphrases": 9, "examples": 900, "facts_change": "never"}, ("retrieval",)),
    (("facts",), {"prompt": "good"}, ("prompt",)),
    (("format",), {"examples": 300}, ("prompt", CD)),
    (("format",), {"examples": 300, "prompt": "close"}, (CD, "sft")),
    (("format",), {"examples": 300, "prompt": "good"}, ("prompt", CD)),
    (("format",), {"examples": 49, "prompt": "bad"}, ("prompt", CD)),
    (("tone",), {"examples": 100}, ("prompt", "sft")),
    (("tone",), {"examples": 100, "prompt": "bad"}, ("sft",)),
    (("tone",), {"examples": 100, "prompt": "good"}, ("prompt",)),
    (("tone",), {"examples": 100, "pairs": 800, "prompt": "bad"}, ("sft", "preference")),
    (("tone",), {"examples": 100, "pairs": 499, "prompt": "bad"}, ("sft",)),
    (("latency",), {"examples": 800, "prompt": "good"}, ("sft",)),
    (("latency",), {"examples": 800}, ("prompt",)),
    (("latency",), {"examples": 800, "prompt": "good", "requests_month": 999}, ("prompt",)),
    (("domain",), {"raw_text": 200_000_000, "examples": 500}, ("cpt", "sft")),
    (("domain",), {"raw_text": 200_000_000}, ("cpt",)),
    (("domain",), {"raw_text": 5_000_000, "examples": 500}, ("retrieval",)),
    (("domain",), {}, ()),
    (("skill",), {"examples": 5000, "prompt": "bad"}, ("sft",)),
    (("skill",), {"examples": 5000}, ("prompt",)),
    (("skill",), {"prompt": "bad"}, ()),
    (
        ("facts", "tone"),
        {"examples": 300, "prompt": "bad", "facts_change": "weekly"},
        ("retrieval", "sft"),
    ),
]


@pytest.mark.parametrize(("need", "facts", "answers"), CASES)
def test_what_is_advised(
    need: tuple[Need, ...], facts: dict[str, Any], answers: tuple[str, ...]
) -> None:
    found = answered(*need, **facts)
    assert found.approaches == answers
    assert found.verdict == (
        "fine-tune" if set(answers) & set(TRAINING_APPROACHES) else "don't fine-tune"
    )


def test_each_rule_says_something_in_some_case() -> None:
    told = {
        reason.rule
        for need, facts, _ in [*CASES, (("tone",), {"examples": 3000, "private": True}, ())]
        for reason in apply_rules(Requirements(need, **facts))[1]
    }
    assert told == {rule.__name__ for rule in RULES}


def test_an_answer_has_reasons_and_each_reason_says_how_sure_it_is() -> None:
    for need, facts, _ in CASES:
        found = answered(*need, **facts)
        for step in found.recommendations:
            assert any(step.approach in reason.recommended for reason in step.reasons)
            assert step.next_step
        for reason in [
            *found.objections,
            *(reason for step in found.recommendations for reason in step.reasons),
        ]:
            assert reason.confidence in get_args(RuleConfidence)
            assert bool(reason.source) or reason.confidence == "ours"
            assert set(reason.recommended + reason.ruled_out + reason.concerns) <= set(APPROACHES)


def test_a_source_stands_in_the_docstring_of_its_rule_with_its_year() -> None:
    for reason in [
        reason for need, facts, _ in CASES for reason in apply_rules(Requirements(need, **facts))[1]
    ]:
        text = inspect.getdoc(getattr(rubric, reason.rule)) or ""
        for source in reason.source.split(", "):
            assert source.partition(" ")[0] in text, reason.rule
        assert reason.confidence != "published" or re.search(r"20\d\d|guide|again", text), (
            reason.rule
        )


# ---------------------------------------------------------------- what would change it


def test_changes_are_true() -> None:
    """Each change that is told comes about when the fact is changed."""
    found = answered("tone", examples=30, prompt="bad")
    told = {change.condition: change.approaches for change in found.counterfactuals}
    assert (
        told["examples: 50 or more"]
        == ("sft",)
        == answered("tone", examples=50, prompt="bad").approaches
    )
    assert "private: yes" not in told
    told = {
        change.condition: change.approaches
        for change in answered("tone", examples=80, prompt="bad").counterfactuals
    }
    assert (
        told["prompt: good"]
        == ("prompt",)
        == answered("tone", examples=80, prompt="good").approaches
    )
    assert (
        told["examples: under 50"]
        == ("prompt",)
        == answered("tone", examples=49, prompt="bad").approaches
    )


def test_every_fact_can_change_an_answer_or_its_reasons() -> None:
    facts = {field.name for field in dataclasses.fields(Requirements)} - {"need"}
    changing = {
        change.condition.partition(":")[0].replace(" ", "_")
        for case in CASES
        for change in _of(case).counterfactuals
    }
    assert changing == facts
    assert set(QUESTIONS) == facts | {"need"}


def _of(case: tuple[tuple[Need, ...], dict[str, Any], tuple[str, ...]]) -> Advice:
    return answered(*case[0], **case[1])


def test_every_combination_is_answered() -> None:
    for count in (1, 2, 3):
        for need in itertools.combinations(NEEDS, count):
            for prompt, examples in itertools.product(
                (None, "bad", "close", "good"), (None, 0, 300)
            ):
                found = answered(*need, prompt=prompt, examples=examples, raw_text=10**8, pairs=600)
                assert set(found.approaches) == {
                    answer
                    for kept in apply_rules(found.requirements)[0].values()
                    for answer in kept
                }
                assert {one for step in found.recommendations for one in step.needs} <= set(need)


def test_needs_are_answered_each_by_itself() -> None:
    both = answered(
        "facts", "tone", examples=300, facts_change="daily", raw_text=10**7, prompt="bad"
    )
    assert {step.approach: step.needs for step in both.recommendations} == {
        "retrieval": ("facts",),
        "sft": ("tone",),
    }
    assert "suggest_raft_training" in {
        reason.rule for step in both.recommendations for reason in step.reasons
    }


def test_what_can_be_measured_is_told_with_its_command() -> None:
    found = answered(
        "facts", "tone", "format", examples=30, facts_change="daily", private=True, raw_text=10**6
    )
    commands = {step.approach: step.command for step in found.recommendations}
    made = "tunesmith init recipe.yaml && tunesmith advise --measure recipe.yaml"
    assert commands["prompt"] == made
    assert commands["retrieval"] == f"{made} --documents FOLDER"
    assert commands["constrained decoding"] == f"{made} --schema schema.json"
