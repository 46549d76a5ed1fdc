"""Checkers: each matches what it is named for, and nothing that only looks like it."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from tunesmith.core.errors import InputError
from tunesmith.data.constraints import find_spans
from tunesmith.recipe.checkers import CHECKERS
from tunesmith.recipe.fields import Constraint
from tunesmith.recipe.load import load_recipe

EXPECTED_TEXTS = {
    "apology": [
        ("I'm sorry, but no.", ["sorry"]),
        ("We apologise. My apologies!", ["apologise", "apologies"]),
        ("It was a sorting error.", []),
    ],
    "ai-self-mention": [
        ("As an AI language model, I cannot.", ["As an AI"]),
        ("Well, I’m just a large language model.", ["I’m just a large language model"]),
        ("My training data ends there.", ["My training data"]),
        ("I'm a brilliant and compassionate AI.", ["I'm a brilliant and compassionate AI"]),
        (
            "I'm ChatGPT, a large language model trained by OpenAI.",
            ["I'm ChatGPT, a large language model"],
        ),
        ("Being an AI, I have no age.", ["Being an AI"]),
        ("As your AI assistant I can help.", ["As your AI"]),
        ("That is hard for language models like me.", ["language models like me"]),
        ("I was trained by Hugging Face.", ["I was trained by Hugging Face"]),
        ("The aim was as an aid to AI. I am a doctor who uses AI.", []),
        ("I was trained by a pianist. I'm Anna, a fan of AI. As you know, an AI can count.", []),
    ],
    "text-outside-json": [
        ('{"a": [1, {"b": 2}]}', []),
        ("3.5", []),
        ('Here it is:\n{"a": 1}\nSee [1].', ["Here it is:", "See [1]."]),
        ("```json\n[1, 2]\n```", ["```json", "```"]),
        ("no JSON here", ["no JSON here"]),
        ('{"a": NaN}', ['{"a": NaN}']),
        ("[" * 5000, ["[" * 5000]),
    ],
}


@pytest.mark.parametrize("name", CHECKERS)
def test_a_checker_finds_what_it_is_named_for(name: str) -> None:
    for text, bad in EXPECTED_TEXTS[name]:
        spans = find_spans(Constraint.model_validate({"check": name}), text, "row")
        assert [text[start:end] for start, end in spans] == bad


def test_a_text_is_no_pattern() -> None:
    constraint = Constraint.model_validate({"text": "C++ (beta)"})
    assert constraint.name == "C++ (beta)"
    assert find_spans(constraint, "not C+++ (beta), C++ (beta)", "row") == [(17, 27)]


def test_a_name_alone_is_a_checker_and_other_words_are_patterns() -> None:
    values = {
        "model": "m",
        "data": "d.jsonl",
        "never": ["apology", "as an AI", {"check": "text-outside-json"}],
    }
    constraints = load_recipe(None, arguments=(values,)).never
    assert [
        (constraint.check, constraint.match, constraint.name) for constraint in constraints
    ] == [
        ("apology", "", "apology"),
        ("", "as an AI", "as an AI"),
        ("text-outside-json", "", "text-outside-json"),
    ]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "appology",
            r"never\[0\]\.check: unknown checker 'appology'; did you mean 'apology'\?",
        ),
        ("{check: AI self mention}", r"never\[0\]\.check: .*; did you mean 'ai-self-mention'\?"),
        ("{check: zebra}", r"use apology, ai-self-mention, text-outside-json\. A pattern is"),
        (
            "{check: apology, match: sorry}",
            r"never\[0\]: set exactly one of match, text, check, not match and check",
        ),
        ("{mode: ban}", r"never\[0\]: set exactly one of match, text, check, not none of them"),
        ("{match: ''}", "not none of them"),
        ("[{match: 3}]", r"never\[0\]\.match: expected a text, found the number 3"),
        ("{chekc: apology}", r"never\[0\]: unknown key 'chekc'; did you mean 'check'\?"),
        (
            "[a b, {match: c, name: a b}]",
            "never: two constraints are named 'a b': rename one",
        ),
    ],
)
def test_a_wrong_constraint_is_refused_in_its_place(
    written: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: m\ndata: d.jsonl\nnever: {written}\n")
    with pytest.raises(InputError, match=rf"recipe.yaml:3.*{message}"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_constraint_in_python_is_checked_too() -> None:
    with pytest.raises(ValidationError, match="unknown checker 'nothing'"):
        Constraint.model_validate({"check": "nothing"})
