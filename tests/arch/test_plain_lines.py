"""One thought per line: no nested comprehension, no unrelated values in one assignment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def nested_comprehensions(source: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, COMPREHENSIONS) and count_comprehensions(node) > 1
    ]


def count_comprehensions(node: ast.AST) -> int:
    return sum(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node))


def tuple_assignments(source: str) -> list[int]:
    """Lines such as `a, b = 1, 2`; a swap (`a, b = b, a`) is one thought."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
        and not is_swap(node.targets[0], node.value)
    ]


def is_swap(target: ast.Tuple, value: ast.Tuple) -> bool:
    targets = sorted(ast.unparse(element) for element in target.elts)
    return targets == sorted(ast.unparse(element) for element in value.elts)


@pytest.mark.promise
def test_no_comprehension_holds_another() -> None:
    breaches = {
        str(path): nested_comprehensions(path.read_text()) for path in PACKAGE.rglob("*.py")
    }
    assert {path: lines for path, lines in breaches.items() if lines} == {}


@pytest.mark.promise
def test_an_assignment_is_one_thought() -> None:
    breaches = {str(path): tuple_assignments(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in breaches.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "is_breach"),
    [
        ("a = [[j for j in i] for i in x]", True),
        ("a = {i: sum(j for j in i) for i in x}", True),
        ("a = any(i for i in x)", False),
    ],
)
def test_a_nested_comprehension_is_noticed(source: str, is_breach: bool) -> None:
    assert bool(nested_comprehensions(source)) == is_breach


@pytest.mark.parametrize(
    ("source", "is_breach"),
    [("a, b = 1, 2", True), ("a, b = b, a", False), ("a, b = load()", False)],
)
def test_a_tuple_assignment_is_noticed(source: str, is_breach: bool) -> None:
    assert bool(tuple_assignments(source)) == is_breach
