import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tunesmith import __version__
from tunesmith.core.hardware import count_cores
from tunesmith.core.ranks import run_torchrun

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


@pytest.fixture
def _unchanged_process() -> Iterator[None]:
    """Restore what torchrun leaves changed."""
    torchruns = logging.getLogger("torch.distributed.elastic")
    level = torchruns.level
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in signals}
    yield
    torchruns.setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.promise
@pytest.mark.usefixtures("_unchanged_process")
def test_torchrun_starts_each_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_torchrun(2, ["--version"]) == 0
    assert capfd.readouterr().out.count(__version__) == 2


@pytest.mark.promise
@pytest.mark.usefixtures("_unchanged_process")
@pytest.mark.parametrize("name", ["tunesmith.py", "tunesmith/__init__.py", "torch.py"])
def test_no_rank_runs_code_of_the_working_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    planted = tmp_path / name
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    assert run_torchrun(1, ["--version"]) == 0
    assert __version__ in capfd.readouterr().out
    assert not (tmp_path / "ran").exists()


@pytest.mark.promise
@pytest.mark.usefixtures("_unchanged_process")
def test_torchrun_returns_the_exit_code_of_a_process_that_failed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_torchrun(2, ["no-such-verb"]) == 2
    errors = capfd.readouterr().err
    # Once or twice: torchrun ends the other processes as soon as one has failed.
    assert "No such command 'no-such-verb'" in errors
    assert "exitcode" not in errors, "torchrun adds no line of its own"


@pytest.mark.usefixtures("_unchanged_process")
@pytest.mark.parametrize("ended", [143, -15])
def test_a_main_rank_that_torchrun_ended_has_the_code_of_the_first_failure(
    ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_options: Any) -> None:
        first = ProcessFailure(1, 7, 2, "")
        main = ProcessFailure(0, 8, ended, "")
        main.timestamp = first.timestamp + 1
        raise ChildFailedError("tunesmith", {0: main, 1: first})

    monkeypatch.setattr(torchrun, "run", fail)
    assert run_torchrun(2, ["no-such-verb"]) == 2


@pytest.mark.usefixtures("_unchanged_process")
def test_a_rank_that_was_killed_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(options: Any) -> None:
        assert options.nproc_per_node == "2"
        codes = {0: 3, 1: -signal.SIGKILL}  # rank 0 has heard that the other is gone
        failures = {rank: ProcessFailure(rank, 7, code, "") for rank, code in codes.items()}
        raise ChildFailedError("tunesmith", failures)

    monkeypatch.setattr(torchrun, "run", fail)
    assert run_torchrun(2, ["train", "recipe.yaml"]) == 3
    (message,) = caplog.messages
    assert message.startswith("rank 1 was ended by signal 9 (Killed)")
    assert "when memory runs out" in message
