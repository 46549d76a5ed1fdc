"""docs/guides/advise.md shows what the program prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console
from test_docs import build

from tunesmith import api
from tunesmith.cli.args import parse_advise_args
from tunesmith.cli.output import PIPE_WIDTH
from tunesmith.cli.views.advice import render_advice

ROOT = Path(__file__).parents[2]
# the blocks of docs/build.py: the arguments, the lines that are shown, and the text
BLOCKS = re.findall(
    r"^<!-- \$ tunesmith advise (.+?)(?: \| lines ([\d, -]+))? -->\n```\n\$ .*\n((?:.*\n)+?)```$",
    (ROOT / "docs/guides/advise.md").read_text(),
    re.MULTILINE,
)


def test_there_are_outputs() -> None:
    assert len(BLOCKS) == 2


@pytest.mark.parametrize(
    ("words", "lines", "text"), BLOCKS, ids=[str(number) for number in range(len(BLOCKS))]
)
def test_the_page_shows_what_is_printed(
    words: str, lines: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, facts = parse_advise_args(shlex.split(words))
    Console(width=PIPE_WIDTH).print(render_advice(api.advise(path, **facts)))
    output = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert list(build._select_lines(output, lines or "1-")) == text.splitlines()
