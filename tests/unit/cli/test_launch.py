from collections.abc import Callable

import pytest

from tunesmith.core.hardware import count_cores

TuneSmith = Callable[..., tuple[int, str, str]]


def test_more_processes_than_cores_are_refused(tunesmith: TuneSmith) -> None:
    code, _, errors = tunesmith("train", "--model", "tiny", "--gpus", "99")
    assert code == 2
    assert "99 processes" in errors
    assert f"--gpus {count_cores()}" in errors


def test_gpus_are_refused_under_torchrun(
    tunesmith: TuneSmith, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = tunesmith("resume", "runs/run-1", "--gpus", "2")
    assert code == 2
    assert "leave --gpus out under torchrun" in errors


def test_a_missing_address_is_refused(
    tunesmith: TuneSmith, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, errors = tunesmith("train", "recipe.yaml")
    assert code == 2
    assert "MASTER_ADDR is not set" in errors
