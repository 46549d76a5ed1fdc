"""docs/guides/advise.md shows what the program prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from tunesmith import api
from tunesmith.cli.args import PIPE_WIDTH, parse_advise_args
from tunesmith.cli.views.advice import render_advice

ROOT = Path(__file__).parents[2]
SHOWN = re.findall(
    r"^```\n\$ tunesmith advise (.+)\n((?:.*\n)+?)```$",
    (ROOT / "docs/guides/advise.md").read_text(),
    re.MULTILINE,
)
OUTPUTS = [
    (words, text) for words, text in SHOWN if not text.startswith("$") and "--measure" not in words
]


def test_there_are_outputs() -> None:
    assert len(OUTPUTS) == 6


@pytest.mark.parametrize(
    ("words", "text"), OUTPUTS, ids=[str(number) for number in range(len(OUTPUTS))]
)
def test_the_page_shows_what_is_printed(
    words: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT / "recipes")
    path, facts = parse_advise_args(shlex.split(words))
    Console(width=PIPE_WIDTH).print(render_advice(api.advise(path, **facts)))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == text.splitlines()
