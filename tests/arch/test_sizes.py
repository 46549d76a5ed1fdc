"""Small files, small functions. A file or function that outgrows the limits is split, not
excused."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8
TEST_FILE_LINES = 600


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_file_is_long() -> None:
    files = dict.fromkeys(PACKAGE.rglob("*.py"), FILE_LINES)
    files |= dict.fromkeys(Path(__file__).parents[1].rglob("*.py"), TEST_FILE_LINES)
    assert {str(path): lines(path) for path, most in files.items() if lines(path) > most} == {}


def test_no_function_is_long_or_takes_much() -> None:
    found: dict[str, int] = {}
    for path in PACKAGE.rglob("*.py"):
        for function in functions(path):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            names = [argument.arg for argument in function.args.args + function.args.kwonlyargs]
            taken = len(set(names) - {"self", "cls"})
            if length > FUNCTION_LINES or taken > PARAMETERS:
                found[f"{path.name}:{function.lineno} {function.name}"] = length
    assert found == {}


def test_no_module_is_a_dumping_ground() -> None:
    names = {"utils", "util", "common", "misc", "other", "helpers", "tools"}
    assert [path for path in PACKAGE.rglob("*.py") if path.stem in names] == []
