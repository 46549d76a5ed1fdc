"""Print the size of each folder of the package: `make size`.

Out: files, code lines (as `ast.unparse` writes them, without comments and docstrings, so that the
layout does not count), statements, functions, and
AST nodes per statement (its density; annotations are not counted).
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "tunesmith"


def main() -> None:
    columns = f"{'files':>6}{'code':>8}{'statements':>12}{'functions':>11}{'nodes/st':>10}"
    print(f"{'folder':28}{columns}")
    rows = {folder: measure_files(paths) for folder, paths in list_folders().items()}
    for folder, row in rows.items():
        print_row(folder, *row)
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    print_row("all", *totals)


def print_row(
    folder: str, files: int, code: int, statements: int, functions: int, nodes: int
) -> None:
    per_statement = nodes / max(statements, 1)
    print(f"{folder:28}{files:6}{code:8,}{statements:12,}{functions:11,}{per_statement:10.1f}")


def list_folders() -> dict[str, list[Path]]:
    """Return the files of each folder; a top-level file counts as a folder."""
    folders: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.parent.relative_to(PACKAGE)
        name = str(folder) if folder.parts else path.stem
        folders.setdefault(name, []).append(path)
    return folders


def measure_files(paths: list[Path]) -> tuple[int, int, int, int, int]:
    """Return the numbers of files, code lines, statements, functions and AST nodes."""
    trees = [strip_tree(ast.parse(path.read_text())) for path in paths]
    nodes: list[ast.AST] = []
    for tree in trees:
        nodes += ast.walk(tree)
    code_lines = sum(len(ast.unparse(tree).splitlines()) for tree in trees)
    statements = sum(isinstance(node, ast.stmt) for node in nodes)
    functions = sum(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in nodes)
    return len(paths), code_lines, statements, functions, len(nodes)


def strip_tree(tree: ast.Module) -> ast.Module:
    """Remove annotations and docstrings from the tree and return it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(0)
        can_have_docstring = isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        )
        if can_have_docstring and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


if __name__ == "__main__":
    main()
