"""The rubric: its advice, its reasons, and that each rule and each fact matters."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from tunesmith.advise.rules.advice import Advice, advise, apply_rules
from tunesmith.advise.rules.facts import FACTS, NEEDS, Need, Requirements
from tunesmith.advise.rules.rubric import (
    APPROACHES,
    RULES,
    TRAINING_APPROACHES,
    RuleConfidence,
    RuleResult,
)

CD = "constrained decoding"
BASE = "another base"


def get_advice(*need: Need, **facts: Any) -> Advice:
    return advise(Requirements(need, **facts))


Case = tuple[tuple[Need, ...], dict[str, Any], tuple[str, ...]]
CASES: list[Case] = [
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
    (("latency",), {"prompt": "good"}, ("sft",)),  # the prompt writes the rows
    (("on-device",), {}, ("sft",)),
    (("latency",), {"examples": 800, "prompt": "good", "requests_month": 999}, ("prompt",)),
    (("domain",), {"raw_text": 200_000_000, "examples": 500}, ("cpt", "sft")),
    (("domain",), {"raw_text": 200_000_000}, ("cpt",)),
    (("domain",), {"raw_text": 5_000_000, "examples": 500}, ("retrieval",)),
    (("domain",), {}, ()),
    (("skill",), {"examples": 5000, "prompt": "bad"}, ("sft",)),
    (("skill",), {"examples": 5000}, ("prompt",)),
    (("skill",), {"prompt": "bad"}, ()),
    (("safety",), {"examples": 300}, ("prompt",)),
    (("safety",), {"examples": 300, "prompt": "bad", "pairs": 600}, ("sft", "preference")),
    (("tool-calling",), {"examples": 300}, ("prompt", CD)),
    (("tool-calling",), {"examples": 300, "prompt": "close"}, (CD, "sft")),
    (("translation",), {"examples": 300, "prompt": "bad"}, ("sft",)),
    (("translation",), {"examples": 300, "prompt": "bad", "base_language": False}, (BASE,)),
    (("long-context",), {"context": 20_000, "examples": 60}, ("prompt",)),
    (("long-context",), {"context": 200_000, "examples": 60}, ("retrieval",)),
    (("long-context",), {"context": 20_000, "base_context": 8_192}, (BASE,)),
    (("on-device",), {"params": 7 * 10**9, "device_memory": 4 * 10**9, "examples": 60}, (BASE,)),
    (("on-device",), {"params": 10**9, "device_memory": 4 * 10**9, "examples": 60}, ("sft",)),
    (("skill",), {"examples": 300, "prompt": "bad", "base_at_chance": True}, (BASE, "sft")),
    (
        ("facts", "tone"),
        {"examples": 300, "prompt": "bad", "facts_change": "weekly"},
        ("retrieval", "sft"),
    ),
]


@pytest.mark.parametrize(("need", "facts", "approaches"), CASES)
def test_the_advice_follows_the_facts(
    need: tuple[Need, ...], facts: dict[str, Any], approaches: tuple[str, ...]
) -> None:
    advice = get_advice(*need, **facts)
    assert advice.approaches == approaches
    assert advice.verdict == (
        "fine-tune" if set(approaches) & set(TRAINING_APPROACHES) else "don't fine-tune"
    )


def list_reasons(*extra_cases: Case) -> list[RuleResult]:
    reasons: list[RuleResult] = []
    for need, facts, _ in (*CASES, *extra_cases):
        reasons += apply_rules(Requirements(need, **facts))[1]
    return reasons


def test_each_rule_applies_in_some_case() -> None:
    reasons = list_reasons((("tone",), {"examples": 3000, "private": True}, ()))
    assert {reason.rule for reason in reasons} == {rule.name for rule in RULES}


def test_each_recommendation_has_reasons_with_confidence() -> None:
    for need, facts, _ in CASES:
        advice = get_advice(*need, **facts)
        reasons = list(advice.objections)
        for step in advice.recommendations:
            assert any(step.approach in reason.recommended for reason in step.reasons)
            assert step.next_step
            reasons += step.reasons
        for reason in reasons:
            assert reason.confidence in get_args(RuleConfidence)
            assert bool(reason.source) or reason.confidence == "ours"
            assert set(reason.recommended + reason.ruled_out + reason.concerns) <= set(APPROACHES)


def test_a_source_has_its_year_and_no_number_from_a_discarded_run() -> None:
    for rule in RULES:
        if rule.confidence in ("published", "extrapolated"):
            assert re.search(r"20\d\d.*\(\d{4}\.\d{5}\)", rule.source), rule.name
        assert "58%" not in rule.explanation
        assert "Mosbach" not in rule.source, "out-of-domain classification says nothing of format"
    (facts,) = [rule for rule in RULES if rule.name == "cite_distinct_facts"]
    assert "1, 2 and 5 of 60" in facts.explanation


# ---------------------------------------------------------------- what would change it


def list_changes(*need: Need, **facts: Any) -> dict[str, tuple[str, ...]]:
    """Return condition -> approaches."""
    counterfactuals = get_advice(*need, **facts).counterfactuals
    return {change.condition: change.approaches for change in counterfactuals}


def test_counterfactuals_come_true() -> None:
    changes = list_changes("tone", examples=30, prompt="bad")
    more = get_advice("tone", examples=50, prompt="bad").approaches
    assert changes["examples: 50 or more"] == ("sft",) == more
    assert "private: yes" not in changes
    changes = list_changes("tone", examples=80, prompt="bad")
    good = get_advice("tone", examples=80, prompt="good").approaches
    assert changes["prompt: good"] == ("prompt",) == good
    fewer = get_advice("tone", examples=49, prompt="bad").approaches
    assert changes["examples: under 50"] == ("prompt",) == fewer


def test_every_fact_can_change_the_advice() -> None:
    facts = {field.name for field in dataclasses.fields(Requirements)} - {"need"}
    changing: set[str] = set()
    for need, case_facts, _ in CASES:
        conditions = list_changes(*need, **case_facts)
        changing.update(text.partition(":")[0].replace(" ", "_") for text in conditions)
    assert changing == facts - {"base_context", "params", "device_memory"}  # the user's numbers
    assert set(FACTS) == facts | {"need"}


def list_combinations() -> Iterator[tuple[tuple[Need, ...], str | None, int | None]]:
    for count in (1, 2):
        yield from itertools.product(
            itertools.combinations(NEEDS, count), (None, "bad", "close", "good"), (None, 0, 300)
        )


def test_every_combination_has_advice() -> None:
    for need, prompt, examples in list_combinations():
        advice = get_advice(*need, prompt=prompt, examples=examples, raw_text=10**8, pairs=600)
        approaches_by_need, _ = apply_rules(advice.requirements)
        assert set(advice.approaches) == set().union(*approaches_by_need.values())
        for step in advice.recommendations:
            assert set(step.needs) <= set(need)


def test_each_need_has_its_advice() -> None:
    advice = get_advice(
        "facts", "tone", examples=300, facts_change="daily", raw_text=10**7, prompt="bad"
    )
    needs_by_approach = {step.approach: step.needs for step in advice.recommendations}
    assert needs_by_approach == {"retrieval": ("facts",), "sft": ("tone",)}
    rules: set[str] = set()
    for step in advice.recommendations:
        rules.update(reason.rule for reason in step.reasons)
    assert "suggest_raft_training" in rules


def test_the_next_step_has_the_command_that_measures_it() -> None:
    advice = get_advice(
        "facts", "tone", "format", examples=30, facts_change="daily", private=True, raw_text=10**6
    )
    commands = {step.approach: step.command for step in advice.recommendations}
    measure = "tunesmith init recipe.yaml && tunesmith advise --measure recipe.yaml"
    assert commands["prompt"] == measure
    assert commands["retrieval"] == f"{measure} --documents FOLDER"
    assert commands["constrained decoding"] == f"{measure} --schema schema.json"
