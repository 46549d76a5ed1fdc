"""Names say what a thing is: a class name occurs once, no word is empty. A file of tests has a name
of its own."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
TESTS = Path(__file__).parents[1]
BENCHMARKS = TESTS.parent / "benchmarks"

# Words without content: they name nothing, alone or as a part of a name.
EMPTY_WORDS = set("found one told known said kept left own asked whole place given".split())  # noqa: SIM905

CHARTS = {"svg_charts.py"}  # where left is a direction

# What libraries dictate.
DICTATED = {
    "getMessage",
    "extra_repr",
    "shell_complete",
    "fromkeys",
    "getitem",
    "getattr",
    "_output_child_to_const",
    "capture_signals",
    "found_inf",  # of torch's optimizers
    "connection_made",  # of asyncio's protocols
    *dir(str),
}


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that the code binds: functions, classes, parameters, variables, fields."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def empty_names(source: str) -> list[tuple[int, str]]:
    names = set(identifiers(ast.parse(source)))
    return sorted(
        (line, name)
        for line, name in names
        if name not in DICTATED and EMPTY_WORDS & set(name.lower().split("_"))
    )


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.promise
def test_no_name_is_an_empty_word() -> None:
    files = [path for path in sources() if path.name not in CHARTS]
    breaches = {
        str(path): empty_names(path.read_text()) for path in (*files, *BENCHMARKS.rglob("*.py"))
    }
    assert {path: names for path, names in breaches.items() if names} == {}


@pytest.mark.promise
def test_a_class_name_occurs_once() -> None:
    names = Counter(
        node.name
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_a_file_of_tests_has_a_name_of_its_own() -> None:
    """Each is imported by its base name, from whatever folder: a second one would hide it."""
    names = Counter(path.name for path in TESTS.rglob("*.py"))
    del names["conftest.py"]
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("found = 1", "found"),
        ("def load(asked): ...", "asked"),
        ("class A:\n    kept_rows: int", "kept_rows"),
        ("x = [one for one in (1, 2)]", "one"),
        ("self.left = 3", "left"),
        ("try: ...\nexcept OSError as told: ...", "told"),
    ],
)
def test_an_empty_word_is_noticed(source: str, name: str) -> None:
    assert name in [name for _, name in empty_names(source)]
