"""The report reads run folders and nothing depends on it: without its folder everything else works
as before. Two files name it, and say so when it is missing: the verb and the Python API."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
CALLERS = {"api/__init__.py", "cli/run.py"}


def imports_report(path: Path) -> bool:
    """Return whether a file imports the report or a module of it."""
    imports = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = [name.name for node in imports for name in node.names]
    names += [str(getattr(node, "module", "")) for node in imports]
    return any(name.startswith("tunesmith.report") for name in names)


@pytest.mark.promise
def test_only_its_face_imports_report() -> None:
    others = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "report"]
    assert {
        path.relative_to(PACKAGE).as_posix() for path in others if imports_report(path)
    } == CALLERS


def test_it_loads_no_model_library() -> None:
    program = (
        "import sys, tunesmith.report.page\n"
        "print(*{'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.promise
def test_the_package_works_without_it(tmp_path: Path) -> None:
    """Every other module can be imported, and a run that ends without a page says nothing of
    one."""
    shutil.copytree(PACKAGE, tmp_path / "tunesmith", ignore=shutil.ignore_patterns("report"))
    modules = [
        ".".join(("tunesmith", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "report"
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text("{}")
    program = (
        f"import importlib\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        "from pathlib import Path\nimport tunesmith\nfrom tunesmith.cli import run\n"
        "run.write_page(Path('run'))\n"
        "print(Path(tunesmith.__file__).parent, len(list(Path('run').iterdir())))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout.split()) == (0, [str(tmp_path / "tunesmith"), "1"]), (
        done.stderr
    )
