"""Only cli/output.py and core/library_output.py write to a stream of the terminal, since they make
control characters visible."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
WRITERS = {
    *("sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer.write", "sys.stderr.buffer.write"),
    *("sys.stdout.writelines", "sys.stderr.writelines", "sys.__stderr__.write"),
    *("sys.__stdout__.write", "print", "input", "os.write", "Console", "rich.print"),
    *("typer.echo", "typer.secho", "traceback.print_exception", "traceback.print_exc"),
}
ALLOWED = {
    "cli/output.py": {"sys.stdout.write", "sys.stderr.write"},
    "cli/app.py": {"sys.stdout.write", "typer.echo"},  # the schema, --version and --help
    "core/library_output.py": {"sys.stderr.write"},  # escaped tracebacks
    "core/run_dir.py": {"os.write"},  # files
    "serve/feedback.py": {"os.write"},
}


def find_writers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in WRITERS:
            yield name


@pytest.mark.promise
def test_only_the_edge_writes_to_the_terminal() -> None:
    writers: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if names := set(find_writers(path.read_text())):
            writers[path.relative_to(PACKAGE).as_posix()] = names
    assert writers == ALLOWED


@pytest.mark.parametrize(
    "line", ["print(name)", "sys.stderr.write(name)", "Console(stderr=True)", "input(question)"]
)
def test_another_writer_would_be_noticed(line: str) -> None:
    assert list(find_writers(line))
