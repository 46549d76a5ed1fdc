"""`verify` against `tunesmith serve`: a run is recognized there, its half and its base are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tiny_runs import save_model_folder
from tiny_server import LiveServer, make_settings, serving
from transformers_server import COLORS, train_on_rows
from tunesmith.core.types import Json
from tunesmith.evaluate.verify.server_client import LiveClient
from tunesmith.evaluate.verify.verification import LiveVerification, verify_run

NUM_ITEMS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of rows with names, which the template does not write, and other fields."""
    folder = tmp_path_factory.mktemp("live-serve")
    save_model_folder(folder / "model")
    rows: list[Json] = []
    for n in range(52):
        question = {"role": "user", "content": f"{COLORS[n % 4]} {n}", "name": "Ann", "time": n}
        answer = {"role": "assistant", "content": f"{COLORS[(n + 1) % 4]} it is"}
        rows.append({"messages": [question, answer]})
    return train_on_rows(folder, rows)


def verify(run: Path, live: LiveServer, model: str) -> LiveVerification:
    return verify_run(run, LiveClient(f"{live.url}/v1"), model, num_items=NUM_ITEMS)


def failed(result: LiveVerification) -> set[str]:
    return {check.name for check in result.checks if check.status == "failed"}


@pytest.mark.promise
def test_the_server_is_the_run_at_its_scale_alone(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(run, half)
    with serving(make_settings({"whole": run, "half": f"{half}@0.4"})) as live:
        whole = verify(run, live, "whole")
        weak = verify(run, live, "half")
        base = verify(run, live, "base")
    assert whole.is_run, whole.checks
    assert {check.status for check in whole.checks} == {"ok"}
    assert failed(weak) >= {"probability"}
    ids = next(check for check in whole.checks if check.name == "prompt")
    assert ids.message == f"the same number of tokens in all; the same ids in {NUM_ITEMS}"
    assert not weak.is_run, weak.checks
    assert not base.is_run
    assert "applied" in base.problem
