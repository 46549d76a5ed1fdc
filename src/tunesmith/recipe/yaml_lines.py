"""Reads one YAML mapping and remembers where each value stands.

In: the path of a small YAML file. Out: a Document with plain values and the line of every key and list item, so that
whoever checks the values can say `recipe.yaml:7`. Only plain data is read: no tags, no code. A key that stands twice
is an error, since YAML would silently keep the last one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core.errors import InputError

OF_ROWS = (".jsonl", ".csv", ".txt", ".md")  # what nobody names a recipe
MOST_BYTES = 1_000_000

Place = tuple[str | int, ...]  # the keys and list positions that lead to a value


@dataclass(frozen=True)
class Document:
    name: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    lines: dict[Place, int] = field(default_factory=dict[Place, int])
    duplicates: tuple[tuple[str, int], ...] = ()  # key, line of its second occurrence

    def where(self, place: Place) -> str:
        """`file:line` of a value, or of the nearest value around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.name}:{self.lines[place]}" if place else self.name


def read_yaml(path: Path) -> Document:
    """Raises InputError with file:line:column when the file cannot be read as one mapping."""
    text = _text(path)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else {}
    except yaml.YAMLError as error:
        raise _broken(path, error) from error
    except ValueError as error:  # a date like 2026-99-99, a number of 5000 digits
        raise InputError(f"a value is not what it looks like: {error}", where=str(path)) from error
    except RecursionError:
        raise InputError("nested too deeply to be a recipe", where=str(path)) from None
    if not isinstance(values, dict):
        raise InputError("expected a mapping of `key: value` lines", where=f"{path}:1")
    lines: dict[Place, int] = {}
    duplicates: list[tuple[str, int]] = []
    for place, line in _places(node, (), set()):
        if place in lines:
            duplicates.append((str(place[-1]), line))
        lines[place] = line
    return Document(str(path), {str(key): value for key, value in values.items()}, lines, tuple(duplicates))


def _text(path: Path) -> str:
    if not os.path.exists(path):
        raise InputError("there is no such file", where=str(path))
    if not os.path.isfile(path):
        raise InputError("expected a file, found a folder or a device", where=str(path))
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path.stat().st_size} bytes are too many for a recipe", where=str(path))
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not UTF-8", where=str(path), fix="save the file as UTF-8") from error
    except PermissionError as error:
        raise InputError("this file may not be read", where=str(path)) from error


def _broken(path: Path, error: yaml.YAMLError) -> InputError:
    fix = f"this is a file of rows? name it so: --data {path}" if path.suffix in OF_ROWS else ""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return InputError(f"not YAML: {error.problem}", where=f"{path}:{mark.line + 1}:{mark.column + 1}", fix=fix)
    return InputError(f"not YAML: {' '.join(str(error).split())}", where=str(path), fix=fix)


def _places(node: yaml.Node | None, place: Place, seen: set[int]) -> Iterator[tuple[Place, int]]:
    """The place and line of every key and item below `node`. An anchor is walked once, so loops and bombs end."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*place, str(key.value)), key.start_mark.line + 1
            yield from _places(value, (*place, str(key.value)), seen)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            yield (*place, position), item.start_mark.line + 1
            yield from _places(item, (*place, position), seen)


def read_flag(text: str) -> Any:
    """The value of a command-line flag. Only lists, mappings and null are YAML; numbers and switches stay text."""
    if not text.startswith(("[", "{")) and text != "null":
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"not YAML: {text:.60}", where="command line", fix="quote it as in a recipe file") from None
