"""Command-line arguments into recipes, and lines of stdin.

In: the words of the command line. Out: a Recipe or Stages, or answers to questions. Left out: the
verbs themselves, and what they print (output.py)."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.help import switch
from tunesmith.cli.output import write_stderr
from tunesmith.core.errors import InputError

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe, Stages

COMMAND_LINE = "command line"
MAX_READ_CHARS = 250_000  # of a file that may be a recipe

RecipeArgs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE.yaml | --KEY VALUE",
        help="Recipe file, and any recipe key as a flag.",
        show_default=False,
    ),
]
AdviseArgs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FACTS.yaml | RECIPE.yaml | --FACT VALUE",
        help="Facts or recipe file, and facts as flags: --need tone.",
        show_default=False,
    ),
]
RunArg = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run folder.", show_default=False),
]
RunArgs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN ...",
        help="Run folder; several for a server.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, switch("--json", "Print the result as JSON.")]
AllowCode = Annotated[
    bool, switch("--allow-code", "Allow metrics from Python files (FILE.py:FUNCTION).")
]

DEFAULT_RECIPE = Path("recipe.yaml")
RECIPE_SUFFIXES = (".yaml", ".yml")
MODEL_LINE = re.compile(r"^model(_name_or_path)?\s*:", re.MULTILINE)
MAX_RECIPES = 3  # that an error names

# Former flags and verbs -> what to do instead.
OLD_FLAGS = {
    "--ablate": "train on selected.jsonl and on random.jsonl with the same --max-steps, then run "
    "`tunesmith compare` on the two runs",
    "--metric": "set it as the recipe's `metrics`: --metrics METRIC",
    "--similarity": "leave it out: questions are compared by hidden states",
    "export --base": "leave it out: the adapter is merged into the weights that it was trained on",
    "--fit": "use --memory",
    "--calibrate": "use --benchmark",
    "--allow-drift": "use --allow-changes",
    "--from-step": "use --checkpoint",
    "--dry-run": "use --target 8xh100, which predicts the memory of each GPU",
    "--tool": "use --out FILE.csv: annotation tools and spreadsheets import and export CSV",
    "--recovery": "run experiments/relearning/relearning.py from a checkout of the repository",
    "--baselines": "run experiments/constraint_baselines/constraint_baselines.py from a checkout "
    "of the repository",
}
OLD_VERBS: dict[tuple[str, ...], str] = {
    ("doctor", "--model"): "tunesmith plan",
    ("data", "review"): "tunesmith data export-reviews",
    ("data", "reviewed"): "tunesmith data import-reviews",
}


def refuse_old_words(words: Sequence[str]) -> None:
    """Raise InputError, with the new name, for a verb or flag that has been renamed."""
    if new_verb := OLD_VERBS.get(tuple(words[:2])):
        message = f"`{' '.join(words[:2])}` has been renamed"
        raise InputError(message, where=COMMAND_LINE, fix=f"use `{new_verb}`")
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if fix := OLD_FLAGS.get(flag) or OLD_FLAGS.get(f"{words[0]} {flag}"):
            raise InputError(f"{flag} is no longer a flag", where=COMMAND_LINE, fix=fix)


def parse_recipe_args(args: Sequence[str] | None) -> Recipe | Stages:
    """Load the recipe that the arguments describe; without a file, ./recipe.yaml if there is one.

    Flags that name a model are a recipe by themselves."""
    from tunesmith.recipe.explain import normalize_key
    from tunesmith.recipe.load import load_recipe
    from tunesmith.recipe.schema import ALIASES, KEYS

    path, flags = parse_flags(args)
    keys = [normalize_key(flag) for flag in flags]
    names_model = "model" in [ALIASES.get(key, key) for key in keys]
    if path is None and not names_model and DEFAULT_RECIPE.is_file():
        path = DEFAULT_RECIPE
        write_stderr(f"recipe: {path}\n")
    elif path is None and not names_model and all(ALIASES.get(key, key) in KEYS for key in keys):
        _suggest_recipe_here(has_data="data" in [ALIASES.get(key, key) for key in keys])
    return load_recipe(path, flags)


def _suggest_recipe_here(*, has_data: bool) -> None:
    """Raise InputError that names the recipe files of the current folder, or how to write one.

    Flags with data but no model are an unfinished recipe, if the folder has no file."""
    files = [file for file in Path().iterdir() if file.suffix in RECIPE_SUFFIXES and file.is_file()]
    recipes = sorted(file.name for file in files if _has_model_key(file))
    if has_data and not recipes:
        return
    fix = "write one with `tunesmith init`"
    if recipes:
        names = f"one of {', '.join(recipes[:MAX_RECIPES])}" if len(recipes) > 1 else recipes[0]
        more = ", ..." if len(recipes) > MAX_RECIPES else ""
        fix = f"pass {names}{more}"
    message = "no recipe is named, and there is no recipe.yaml here"
    raise InputError(message, where=COMMAND_LINE, fix=fix)


def _has_model_key(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            return bool(MODEL_LINE.search(lines.read(MAX_READ_CHARS)))
    except OSError:  # not to be read: not a recipe to suggest
        return False


def parse_flags(
    args: Sequence[str] | None, needs_value: Callable[[str], bool] | None = None
) -> tuple[Path | None, dict[str, str]]:
    """Split arguments into a file and flags with their values; a bare flag has the value "true".

    `needs_value` says which flags cannot be bare; by default, those of a recipe. Raises InputError
    for a second file, a repeated flag, and a missing value."""
    from tunesmith.recipe import load

    needs_value = needs_value or load.needs_value
    path: Path | None = None
    flags: dict[str, str] = {}
    words = list(args or ())
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if path is not None:
                message = f"two recipe files, {path} and {word}"
                raise InputError(message, where=COMMAND_LINE, fix="pass only the first or second")
            path = Path(word)
            continue
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            value = words.pop(0) if words and load.is_flag_value(key, words[0]) else ""
            if not value and needs_value(key):
                fix = f"write --{key} VALUE{_format_choices(load.list_choices(key))}"
                raise InputError(f"--{key} has no value", where=COMMAND_LINE, fix=fix)
            value = value or "true"
        if key.replace("-", "_") in {flag.replace("-", "_") for flag in flags}:
            fix = f"pass it once; several values are a list: --{key} '[a, b]'"
            raise InputError(f"--{key} is repeated", where=COMMAND_LINE, fix=fix)
        flags[key] = value
    return path, flags


def _format_choices(choices: Sequence[str]) -> str:
    return f": {', '.join(choices[:-1])} or {choices[-1]}" if choices else ""


def parse_advise_args(args: Sequence[str] | None) -> tuple[Path | None, dict[str, Any]]:
    """Parse facts from the flags."""
    from tunesmith.advise.rules import facts

    path, flags = parse_flags(args, facts.needs_value)
    return path, {f"--{key}": value for key, value in flags.items()}


def read_questions() -> Iterator[str]:
    """Yield the non-empty lines of stdin, with a prompt on a terminal."""
    prompt = "you: " if sys.stdin.isatty() else ""
    while True:
        write_stderr(prompt)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
