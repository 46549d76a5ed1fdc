"""Who may import whom: the contracts of pyproject.toml hold, and they would notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith

ROOT = Path(__file__).parents[2]
PACKAGE = Path(tunesmith.__file__).parent


def lint(source: Path) -> subprocess.CompletedProcess[str]:
    command = [
        Path(sys.executable).with_name("lint-imports"),
        "--no-cache",
        "--config",
        str(ROOT / "pyproject.toml"),
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(source)},
    )


def test_the_contracts_hold() -> None:
    done = lint(PACKAGE.parent)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("core/types.py", "from tunesmith.cli import app", "Layers BROKEN"),
        ("data/packing.py", "import torch", "loads no torch BROKEN"),
        ("train/__init__.py", "import transformers", "Only model imports transformers BROKEN"),
        ("helpers.py", "", "helpers"),
    ],
)
def test_a_breach_is_noticed(file: str, line: str, contract: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "tunesmith", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "tunesmith" / file).open("a") as opened:
        opened.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert contract in " ".join(done.stdout.split())
