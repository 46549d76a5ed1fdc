"""What the verbs of the command line share: words that become a recipe, results that become text.

words -> read_wish -> Recipe, or Stages; result -> say -> one JSON object, or what `rich` prints
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, to_jsonable
from tunesmith.core.types import __version__
from tunesmith.recipe.load import is_flag_value, load_recipe, needs_value
from tunesmith.recipe.schema import Recipe, Stages

RecipeArgs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE.yaml | --KEY VALUE",
        help="A recipe, and any of its keys as flags: --learning-rate 1e-4. `tunesmith schema` lists the keys.",
        show_default=False,
    ),
]
AdviseArgs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FACTS.yaml | RECIPE.yaml | --FACT VALUE",
        help="A file of facts or a recipe, and facts as flags: --need tone --examples 300. Without any, it asks.",
        show_default=False,
    ),
]
RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run metrics that are Python files: FILE.py:FUNCTION.")
]

PIPE_WIDTH = 120


def parse_recipe_args(args: Sequence[str] | None) -> Recipe | Stages:
    """The recipe that the words of the command line ask for."""
    return load_recipe(*parse_flags(args))


def parse_flags(
    args: Sequence[str] | None, needs_value: Callable[[str], bool] = needs_value
) -> tuple[Path | None, dict[str, str]]:
    """A file, and flags with their values. A flag without a value is a switch."""
    path: Path | None = None
    flags: dict[str, str] = {}
    words = list(args or ())
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if path is not None:
                raise InputError(
                    f"two recipe files, {path} and {word}", where="command line", fix="name one"
                )
            path = Path(word)
            continue
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            value = words.pop(0) if words and is_flag_value(key, words[0]) else ""
            if not value and needs_value(key):
                raise InputError(
                    f"--{key} has no value",
                    where="command line",
                    fix=f"write it behind: --{key} VALUE",
                )
            value = value or "true"
        if key.replace("-", "_") in {flag.replace("-", "_") for flag in flags}:
            fix = f"give it once; several values are a list: --{key} '[one, two]'"
            raise InputError(f"--{key} stands twice", where="command line", fix=fix)
        flags[key] = value
    return path, flags


def parse_advise_args(args: Sequence[str] | None) -> tuple[Path | None, dict[str, Any]]:
    """The facts that the words tell; without words they are asked for, one a line, if somebody is
    there to answer."""
    from tunesmith.advise.rules import questionnaire

    path, flags = parse_flags(args, questionnaire.needs_value)
    if path or flags or not sys.stdin.isatty():
        return path, {f"--{key}": value for key, value in flags.items()}
    return None, questionnaire.ask_questions(
        _ask_question, lambda problem: _write_stderr(f"  {problem}\n")
    )


def _ask_question(question: str) -> str:
    _write_stderr(f"{question}\n> ")
    if not (line := sys.stdin.readline()):
        raise typer.Abort
    return line


def _write_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def read_questions() -> Iterator[str]:
    """What is typed, a question a line."""
    prompt = "you: " if sys.stdin.isatty() else ""
    while True:
        _write_stderr(prompt)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def print_result(value: Any, *views: Any, as_json: bool) -> None:
    """The result of a verb: an object for programs, or views that `rich` prints for people."""
    from rich.console import Console
    from rich.text import Text

    if as_json:
        sys.stdout.write(dump_json({"tunesmith": __version__, **to_jsonable(value)}).decode())
    else:
        console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
        texts = [
            Text(view) if isinstance(view, str) else view for view in views
        ]  # no markup from data or models
        console.print(*texts, sep="\n", highlight=False)
