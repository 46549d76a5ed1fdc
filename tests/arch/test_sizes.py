"""Each package is inside its budget (budgets.toml); no function is long."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.size import measure_files

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
TESTS = Path(__file__).parents[1]
BUDGETS = tomllib.loads((TESTS.parent / "budgets.toml").read_text())
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_FLAGS = 10


def iter_functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def count_folder(folder: Path) -> int:
    return sum(path.read_text().count("\n") for path in folder.rglob("*.py"))


def test_every_package_is_inside_its_budget() -> None:
    folders = {init.parent for init in PACKAGE.glob("*/__init__.py")}
    lines = {folder.name: count_folder(folder) for folder in folders}
    assert lines.keys() == BUDGETS["lines"].keys() == BUDGETS["goal"].keys()
    assert {name: n for name, n in lines.items() if n > BUDGETS["lines"][name]} == {}


@pytest.mark.promise
def test_code_is_not_dense() -> None:
    _, _, statements, _, nodes = measure_files(list(PACKAGE.rglob("*.py")))
    assert nodes / statements <= BUDGETS["max_nodes_per_statement"]


def test_tests_are_no_longer_than_the_code() -> None:
    assert count_folder(TESTS) <= BUDGETS["max_test_lines_per_line"] * count_folder(PACKAGE)


@pytest.mark.promise
def test_no_function_is_long_or_takes_many_parameters() -> None:
    breaches: list[str] = []
    for path in PACKAGE.rglob("*.py"):
        for function in iter_functions(path):
            num_lines = (function.end_lineno or function.lineno) - function.lineno + 1
            arguments = function.args.args + function.args.kwonlyargs
            parameters = {argument.arg for argument in arguments} - {"self", "cls"}
            if "triton.jit" in map(ast.unparse, function.decorator_list):
                continue  # a program of a GPU, which takes pointers and sizes
            is_verb = path.parent == PACKAGE / "cli"  # each of its flags is a parameter
            max_parameters = MAX_FLAGS if is_verb else MAX_PARAMETERS
            if num_lines > MAX_FUNCTION_LINES or len(parameters) > max_parameters:
                breaches.append(f"{path.name}:{function.lineno} {function.name}")
    assert breaches == []


def test_no_module_is_a_dumping_ground() -> None:
    names = {"utils", "util", "common", "misc", "other", "helpers", "tools"}
    assert [path for path in PACKAGE.rglob("*.py") if path.stem in names] == []


def test_the_package_has_few_rooms() -> None:
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 17, sorted(path.name for path in entries)
