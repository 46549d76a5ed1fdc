"""Each hostile input ends within two seconds and 200 MB, or is refused; nothing is called a bug."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hostile_inputs
from tunesmith.core.types import Json

MAX_SECONDS = 2.0
MAX_REFUSAL_SECONDS = 15.0  # of a render that its clock ends
MAX_MEGABYTES = 200
MAX_CHARS = 6_000  # of a message
BUSY = 3  # how much slower a shared core may be
TEST_NAME = "test_a_hostile_input_is_cheap_or_refused"
QUICK_SHARE = 4  # without --slow, every fourth case runs


@pytest.fixture(scope="session")
def costs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Json]:
    """Return the cost of each selected case, all measured by one process."""
    selected = [item.name for item in request.session.items]
    names = [name for name in hostile_inputs.CASES if f"{TEST_NAME}[{name}]" in selected]
    folder = tmp_path_factory.mktemp("hostile")
    helpers = str(Path(hostile_inputs.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": helpers, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, hostile_inputs.__file__, str(folder), *names]
    done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, check=True)
    return {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}


def list_cases() -> list[object]:
    """Return each name; all but a share is slow."""
    return [
        pytest.param(name, id=name, marks=[pytest.mark.slow] if i % QUICK_SHARE else [])
        for i, name in enumerate(hostile_inputs.CASES)
    ]


@pytest.mark.parametrize("name", list_cases())
def test_a_hostile_input_is_cheap_or_refused(name: str, costs: dict[str, Json]) -> None:
    cost = costs[name]
    assert cost["outcome"].startswith(("ok", "2: ")), cost
    is_refused = cost["outcome"] != "ok"
    assert cost["seconds"] < BUSY * (MAX_REFUSAL_SECONDS if is_refused else MAX_SECONDS), cost
    assert cost["megabytes"] < MAX_MEGABYTES, cost
    assert cost["chars"] < MAX_CHARS, cost
