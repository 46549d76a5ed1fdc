"""Reading a config of another tool: YAML, JSON, or a command in a shell script.

In: the path of the file. Out: its keys with their lines. Nothing is run: a value that only a run
would know is an `Expression`. Left out: the meaning of the keys (keys.yaml)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.recipe.importers.draft import NUMBER_PATTERN
from tunesmith.recipe.yaml_lines import YamlMapping, YamlPath, read_text, read_yaml

COMMANDS = ("sft", "pt", "rlhf")  # of ms-swift
SETTING = re.compile(r"\w+=")
# Up to a comment: a # that begins a word, outside of quotes.
CODE = re.compile(r"""(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|(?<=\S)#|[^#'"\\])*""")
VARIABLE = re.compile(r"\$\{?(\w+)\}?")


class Expression(str):
    """Code whose value is only known when it runs."""

    __slots__ = ()


def read_config(path: Path) -> YamlMapping:
    """Read the keys of a config. Raises InputError with the place of what cannot be read."""
    return _read_command(path) if path.suffix == ".sh" else read_yaml(path)


# ---------------------------------------------------------------- shell


def _read_command(path: Path) -> YamlMapping:
    """Read the flags of the first training command; variables that the script sets are replaced."""
    variables: dict[str, str] = {}
    values: dict[str, list[Any]] = {}
    lines: dict[YamlPath, int] = {}
    for words in _iter_commands(path):
        texts = [word for word, _ in words]
        start = _find_flags(texts)
        if not start:
            for name, _, value in (text.partition("=") for text in texts if SETTING.match(text)):
                # what is set again is only known when it runs
                variables[name] = f"${name}" if name in variables else _expand(value, variables)
        elif values:
            values["another command"] = [Expression(f"line {words[0][1]}")]
        else:
            values["swift"] = [texts[start - 1]]
            key = "positional"
            for text, line in words[start:]:
                if text.startswith("--"):
                    key, _, text = text.removeprefix("--").partition("=")
                    lines[(key,)] = line
                    values[key] = []
                if text and not text.startswith("--"):
                    values.setdefault(key, []).append(_parse_word(_expand(text, variables)))
    if not values:
        raise InputError("no training command, such as swift sft", where=f"{path}:1")
    return YamlMapping(str(path), {key: _join(items) for key, items in values.items()}, lines)


def _join(items: list[Any]) -> Any:
    """Return the value of a flag; without one it is a switch."""
    if any(isinstance(item, Expression) for item in items):
        return Expression(" ".join(map(str, items)))
    return items[0] if len(items) == 1 else items or True


def _iter_commands(path: Path) -> Iterator[list[tuple[str, int]]]:
    """Yield the words of each command with their lines."""
    words: list[tuple[str, int]] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        rest = CODE.sub("", line, count=1)
        text = (line.removesuffix(rest) if rest.startswith("#") else line).rstrip()
        try:
            parts = shlex.split(text.removesuffix("\\"))
        except ValueError as error:
            raise InputError(f"not a shell command: {error}", where=f"{path}:{number}") from None
        words += [(part, number) for part in parts]
        if not text.endswith("\\"):
            yield words
            words = []
    yield words


def _find_flags(texts: list[str]) -> int:
    """Return where the flags of a training command start, 0 if it is none."""
    pairs = enumerate(pairwise(texts), 2)
    return next((i for i, (program, word) in pairs if program == "swift" and word in COMMANDS), 0)


def _expand(text: str, variables: dict[str, str]) -> str:
    """Replace the variables of a text; with others, or a command in it, it is an Expression."""
    expanded = VARIABLE.sub(lambda match: variables.get(match[1], match[0]), text)
    return Expression(expanded) if "$" in expanded or "`" in expanded else expanded


def _parse_word(text: str) -> Any:
    number = NUMBER_PATTERN.fullmatch(text)
    return (int(text) if text.isdigit() else float(text)) if number else text
