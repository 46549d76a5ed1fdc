"""`verify` against `tunesmith serve`: a run is recognized there, its half and its base are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from live_server import train_color_run
from serve_lab import LiveServer, make_settings, serving
from tunesmith.evaluate.live import LiveVerification, verify_run
from tunesmith.evaluate.live_client import LiveClient

NUM_ITEMS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_color_run(tmp_path_factory.mktemp("live-serve"))


def verify(run: Path, live: LiveServer, model: str) -> LiveVerification:
    return verify_run(run, LiveClient(f"{live.url}/v1"), model, num_items=NUM_ITEMS)


def failed(result: LiveVerification) -> set[str]:
    return {check.name for check in result.checks if check.status == "failed"}


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
