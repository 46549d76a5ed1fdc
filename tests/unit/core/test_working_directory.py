"""`python -m tunesmith` runs nothing of the folder in which it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.core.working_directory import drop_working_directory, is_module_run


@pytest.mark.parametrize(
    ("argv", "program", "is_run"),
    [
        (["-m"], ["python", "-m", "tunesmith", "doctor"], True),
        (["-m"], ["python", "-X", "dev", "-m", "tunesmith.report.trackers"], True),
        (["-m"], ["python", "-m", "pytest", "tunesmith"], False),
        (["-m"], ["python", "-m", "tunesmithy"], False),
        (["script.py"], ["python", "script.py", "-m", "tunesmith"], False),
        ([], ["python"], False),
    ],
)
def test_other_programs_keep_their_path(argv: list[str], program: list[str], is_run: bool) -> None:
    assert is_module_run(argv, program) is is_run


def test_a_checkout_keeps_its_folder(tmp_path: Path) -> None:
    here = str(tmp_path)
    assert drop_working_directory([here, "", "/lib"], here, here) == [here, "", "/lib"]
    assert drop_working_directory([here, "", "/lib"], here, "/lib") == ["/lib"]


def test_a_file_named_as_a_library_does_not_run(tmp_path: Path) -> None:
    for name in ("yaml", "pydantic", "json", "wandb", "torch"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\n")
    command = [sys.executable, "-m", "tunesmith", "schema"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
