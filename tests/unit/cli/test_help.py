"""Examples of --help work, and every verb has a heading."""

import re
import shlex
from typing import Any

import pytest
from typer.main import get_command

from tunesmith.advise.rules.facts import FACTS
from tunesmith.cli import app
from tunesmith.cli.help import (
    COMMON_KEYS,
    EXAMPLES,
    PANELS,
    format_examples,
)
from tunesmith.recipe.schema import KEYS, Recipe


def test_every_verb_has_examples_and_a_heading() -> None:
    assert EXAMPLES.keys() == app.VERBS.keys()
    names = [name for panel in PANELS.values() for name in panel]
    assert sorted(names) == sorted({verb.split()[0] for verb in app.VERBS})


@pytest.mark.promise
@pytest.mark.parametrize(
    ("verb", "rest"), [(verb, rest) for verb, lines in EXAMPLES.items() for rest in lines]
)
def test_an_example_is_a_line_that_its_verb_accepts(verb: str, rest: str) -> None:
    line = f"tunesmith {verb} {rest}".rstrip()
    assert len(line) <= 78
    words = shlex.split(line.partition(" |")[0].partition(" >")[0])
    command: Any = get_command(app.build_app())
    for name in verb.split():
        command = command.commands[name]
    context = command.make_context(verb, words[1 + len(verb.split()) :])
    flags = [
        word[2:].replace("-", "_")
        for word in context.params.get("args") or ()
        if word.startswith("--")
    ]
    names = FACTS if verb == "advise" else Recipe.model_fields
    assert set(flags) <= names.keys()


def test_help_shows_examples_as_they_are(tunesmith: Any) -> None:
    code, out, _ = tunesmith("train", "--help")
    assert code == 0
    for rest in EXAMPLES["train"]:
        assert f"tunesmith train {rest}" in out
    assert "<bool>" not in out
    assert format_examples("no such verb", has_recipe=False).count("\n") == 0


def test_help_of_verbs_with_a_recipe_names_common_keys_that_exist(tunesmith: Any) -> None:
    _, out, _ = tunesmith("train", "--help")
    for line in COMMON_KEYS:
        assert line.strip() in out
    flags = re.findall(r"--[a-z-]+", " ".join(COMMON_KEYS))
    assert {flag.removeprefix("--").replace("-", "_") for flag in flags} <= set(KEYS)
    assert "Recipe keys" not in tunesmith("report", "--help")[1]


def test_the_first_level_is_in_the_order_of_the_headings(tunesmith: Any) -> None:
    _, out, _ = tunesmith("--help")
    positions = [out.index(f" {panel} ") for panel in PANELS]
    assert positions == sorted(positions)
