"""Build the task files of recipes/instruction.yaml from the Python standard library.

In: the files of the Debian 13 package libpython3.13-stdlib, installed or unpacked under --root.
Out: recipes/data/tasks/ with a training and a test file per task; rows have columns and a
`completion` from the syntax tree. Modules are divided by hash, so train and test share none, and
each function is in one task only. Run once by a developer; the same package gives the same bytes.
Left out: ORIGIN.md, written by hand.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

LENGTH = range(50, 261)  # characters of a function
TEST_SHARE = 4  # one of so many modules
TEST_ROWS = 40

Function = ast.FunctionDef
Row = dict[str, str]


def iter_functions(root: Path) -> Iterator[tuple[str, str, Function]]:
    """Yield (module, code, tree) of short functions and methods.

    Modules with a separate copyright are skipped.
    """
    library = root / "usr/lib/python3.13"
    for path in sorted(library.rglob("*.py")):
        source = path.read_text("utf-8", errors="replace")
        if "opyright" in source or {"test", "idlelib", "lib2to3", "pydoc_data"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, Function) and not node.decorator_list:
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                code = textwrap.dedent("\n".join(lines))
                if len(code) in LENGTH:
                    yield str(path.relative_to(library)), code, node


def arguments(code: str, node: Function) -> Row | None:
    """Make an extraction row: the names of the parameters."""
    parameters = node.args
    names = [
        parameter.arg
        for parameter in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)
    ]
    plain = not (
        parameters.vararg or parameters.kwarg or parameters.posonlyargs or parameters.kwonlyargs
    )
    return (
        {"code": code, "completion": ", ".join(names)} if plain and 2 <= len(names) <= 5 else None
    )


def returns(code: str, node: Function) -> Row | None:
    """Make a classification row: what a call returns."""
    body = list(_iter_body(node))
    yields = any(isinstance(child, ast.Yield | ast.YieldFrom) for child in body)
    value = any(isinstance(child, ast.Return) and child.value is not None for child in body)
    if yields and value:
        return None
    return {"code": code, "completion": "generator" if yields else "value" if value else "nothing"}


def exceptions(code: str, node: Function) -> Row | None:
    """Make an extraction row: the only exception that is raised by name."""
    raised = [
        _get_exception_name(child.exc) for child in _iter_body(node) if isinstance(child, ast.Raise)
    ]
    return {"code": code, "completion": raised[0]} if len(set(raised)) == 1 and raised[0] else None


def names(code: str, node: Function) -> Row | None:
    """Make a rewriting row: snake_case as CamelCase."""
    del code
    words = node.name.split("_")
    if len(words) not in (2, 3, 4) or not all(
        word.isalpha() and word.islower() and len(word) > 1 for word in words
    ):
        return None
    return {"name": node.name, "completion": "".join(word.capitalize() for word in words)}


def _iter_body(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without nested functions and classes."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef
        ):
            yield child
            yield from _iter_body(child)


def _get_exception_name(raised: ast.expr | None) -> str | None:
    raised = raised.func if isinstance(raised, ast.Call) else raised
    return raised.id if isinstance(raised, ast.Name) and raised.id[0].isupper() else None


Task = tuple[
    Callable[[str, Function], Row | None], int, int
]  # what makes a row, training rows, most of one answer
TASKS: dict[str, Task] = {
    "exceptions": (exceptions, 0, 12),
    "returns": (returns, 80, 30),
    "arguments": (arguments, 150, 12),
    "names": (names, 300, 1),
}


def build_task_files(root: Path, folder: Path) -> None:
    def shuffled(item: tuple[str, str, Function]) -> str:
        return hashlib.sha256(item[1].encode()).hexdigest()

    functions = sorted(iter_functions(root), key=shuffled)
    used_texts: set[str] = set()
    for task, (make, rows, most) in TASKS.items():
        for suffix, count in (("", rows), ("-test", TEST_ROWS)):
            task_rows = select_rows(
                functions,
                make,
                used_texts,
                count,
                test=bool(suffix),
                most=most if not suffix else max(1, 2 * most // 3),
            )
            if count:
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in task_rows)
                (folder / f"{task}{suffix}.jsonl").write_text(text, encoding="utf-8")


def select_rows(
    functions: list[tuple[str, str, Function]],
    make: Callable[[str, Function], Row | None],
    used_texts: set[str],
    count: int,
    *,
    test: bool,
    most: int,
) -> list[Row]:
    """Return the first `count` rows whose function and columns are in no other task.

    At most `most` have the same answer.
    """
    selected: list[Row] = []
    answers: Counter[str] = Counter()
    seen: set[str] = set()
    for module, code, node in functions:
        held_out = int(hashlib.sha256(module.encode()).hexdigest(), 16) % TEST_SHARE == 0
        row = make(code, node) if held_out == test and len(selected) < count else None
        if (
            row is None
            or answers[row["completion"]] == most
            or used_texts & {code, *row.values()} - {row["completion"]}
        ):
            continue
        if make is arguments and node.name in seen:  # many classes have a method of one name
            continue
        answers[row["completion"]] += 1
        used_texts |= {code, *row.values()} - {row["completion"]}
        seen.add(node.name)
        selected.append(row)
    if len(selected) < count:
        raise SystemExit(f"{make.__name__}: {len(selected)} rows of {count}")
    return selected


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("/"))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[2] / "recipes/data/tasks"
    )
    args = parser.parse_args()
    build_task_files(args.root, args.out)
