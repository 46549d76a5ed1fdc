"""Each hostile input ends within two seconds and 200 MB, or is refused; nothing is called a bug."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hostile_inputs
from shared_folder import lock_shared_folder
from tunesmith.core.types import Json

pytestmark = pytest.mark.promise


MAX_SECONDS = 2.0
MAX_REFUSAL_SECONDS = 15.0  # of a render that its clock ends
MAX_MEGABYTES = 200
MAX_CHARS = 6_000  # of a message
BUSY = 3  # how much slower a shared core may be
TEST_NAME = "test_a_hostile_input_is_cheap_or_refused"
QUICK_SHARE = 12  # `make test` runs every twelfth case


@pytest.fixture(scope="session")
def costs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Json]:
    """Return the cost of each selected case, measured by one process for all workers."""
    selected = [item.name for item in request.session.items]
    names = [name for name in hostile_inputs.CASES if f"{TEST_NAME}[{name}]" in selected]
    helpers = str(Path(hostile_inputs.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": helpers, "OMP_NUM_THREADS": "1"}
    with lock_shared_folder(tmp_path_factory, "hostile") as (folder, is_new):
        output = folder / "costs.jsonl"
        if is_new:
            command = [sys.executable, hostile_inputs.__file__, str(folder), *names]
            done = subprocess.run(
                command, env=environment, cwd=folder, stdout=subprocess.PIPE, check=True
            )
            output.write_bytes(done.stdout)
    return {result["name"]: result for result in map(json.loads, output.read_text().splitlines())}


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
