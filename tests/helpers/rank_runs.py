"""Whole runs of tiny recipes on several ranks, for processes of `rank_processes`."""

import importlib.metadata
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tunesmith
from rank_processes import run_processes
from tiny_runs import make_tiny_recipe
from tunesmith.advise.measured.run_arm import ArmResult
from tunesmith.api import read_recipe
from tunesmith.cli.launch import lockstep, main_rank
from tunesmith.core import ranks as core_ranks
from tunesmith.core.errors import TunesmithError
from tunesmith.core.events import CheckpointSaved, Event, TrainStep
from tunesmith.core.json_io import dump_json
from tunesmith.core.ranks import Ranks, open_ranks
from tunesmith.core.run_dir import read_all_events
from tunesmith.evaluate import shared_items
from tunesmith.session import inputs, planner
from tunesmith.train import follow as follow_module
from tunesmith.train import run
from tunesmith.train.follow import follow

OTHER_TORCH = "2.99.0"
Outcome = tuple[int, str]  # exit code, and the message of the error or the last step


def train_run(model: str, folder: str, changes: dict[str, Any], stop: dict[str, int]) -> Outcome:
    """Train a tiny recipe as one rank.

    `stop` may be {"signal": step} of rank 1, {"signal_in_answers": step} of rank 0 in the
    evaluation after the step, or {"kill": step, "rank": rank}."""
    torch.set_num_threads(1)
    if "kill" in stop:  # the step of the other rank notices it, not the pulse, which may be earlier
        core_ranks.PULSE_SECONDS = core_ranks.PATIENCE.total_seconds()
    recipe = make_tiny_recipe(Path(model), Path(folder), **changes)

    def start(ranks: Ranks) -> Any:
        run_inputs = inputs.load_inputs(recipe)
        return run.train(planner.make_plan(run_inputs), run_inputs, ranks=ranks)

    return _act(start, Path(folder), stop)


def train_on_ranks(
    world: int, model: Path | str, folder: Path, changes: dict[str, Any], **stop: int
) -> list[Any]:
    """Train a tiny recipe on `world` ranks; return the Outcome of each, None if it was killed. One
    rank is this process."""
    folder.mkdir(exist_ok=True)
    args = (str(model), str(folder), changes, stop)
    return [train_run(*args)] if world == 1 else run_processes(train_run, world, *args)


@dataclass(frozen=True)
class Job:
    """A run of a tiny recipe. With `has_copy`, its folder is copied at its first checkpoint: what a
    run that is killed then leaves."""

    model: str
    folder: Path
    changes: dict[str, Any]
    has_copy: bool = False

    @property
    def copy(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}, at its first checkpoint")


def train_jobs(jobs: Sequence[Job]) -> list[str]:
    """Train jobs one after another, in processes that start once; return the last step of each.
    Ranks other than 0 have no disk and another date."""
    torch.set_num_threads(1)
    with open_ranks() as ranks:
        if not ranks.is_main:
            lose_disk_and_clock()
            return [f"followed: {follow(ranks)}"]
        steps: list[str] = []
        for job in jobs:
            recipe = make_tiny_recipe(Path(job.model), job.folder, **job.changes)
            run_inputs = inputs.load_inputs(recipe)
            events = run.train(planner.make_plan(run_inputs), run_inputs, ranks=ranks)
            steps.append(_consume(_copy_first_checkpoint(events, job), job.folder, {}))
    return steps


def lose_disk_and_clock() -> None:
    """Let this process write no byte to a file, and live three days ago."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    now = time.time
    time.time = lambda: now() - 3 * 86_400
    with tempfile.TemporaryFile(buffering=0) as file, pytest.raises(OSError, match="too large"):
        file.write(b"x")


def train_jobs_on_ranks(jobs: Mapping[str, Job]) -> None:
    """Train jobs on two ranks."""
    steps, other = run_processes(train_jobs, 2, list(jobs.values()))
    assert isinstance(steps, list), steps
    assert other == ["followed: 0"]
    assert "step 0" not in steps


def _copy_first_checkpoint(events: Iterator[Event], job: Job) -> Iterator[Event]:
    for event in events:
        if job.has_copy and isinstance(event, CheckpointSaved) and not job.copy.exists():
            shutil.copytree(job.folder, job.copy)
        yield event


def train_alone(job: Job, folder: Path) -> Path:
    """Train a job in this process, in another folder; return that."""
    train_jobs([replace(job, folder=folder, has_copy=False)])
    return folder


def resume_runs(folders: Sequence[str]) -> list[Outcome]:
    """Resume runs one after another, in processes that start once."""
    torch.set_num_threads(1)
    with open_ranks() as ranks:
        if not ranks.is_main:
            return [(follow(ranks), "followed")]
        outcomes: list[Outcome] = []
        for folder in folders:
            events = run.resume(Path(folder) / "run", ranks=ranks)
            outcomes.append((0, _consume(events, Path(folder), {})))
    return outcomes


def read_weights(folder: Path) -> np.ndarray:
    """Return the numbers of the adapter, or of all weights, that were trained in a folder."""
    file = folder / "run" / "adapter" / "adapter_model.safetensors"
    if not file.exists():
        file = folder / "run" / "model" / "model.safetensors"
    tensors = load_file(file)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def resume_copies(firsts: Sequence[Path], parent: Path) -> dict[Path, dict[int, Path]]:
    """Resume copies of runs of two ranks with one, two and three ranks, whose processes start once;
    return their folders by run and number of ranks."""
    copies = {first: {n: parent / str(n) / first.name for n in (1, 2, 3)} for first in firsts}
    for first, folders in copies.items():
        for folder in folders.values():
            shutil.copytree(first, folder)
    for world in (1, 2, 3):
        paths = [str(folders[world]) for folders in copies.values()]
        alone = world == 1
        main, *others = [resume_runs(paths)] if alone else run_processes(resume_runs, world, paths)
        assert isinstance(main, list), main
        assert [code for code, _ in main] == [0] * len(paths)
        assert others == [[(0, "followed")]] * (world - 1)
    return copies


def check_resumed(folders: Mapping[int, Path], expected: np.ndarray) -> None:
    """Check that runs which two ranks saved after step 2 went on from there, by number of ranks, to
    the weights that are expected, those of two ranks bit by bit."""
    for world, folder in folders.items():
        weights = read_weights(folder)
        np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-5)
        assert world != 2 or weights.tobytes() == expected.tobytes()
        steps: dict[int, list[int]] = {}
        for logged in read_all_events(folder / "run"):
            if isinstance(logged.event, TrainStep):
                steps.setdefault(logged.attempt, []).append(logged.event.step)
        assert list(steps) == [1, 2]
        assert steps[2][0] == 3, "it goes on"


def _act(start: Any, folder: Path, stop: dict[str, int]) -> Outcome:
    try:
        with open_ranks() as ranks:
            (folder / f"pid-{ranks.rank}").write_text(str(os.getpid()))
            if not ranks.is_main:
                return follow(ranks), "followed"
            return 0, _consume(start(ranks), folder, stop)
    except TunesmithError as error:
        return error.exit_code, str(error)


def _consume(events: Any, folder: Path, stop: dict[str, int]) -> str:
    step = 0
    for event in events:
        step = event.step
        if isinstance(event, TrainStep) and event.step == stop.get("signal"):
            os.kill(int((folder / "pid-1").read_text()), signal.SIGTERM)
        if isinstance(event, TrainStep) and event.step == stop.get("signal_in_answers"):
            _catch_a_signal_in_answers()
        if isinstance(event, TrainStep) and event.step == stop.get("kill"):
            os.kill(int((folder / f"pid-{stop['rank']}").read_text()), signal.SIGKILL)
    return f"step {step}"


def _catch_a_signal_in_answers() -> None:
    """Let this rank catch a signal while the others compute their share of the answers."""
    generate_share = shared_items.generate_share

    def catch_signal(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return generate_share(*args, **kwargs)

    shared_items.generate_share = catch_signal


def train_near_other_rows(
    model: str, folder: str, changes: dict[str, Any], other_cwd: str
) -> Outcome:
    """Train where rank 1 finds other files under the same relative paths, and has another
    tunesmith and another torch."""
    if os.environ.get("RANK") == "1":
        os.chdir(other_cwd)
        follow_module.hash_source = lambda: "of another checkout"
        read_version = importlib.metadata.version
        importlib.metadata.version = lambda name: (
            OTHER_TORCH if name == "torch" else read_version(name)
        )
    else:
        os.chdir(folder)
    return train_run(model, folder, changes, {})


def start_with_recipes(recipes: Sequence[dict[str, Any]]) -> Outcome:
    """Start each rank with a recipe of its own; return the exit code, and what rank 0 says."""
    recipe = recipes[int(os.environ["RANK"])]
    try:
        with main_rank(lambda: read_recipe(recipe)):
            return 0, "started"
    except SystemExit as end:
        return int(end.code or 0), ""
    except TunesmithError as error:
        return error.exit_code, str(error)


def evaluate_run(run: str, data: str, cwds: Sequence[str]) -> tuple[int, str]:
    """Evaluate a run again in the folder of this rank; return the exit code, and what rank 0 has
    measured or says."""
    torch.set_num_threads(1)
    os.chdir(cwds[int(os.environ["RANK"])])
    try:
        with lockstep() as ranks:
            report = tunesmith.evaluate(run, data=data, ranks=ranks)
    except SystemExit as end:
        return int(end.code or 0), ""
    except TunesmithError as error:
        return error.exit_code, str(error)
    return 0, dump_json([report.scores, report.comparisons, report.errors]).decode()


def advise_on_rank(
    model: str, folder: str, changes: dict[str, Any]
) -> tuple[list[int], dict[str, str]]:
    """Measure the model as it is for an advice; return how many requests this process answered at
    once, and the answers of rank 0 by item."""
    torch.set_num_threads(1)
    generate = shared_items.generate
    batches: list[int] = []

    def generate_and_count(model: Any, requests: Sequence[Any], **settings: Any) -> Any:
        batches.append(len(requests))
        return generate(model, requests, **settings)

    shared_items.generate = generate_and_count
    recipe = make_tiny_recipe(Path(model), Path(folder), **changes)
    store = Path(folder) / f"of {os.environ.get('WORLD_SIZE', '1')}"
    try:
        with main_rank() as ranks:
            results = tunesmith.advise_measured(recipe, minutes=600, folder=store, ranks=ranks)
            _, zero_shot = next(results), next(results)
            assert isinstance(zero_shot, ArmResult)
            return batches, zero_shot.answers
    except SystemExit:
        return batches, {}
