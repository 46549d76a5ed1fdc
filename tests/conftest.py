"""Fixtures of all tests."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tiny_runs import save_model_folder
from tunesmith.cli import app
from tunesmith.plan import memory

Outcome = tuple[int, str, str]  # exit code, stdout, stderr
SHARED_MEMORY = "/dev/shm"
FULL_ANSWER_TOKENS = memory.MIN_COMPLETE_TOKENS
QUICK_ANSWER_TOKENS = 64
NEEDED_BYTES = 4 * 2**30  # several times what the quick tests leave

# An example may be slow because the machine is busy. Examples are drawn the same way every time, so
# that a test fails for a change and not by chance; `--hypothesis-profile default` draws others.
hypothesis.settings.register_profile("the same examples", deadline=None, derandomize=True)
hypothesis.settings.load_profile("the same examples")


def pytest_configure(config: pytest.Config) -> None:
    """Put the files of the quick tests, and of several ranks, in memory, since a tiny run waits 54
    times for the disk, and cut the answers of tiny models, which never end: 256 tokens show no more
    than 64."""
    if "not slow" not in config.option.markexpr and config.option.markexpr != "multi":
        return
    memory.MIN_COMPLETE_TOKENS = QUICK_ANSWER_TOKENS
    if os.path.isdir(SHARED_MEMORY):
        has_room = shutil.disk_usage(SHARED_MEMORY).free > NEEDED_BYTES
        can_execute = not os.statvfs(SHARED_MEMORY).f_flag & os.ST_NOEXEC  # compiled kernels
        if has_room and can_execute:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", SHARED_MEMORY)


CUDA_MARKS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA_MARKS)])
def device(request: pytest.FixtureRequest) -> str:
    """Return "cpu", and with `-m gpu` "cuda": the same test on a GPU."""
    return request.param


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model; tests must not change it."""
    return save_model_folder(tmp_path_factory.mktemp("tiny-model") / "tiny")


@pytest.fixture
def full_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give answers the room that they have outside of quick tests."""
    monkeypatch.setattr(memory, "MIN_COMPLETE_TOKENS", FULL_ANSWER_TOKENS)


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
