"""Fixtures of all tests."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tiny_runs import save_model_folder
from tunesmith.cli import app

Outcome = tuple[int, str, str]  # exit code, stdout, stderr

# An example may be slow because the machine is busy.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model; tests must not change it."""
    return save_model_folder(tmp_path_factory.mktemp("tiny-model") / "tiny")


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Restore SIGINT, which shells ignore in background processes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """Turn subnormal numbers on again after a run that flushed them to zero."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def tunesmith(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Return a function that runs the command line in this process."""
    # main() replaces the hook; monkeypatch restores it.
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run_cli(*args: str) -> Outcome:
        with pytest.raises(SystemExit) as exit_info:
            app.main(args)
        return (exit_info.value.code or 0, *capsys.readouterr())  # pyright: ignore[reportReturnType]

    return run_cli
