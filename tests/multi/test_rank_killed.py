"""A rank that is killed ends the others, and the run goes on to the same weights."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rank_processes import run_processes
from rank_runs import resume_runs, train_run
from tiny_runs import build_sum_rows, write_rows
from tunesmith.core.run_dir import read_all_events
from tunesmith.core.types import Json

pytestmark = pytest.mark.multi

STEPS = 12
KILLS = 5  # of each rank
LIMIT_SECONDS = 600.0  # of a hang
# tunesmith, whose rank 1 kills itself at the first start: a test that watches it may come too late
KILLED_PROGRAM = """
import os, pathlib, signal, threading, time
from tunesmith.cli.app import main

def kill_after_a_checkpoint():
    while not pathlib.Path("runs/run-1/checkpoints/step-3").exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    threading.Thread(target=kill_after_a_checkpoint, daemon=True).start()
main()
"""


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
    (tmp_path / "program.py").write_text(KILLED_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=1", "program.py", "train", "recipe.yaml"]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout.decode()
    run = tmp_path / "runs" / "run-1"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run-1"]
    assert {logged.attempt for logged in read_all_events(run)} == {1, 2}
    assert read_weights(run) == straight
