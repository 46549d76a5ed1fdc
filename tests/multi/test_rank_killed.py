"""A rank that is killed ends the others, and the run goes on to the same weights."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rank_lab import run_processes
from rank_runs import resume_runs, train_run
from tiny_runs import build_sum_rows, write_rows
from tunesmith.core.run_dir import read_all_events
from tunesmith.core.types import Json

pytestmark = pytest.mark.multi

STEPS = 12
KILLS = 5  # of each rank
LIMIT_SECONDS = 90.0


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", build_sum_rows(1, 24))
    return {"data": str(rows), "batch_size": 4, "num_train_epochs": 2, "save_steps": 3}


@pytest.fixture(scope="module")
def straight(
    tiny_folder: Path, changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    """Return the weights of a run on two ranks that nobody kills."""
    folder = tmp_path_factory.mktemp("straight")
    run_processes(train_run, 2, str(tiny_folder), str(folder), changes, {})
    return read_weights(folder / "run")


def read_weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_rank_was_killed_goes_on_to_the_same_weights(
    tiny_folder: Path, changes: dict[str, Any], straight: bytes, tmp_path: Path, rank: int
) -> None:
    steps = random.Random(rank).sample(range(1, STEPS), KILLS)
    folders = [tmp_path / str(step) for step in steps]
    for step, folder in zip(steps, folders, strict=True):
        folder.mkdir()
        stop = {"kill": step, "rank": rank}
        outcomes = run_processes(train_run, 2, str(tiny_folder), str(folder), changes, stop)
        assert outcomes[rank] is None, "it was killed"
        code, message = outcomes[1 - rank]
        assert code == 3, message
        assert "another rank has ended" in message
    main, other = run_processes(resume_runs, 2, [str(folder) for folder in folders])
    assert main == [(0, f"step {STEPS}")] * KILLS
    assert other == [(0, "followed")]
    for step, folder in zip(steps, folders, strict=True):
        assert read_weights(folder / "run") == straight, f"killed after step {step}"


def test_torchrun_starts_a_killed_run_again_in_its_folder(
    tiny_folder: Path, changes: dict[str, Any], straight: bytes, tmp_path: Path
) -> None:
    recipe: Json = {
        "model": str(tiny_folder),
        **changes,
        "learning_rate": 0.01,
        "warmup_ratio": 0,
        "lora_r": 2,
        "dtype": "fp32",
        "attention": "sdpa",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=1", "-m", "tunesmith", "train", "recipe.yaml"]
    log = tmp_path / "log"
    with log.open("w") as output:
        torchrun = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
        try:
            kill_rank(torchrun, 1, tmp_path / "runs" / "run-1" / "checkpoints" / "step-3")
            assert torchrun.wait(LIMIT_SECONDS) == 0, log.read_text()
        finally:
            torchrun.kill()
    run = tmp_path / "runs" / "run-1"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run-1"]
    assert {logged.attempt for logged in read_all_events(run)} == {1, 2}
    assert read_weights(run) == straight


def kill_rank(torchrun: subprocess.Popen[bytes], rank: int, file: Path) -> None:
    """Kill the process of a rank as soon as a file is there."""
    end = time.monotonic() + LIMIT_SECONDS
    while not file.exists():
        assert time.monotonic() < end
        assert torchrun.poll() is None
        time.sleep(0.002)
    for process in psutil.Process(torchrun.pid).children():
        if process.environ().get("RANK") == str(rank):
            process.kill()
