"""kill -9, and a full disk, at calls that change a file while a run is exported: no final name is
ever half filled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("dying_export.py")
ALL = ("peft", "merged", "gguf-q8_0", "ollama-f16")
Dying = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def dying_export(faulty_files: Path, tmp_path: Path) -> Dying:
    """What dying_export.py found, by target."""

    def actual(mode: str, every: int, *targets: str) -> dict[str, dict[str, Any]]:
        environment = {**os.environ, "LD_PRELOAD": str(faulty_files), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), str(tmp_path), mode, str(every), *targets]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return json.loads(done.stdout)

    return actual


def check_deaths(actual: dict[str, dict[str, Any]]) -> None:
    """At first there is nothing at all, then a folder with a passing name, at last the whole
    export."""
    for target, result in actual.items():
        assert result["calls"] > 15, target
        assert set(result["endings"]) <= {"9 nothing", "9 nothing .tmp", "9 whole", "0 whole"}, (
            target
        )
        assert result["endings"]["9 nothing .tmp"] > 1, target


def check_full_disk(actual: dict[str, dict[str, Any]]) -> None:
    """Each is refused with the reason, and leaves nothing, not even a folder with a passing
    name."""
    for target, result in actual.items():
        assert set(result["endings"]) == {"1 nothing no space left on the disk", "0 whole"}, target


@pytest.mark.promise
@pytest.mark.slow
def test_fault_34_an_export_killed_here_and_there(dying_export: Dying) -> None:
    actual = dying_export("die", 5, "merged", "peft")
    assert actual.keys() == {"merged", "peft"}
    check_deaths(actual)


@pytest.mark.promise
@pytest.mark.slow
def test_fault_34_an_export_killed_at_any_call(dying_export: Dying) -> None:
    """Also with half of each write done. What stands there is looked at while one export goes
    through; the deaths above are real."""
    actual = dying_export("watch", 1, *ALL)
    assert actual.keys() == set(ALL)
    check_deaths(actual)
    for target, result in actual.items():
        assert result["torn"] >= 1, target
        assert sum(result["endings"].values()) == result["calls"] + result["torn"] + 1, target


@pytest.mark.slow
def test_fault_34_an_export_on_a_disk_that_fills_up_at_any_call(dying_export: Dying) -> None:
    actual = dying_export("full", 1, *ALL)
    assert actual.keys() == set(ALL)
    check_full_disk(actual)
