"""A file ends where an idea ends: none is long, and none is tiny unless something swaps it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
MAX_FILE_LINES = 600
MIN_FILE_LINES = 60
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_FLAGS = 10

# Small on purpose: many import it and it has no neighbor, or it stands for an optional library.
SMALL_FILES = {
    "core/sampling.py",  # for verbs that load no torch
    "cli/views/verification.py",  # of a single verb
    "core/finite_json.py",  # below events.py and json_io.py, which both need it
    "core/progress_log.py",
    "data/checks/language_id.py",
    "data/tokenizer/eos.py",
    "train/neftune.py",  # on or off as a whole
}


def iter_functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_file_is_long() -> None:
    files = [*PACKAGE.rglob("*.py"), *Path(__file__).parents[1].rglob("*.py")]
    assert {str(path) for path in files if count_lines(path) > MAX_FILE_LINES} == set()


def test_no_file_is_tiny_unless_something_swaps_it() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")]
    tiny = {
        path.relative_to(PACKAGE).as_posix() for path in files if count_lines(path) < MIN_FILE_LINES
    }
    assert tiny == SMALL_FILES


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
