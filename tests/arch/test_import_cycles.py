"""No file of the package imports itself through others, imports for types alone included."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "tunesmith"


def list_imports(path: Path) -> set[Path]:
    """Return the files that a file imports when it is read, or for its types."""
    imported: set[Path] = set()
    tree = ast.parse(path.read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    for node in [*tree.body, *(inner for block in blocks for inner in block.body)]:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("tunesmith"):
            continue
        folder = PACKAGE.parent.joinpath(*(node.module or "").split("."))
        names = [folder / f"{alias.name}.py" for alias in node.names]
        names += [folder / alias.name / "__init__.py" for alias in node.names]
        files = [name for name in names if name.is_file()]
        imported.update(files or [folder.with_suffix(".py")])
    return imported


def test_no_file_imports_itself_through_others() -> None:
    imports = {path: list_imports(path) for path in PACKAGE.rglob("*.py")}
    assert len(imports) > 300
    TopologicalSorter(imports).prepare()  # raises CycleError, which lists the files
