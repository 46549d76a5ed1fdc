"""Shared by all tests. Being here puts this folder on the path, so that tests can import `tiny` and
`tiny_run`."""

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

hypothesis.settings.register_profile(
    "no deadline", deadline=None
)  # a busy machine is no fault of an example
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as users have them; not to be changed."""
    return save_model_folder(tmp_path_factory.mktemp("tiny-model") / "tiny")


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A shell starts what runs in its background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """A run switches them off for the whole process; the next test finds them as they were."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def tunesmith(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """The program, called with words."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # main sets it: put it back

    def call(*words: str) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            app.main(words)
        return (ended.value.code or 0, *capsys.readouterr())  # pyright: ignore[reportReturnType]

    return call
