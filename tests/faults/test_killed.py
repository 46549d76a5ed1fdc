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


@pytest.mark.promise
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["die", "tear"])
def test_fault_22_a_save_killed_at_any_call_resumes_to_the_same_bytes(
    mode: str, saves: dict[str, Any]
) -> None:
    """`tear`: half of each write is done first; the deaths at other calls are those of `die`."""
    actual = saves[mode]
    assert actual["endings"] == {"9": actual["calls"], "0": 1}
    assert actual["calls"] > {"die": 20, "tear": 3}[mode]
    assert set(actual["outcomes"]) == {f"step-{step} {actual['straight']}" for step in (2, 3)}


@pytest.mark.promise
@pytest.mark.slow
def test_fault_25_a_disk_that_fills_up_at_any_call_of_a_save_leaves_the_one_before(
    saves: dict[str, Any],
) -> None:
    """Also under the writer of safetensors, whose errors are its own."""
    actual = saves["full"]
    *_, last = actual["endings"]
    assert last == "0"
    refused = [ending for ending in actual["endings"] if ending != "0"]
    assert all(
        "no space left on the disk" in ending and "free some disk space" in ending
        for ending in refused
    )
    counted = [
        ending for ending in refused if re.search(r"checkpoints/step-N: .*N bytes\) needed", ending)
    ]
    assert sum(actual["endings"][ending] for ending in counted) >= 8
    assert set(actual["outcomes"]) == {f"step-{step} {actual['straight']}" for step in (2, 3)}


@pytest.mark.slow
def test_fault_22_a_whole_run_killed_at_any_call(dying: Dying, tmp_path: Path) -> None:
    """From the first file to the record: plan, events, checkpoints, adapter; also with half of each
    write done. What is no run yet is begun again. One run is copied at each call instead of
    killed; that a death leaves the same is seen at some of them."""
    actual = dying("watched", tmp_path, "off")["off"]
    assert actual["calls"] > 120
    assert actual["torn"] > 60
    assert set(actual["outcomes"]) == {actual["straight"]}
    assert actual["deaths"].keys() == {"9 same state"}
    assert actual["deaths"]["9 same state"] > 8


@pytest.mark.slow
def test_fault_25_a_whole_run_on_a_disk_that_fills_up(dying: Dying, tmp_path: Path) -> None:
    """At each call that needs room; a full disk is seen by no other."""
    actual = dying("full", tmp_path, "full")["full"]
    assert actual["calls"] > 60
    assert set(actual["outcomes"]) == {actual["straight"]}
    assert all(
        "no space left on the disk" in ending for ending in actual["endings"] if ending != "0"
    )


@pytest.mark.promise
@pytest.mark.slow
def test_fault_22_twenty_runs_killed_at_random_times(dying: Dying, tmp_path: Path) -> None:
    """Each is killed twice: as a new run, and while it is resumed."""
    actual = dying("times", tmp_path, "off")["off"]
    assert actual["kills"] >= 20
    assert actual["outcomes"] == {actual["straight"]: 20}


@pytest.mark.slow
def test_fault_22_thirty_runs_in_bf16_killed_at_random_times(dying: Dying, tmp_path: Path) -> None:
    """The kernels round as they did before the kill; the bytes are not those of fp32."""
    actual = dying("times-bf16", tmp_path, "off")["off"]
    assert actual["kills"] >= 30
    assert actual["outcomes"] == {actual["straight"]: 30}
