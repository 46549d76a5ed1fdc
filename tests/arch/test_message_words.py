"""Messages are in the words of the field: no text of the package has private idiom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
MIN_WORDS = 3  # fewer are names, keys and paths
IDIOM = re.compile(
    r"\b(beside|stands?|stood|goes on|went on|nobody|somebody|whoever|strangers?|for want of"
    r"|otherwise than|is told|are told|nats a token|tokens a second|half a character)\b",
    re.IGNORECASE,
)
NO_NOUN = re.compile(r"(?<![Tt]here )\b(is|are) no (?!longer\b|more\b)[a-z]")  # for "is not a ..."
FORMER_FLAG = re.compile(r"--to\b(?! [a-z{])")  # of the verbs of data; that of export has a target
REGEX_MARKS = ("\\", "(?")  # patterns that look for such words in rows


def iter_texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each string that is no docstring; {} stands for a value."""
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.lineno, node.value


def find_idiom(source: str) -> list[tuple[int, str]]:
    breaches: list[tuple[int, str]] = []
    for line, text in iter_texts(source):
        is_message = len(text.split()) >= MIN_WORDS and not any(m in text for m in REGEX_MARKS)
        if is_message and (match := IDIOM.search(text) or NO_NOUN.search(text)):
            breaches.append((line, match[0]))
    return breaches


def find_former_flags(source: str) -> list[str]:
    return [text for _, text in iter_texts(source) if " " in text and FORMER_FLAG.search(text)]


@pytest.mark.promise
def test_messages_name_the_flags_of_today() -> None:
    breaches = {str(path): find_former_flags(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path: texts for path, texts in breaches.items() if texts} == {}
    assert find_former_flags('fix = "choose a folder with --to, or remove it"')
    assert not find_former_flags('fix = f"use --to {target}, or --to merged"')


@pytest.mark.promise
def test_no_message_has_private_idiom() -> None:
    breaches = {str(path): find_idiom(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path: words for path, words in breaches.items() if words} == {}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('print("the run goes on with step 3")', ["goes on"]),
        ('raise ValueError(f"{name} stands twice in the list")', ["stands"]),
        ('"""It goes on with the next step."""', []),
        ('PATTERN = r"do you want me to go on\\b"', []),
        ('KEY = "beside"', []),
        ('raise ValueError(f"{name!r} is no name of a key")', ["is no n"]),
        ('print("there is no key here, and the other is no longer valid")', []),
    ],
)
def test_idiom_is_noticed_in_messages_alone(source: str, words: list[str]) -> None:
    assert [word for _, word in find_idiom(source)] == words
