"""Fault injection: kill a process, or fill its disk, at any call that changes a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.hardware import find_compiler

HERE = Path(__file__).parent
Dying = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def faulty_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = find_compiler()
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("faulty") / "faultyfiles.so"
    source = HERE / "faultyfiles.c"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True
    )
    return library


@pytest.fixture(scope="session")
def dying(faulty_files: Path) -> Dying:
    """Return a function that runs dying.py with faults and returns its outcomes."""

    def run_with_faults(scenario: str, folder: Path, *modes: str) -> dict[str, Any]:
        environment = {**os.environ, "LD_PRELOAD": str(faulty_files), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "dying.py"), scenario, str(folder), *modes]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return json.loads(done.stdout)

    return run_with_faults
