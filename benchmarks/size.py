"""Print the size of each feature of the package: `make size`.

Out: files, code lines (without blank lines, comments and docstrings), statements, functions, and
AST nodes per statement (how much one statement carries), annotations not counted.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "tunesmith"


def main() -> None:
    print(
        f"{'feature':28}{'files':>6}{'code':>8}{'statements':>12}{'functions':>11}{'nodes/st':>10}"
    )
    rows = {feature: measure_files(paths) for feature, paths in list_features().items()}
    for feature, row in rows.items():
        print_row(feature, *row)
    print_row("all", *(sum(column) for column in zip(*rows.values(), strict=True)))


def print_row(
    feature: str, files: int, code: int, statements: int, functions: int, nodes: int
) -> None:
    per_statement = nodes / max(statements, 1)
    print(f"{feature:28}{files:6}{code:8,}{statements:12,}{functions:11,}{per_statement:10.1f}")


def list_features() -> dict[str, list[Path]]:
    """A feature is a folder of the package; a folder that has folders counts each of them."""
    features: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.parent.relative_to(PACKAGE)
        name = str(folder) if folder.parts else path.stem
        features.setdefault(name, []).append(path)
    return features


def measure_files(paths: list[Path]) -> tuple[int, int, int, int, int]:
    """Files, code lines, statements, functions, AST nodes."""
    trees = [strip_tree(ast.parse(path.read_text())) for path in paths]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    code_lines = sum(len(ast.unparse(tree).splitlines()) for tree in trees)
    statements = sum(isinstance(node, ast.stmt) for node in nodes)
    functions = sum(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in nodes)
    return len(paths), code_lines, statements, functions, len(nodes)


def strip_tree(tree: ast.Module) -> ast.Module:
    """The tree without annotations and docstrings."""
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
