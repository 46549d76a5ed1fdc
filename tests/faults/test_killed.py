"""kill -9, and a full disk, at every call that changes a file; the run ends with the bytes of an
uninterrupted one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Dying = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def saves(dying: Dying, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dying("save", tmp_path_factory.mktemp("saves"), "die", "tear", "full")


@pytest.mark.parametrize("mode", ["die", "tear"])
def test_fault_22_a_save_killed_at_any_call_resumes_to_the_same_bytes(
    mode: str, saves: dict[str, Any]
) -> None:
    """`tear`: half of each write is done first."""
    found = saves[mode]
    assert found["endings"] == {"9": found["calls"], "0": 1}
    assert found["calls"] > 20
    assert set(found["outcomes"]) == {f"step-{step} {found['straight']}" for step in (2, 3)}


def test_fault_25_a_disk_that_fills_up_at_any_call_of_a_save_leaves_the_one_before(
    saves: dict[str, Any],
) -> None:
    """Also under the writer of safetensors, whose errors are its own."""
    found = saves["full"]
    *_, last = found["endings"]
    assert last == "0"
    refused = [ending for ending in found["endings"] if ending != "0"]
    assert all("no room on the disk" in ending and "free some room" in ending for ending in refused)
    counted = [
        ending for ending in refused if re.search(r"checkpoints/step-N: .*N bytes\) needed", ending)
    ]
    assert sum(found["endings"][ending] for ending in counted) >= 8
    assert set(found["outcomes"]) == {f"step-{step} {found['straight']}" for step in (2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["die", "tear"])
def test_fault_22_a_whole_run_killed_at_any_call(mode: str, dying: Dying, tmp_path: Path) -> None:
    """From the first file to the record: plan, events, checkpoints, adapter. What is no run yet is
    begun again."""
    found = dying("run", tmp_path, mode)[mode]
    assert found["endings"] == {"9": found["calls"], "0": 1}
    assert found["calls"] > 120
    assert set(found["outcomes"]) == {found["straight"]}


@pytest.mark.slow
def test_fault_25_a_whole_run_on_a_disk_that_fills_up(dying: Dying, tmp_path: Path) -> None:
    found = dying("run", tmp_path, "full")["full"]
    assert set(found["outcomes"]) == {found["straight"]}
    assert all("no room on the disk" in ending for ending in found["endings"] if ending != "0")


@pytest.mark.slow
def test_fault_22_twenty_runs_killed_at_random_times(dying: Dying, tmp_path: Path) -> None:
    """Each is killed twice: as a new run, and while it is resumed."""
    found = dying("times", tmp_path, "off")["off"]
    assert found["kills"] >= 20
    assert found["outcomes"] == {found["straight"]: 20}
