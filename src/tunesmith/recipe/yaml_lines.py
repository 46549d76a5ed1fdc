"""Reading one YAML mapping with the line of every value.

In: the path of a small YAML file. Out: plain values, and the line of every key and list item, so
that errors can say `recipe.yaml:7`. Only plain data is read: no tags, no code. Repeated keys are
reported, since YAML would silently take the last one. Numbers are those of YAML 1.2: `1:30` is a
text, not 90. Size, depth and digits are bounded, since a file of a stranger may multiply them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import suggest_name
from tunesmith.core.run_dir import RECIPE_FILE

DATA_SUFFIXES = (".jsonl", ".csv", ".txt", ".md")  # not a recipe
MAX_BYTES = 250_000
MAX_NODES = 10_000  # keys, values and items, those that a merge key copies included
MAX_DEPTH = 50
MAX_NUMBER_CHARS = 60
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")

YamlPath = tuple[str | int, ...]  # keys and list indices that lead to a value


@dataclass(frozen=True)
class YamlMapping:
    name: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    lines: dict[YamlPath, int] = field(default_factory=dict[YamlPath, int])
    duplicates: tuple[tuple[str, int], ...] = ()  # (key, line of its second occurrence)

    def format_location(self, path: YamlPath) -> str:
        """Return `file:line` of a value, or of the closest value that contains it."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines[path]}" if path else self.name


class _RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader within bounds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.num_nodes = 0
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._count_nodes(1)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        num_pairs = len(node.value)
        super().flatten_mapping(node)
        self._count_nodes(2 * max(0, len(node.value) - num_pairs))

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        """Return the tag of a node; a plain text in base 60 stays a text."""
        tag = super().resolve(kind, value, implicit)
        if kind is not yaml.ScalarNode or tag not in NUMBER_TAGS:
            return tag
        is_plain = implicit[0]
        return "tag:yaml.org,2002:str" if is_plain and BASE_60.fullmatch(value) else tag

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > MAX_NUMBER_CHARS or ":" in node.value:
            raise yaml.MarkedYAMLError(
                problem=f"the number {node.value:.20}... has more than {MAX_NUMBER_CHARS} digits",
                problem_mark=node.start_mark,
            )
        if node.tag == NUMBER_TAGS[0]:
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)

    def _count_nodes(self, count: int) -> None:
        self.num_nodes += count
        if self.num_nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES:,} keys and values are too many")


for number_tag in NUMBER_TAGS:
    _RecipeLoader.add_constructor(number_tag, _RecipeLoader.construct_number)


def load_yaml(text: str) -> Any:
    """Return plain data. Raises YAMLError, ValueError (a date that does not exist) or
    RecursionError for anything else."""
    loader = _RecipeLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path) -> YamlMapping:
    """Read a file as one mapping. Raises InputError with file:line:column if it is not one."""
    text = read_text(path)
    try:
        loader = _RecipeLoader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else {}
    except yaml.YAMLError as error:
        raise _make_yaml_error(path, error) from error
    except ValueError as error:  # a date like 2026-99-99, a number of 5000 digits
        raise InputError(f"invalid value: {error}", where=str(path)) from error
    except RecursionError:
        raise InputError("nested too deeply for a recipe", where=str(path)) from None
    if not isinstance(values, dict):
        raise InputError("expected a mapping of `key: value` lines", where=f"{path}:1")
    lines: dict[YamlPath, int] = {}
    duplicates: list[tuple[str, int]] = []
    for key_path, line in _iter_locations(node, (), set()):
        if key_path in lines:
            duplicates.append((str(key_path[-1]), line))
        lines[key_path] = line
    return YamlMapping(
        str(path), {str(key): value for key, value in values.items()}, lines, tuple(duplicates)
    )


def read_text(path: Path) -> str:
    if not os.path.exists(path):
        fix = "check the path, or write one with `tunesmith init`"
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        if RECIPE_FILE in siblings:
            fix = f"did you mean {path.parent / RECIPE_FILE}?"
        raise InputError(
            "no such file", where=str(path), fix=suggest_name(path.name, siblings, fix)
        )
    if os.path.isdir(path):
        inner = path / RECIPE_FILE
        fix = f"pass {inner}" if os.path.isfile(inner) else f"name a file, such as {RECIPE_FILE}"
        raise InputError("a folder, not a file", where=str(path), fix=fix)
    if not os.path.isfile(path):
        raise InputError("a device or a pipe, not a file", where=str(path), fix="name a file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        message = f"{size:,} bytes are too many for a recipe"
        raise InputError(
            message, where=str(path), fix=f"at most {MAX_BYTES:,}; name data by `data:`"
        )
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {error.start} is not UTF-8", where=str(path), fix="save the file as UTF-8"
        ) from error


def _make_yaml_error(path: Path, error: yaml.YAMLError) -> InputError:
    fix = f"pass a data file with --data {path}" if path.suffix in DATA_SUFFIXES else ""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}"
        return InputError(f"not YAML: {error.problem}", where=where, fix=fix)
    return InputError(f"not YAML: {' '.join(str(error).split())}", where=str(path), fix=fix)


def _iter_locations(
    node: yaml.Node | None, key_path: YamlPath, visited: set[int]
) -> Iterator[tuple[YamlPath, int]]:
    """Yield the path and line of every key and item in `node`.

    An anchor is walked once, so that loops and anchor bombs end."""
    if node is None or id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*key_path, str(key.value)), key.start_mark.line + 1
            yield from _iter_locations(value, (*key_path, str(key.value)), visited)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            yield (*key_path, position), item.start_mark.line + 1
            yield from _iter_locations(item, (*key_path, position), visited)


def read_flag(text: str) -> Any:
    """Parse the value of a flag: lists, mappings and null are YAML, anything else stays text."""
    if not text.startswith(("[", "{")) and text != "null":
        return text
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        fix = "quote it as in a recipe file"
        raise InputError(f"not YAML: {text:.60}", where="command line", fix=fix) from None
