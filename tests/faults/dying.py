"""A process that lets children die at every call that changes a file, and sees what can be made of
the rest.

    LD_PRELOAD=faultyfiles.so python dying.py save|run|times|times-bf16 FOLDER MODE...
    -> one JSON object on stdout

`save`: the children write the third checkpoint of a tiny training. `run`: each does a whole tiny
run. `times`: the same, killed at random times. Every state of the folder that a death leaves is
gone on with in a fresh child; equal states are gone on with once. Forked, because importing torch
takes seconds; one thread, because threads do not survive a fork."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch

import tiny_models
import tiny_runs
from plan_configs import make_config
from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.run_dir import RunFolder
from tunesmith.core.types import RUN_FORMAT
from tunesmith.train import run
from tunesmith.train.loop import TrainingLoop

MODES = ("off", "die", "tear", "full")  # as in faultyfiles.c
SHIM = ctypes.CDLL(None)
STEPS = 5


def child(work: Callable[[], str]) -> tuple[int, str]:
    """Exit status of a forked process, and what `work` returned in it or what the error was."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        code, answer = 1, ""
        try:
            answer, code = work(), 0
        except TunesmithError as error:
            answer = f"{type(error).__name__}: {error}"
        finally:
            if sys.exc_info()[0]:
                traceback.print_exc()
            SHIM.faulty_arm(b"", 0, 0)
            os.write(writing, answer.encode())
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), answer


def armed(folder: Path, call: int, mode: int) -> None:
    SHIM.faulty_arm(os.fsencode(folder.resolve()), ctypes.c_long(call), mode)


def tidied(folder: Path) -> str:
    """What opening the folder makes of it, as a digest: times and the folder's own name do not
    count."""
    if (folder / "plan.json").exists():
        RunFolder.open(folder).close()
    parts: list[object] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        assert not name.startswith((".tmp", ".trash")) or not (folder / "plan.json").exists(), (
            f"{name} is left"
        )
        if path.name == "events.jsonl":
            events = [json.loads(line) for line in path.read_bytes().splitlines()]
            parts.append([(event["type"], event["step"], event["attempt"]) for event in events])
        elif path.is_file() and path.name not in (
            ".lock",
            ".lock.pid",
            "plan.json",
            "fingerprint.json",
            "data.json",
            "recipe.yaml",
        ):
            parts.append((name, hashlib.sha256(path.read_bytes()).hexdigest()))
        else:
            parts.append(name.partition(".tmp-")[0])
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def try_all(
    first: Path, mode: int, die: Callable[[Path], str], go_on: Callable[[Path], str]
) -> dict[str, object]:
    """`die` in a copy of `first` at call 1, 2, ...; what `go_on` makes of each state that this
    leaves."""
    outcomes: dict[str, str] = {}
    endings: Counter[str] = Counter()
    for call in range(1, 10**6):
        folder = first.with_name(f"{first.name}-{call}")
        shutil.copytree(first, folder) if first.exists() else None
        status, messages = child(
            lambda folder=folder, call=call: (armed(folder, call, mode), die(folder))[1]
        )
        endings[f"{status} {re.sub('[0-9.]+', 'N', messages.partition(': ')[2])}".strip()] += 1
        tidy, digest = child(lambda folder=folder: tidied(folder))
        assert tidy == 0, digest
        if digest not in outcomes:
            outcomes[digest] = child(lambda folder=folder: go_on(folder))[1]
        shutil.rmtree(folder, ignore_errors=True)
        if status == 0:
            return {
                "calls": call - 1,
                "outcomes": Counter(outcomes.values()),
                "endings": endings,
                "last": outcomes[digest],
            }
    raise AssertionError("unreachable")


# ---------------------------------------------------------------- the third checkpoint of a run


def new_training() -> TrainingLoop:
    settings = make_config(pack_length=60, learning_rate=2e-3, weight_decay=0.01, seed=5)
    return TrainingLoop(
        tiny_models.make_tiny_model(lora_dropout=0.1),
        lambda step: [tiny_models.make_tiny_document(9, step)],
        settings,
        steps=STEPS,
    )


def weights_after(training: TrainingLoop) -> str:
    list(training)
    return hashlib.sha256(
        b"".join(p.detach().numpy().tobytes() for p in training.parameters.values())
    ).hexdigest()


def go_on_training(folder: Path) -> str:
    with RunFolder.open(folder) as opened:
        actual, skipped = opened.find_latest_checkpoint()
        assert actual is not None
        assert not skipped
        training = new_training()
        training.restore(actual)
        return f"{actual.name} {weights_after(training)}"


def save(folder: Path, mode: int) -> dict[str, object]:
    first, training = folder / "run", new_training()
    with RunFolder.create(first) as opened:
        opened.write_json("plan.json", {"format": RUN_FORMAT})
        for step in (1, 2):
            next(training)
            with opened.checkpoint(step, metadata={}, needed_bytes=1000) as target:
                training.save(target)
    next(training)

    def save_third(place: Path) -> str:
        with (
            RunFolder.open(place) as opened,
            opened.checkpoint(3, metadata={}, needed_bytes=1000) as target,
        ):
            training.save(target)
        return ""

    actual = try_all(first, mode, save_third, go_on_training)
    return {"straight": child(lambda: weights_after(new_training()))[1], **actual}


# ---------------------------------------------------------------- a whole run


def whole_run(model: Path, folder: Path, files: dict[str, str]) -> str:
    wish = tiny_runs.make_tiny_recipe(
        model, folder.parent, **files, output_dir=str(folder), save_steps=1, lora_dropout=0.1
    )
    list(run.train(tiny_runs.plan_recipe(wish)))
    return finished(folder)


def finished(folder: Path) -> str:
    assert (folder / "record.json").exists()
    return hashlib.sha256(
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def resume_or_begin(model: Path, folder: Path, files: dict[str, str]) -> str:
    """What a user does: resume what is a run, begin again what is none yet."""
    if (folder / "record.json").exists():
        return finished(folder)
    try:
        list(run.resume(folder))
    except InputError:
        if (folder / "plan.json").exists():
            raise
        return whole_run(model, folder, files)
    return finished(folder)


def full(folder: Path, mode: int) -> dict[str, object]:
    folder.mkdir()
    model, files = tiny_runs.save_model_folder(folder / "model"), tiny_runs.write_eval_files(folder)
    straight = child(lambda: whole_run(model, folder / "straight", files))[1]
    actual = try_all(
        folder / "run",
        mode,
        lambda place: whole_run(model, place, files),
        lambda place: resume_or_begin(model, place, files),
    )
    return {"straight": straight, **actual}


# ---------------------------------------------------------------- at random times


def times(folder: Path, _mode: int, num_runs: int = 20, dtype: str = "fp32") -> dict[str, object]:
    folder.mkdir()
    model, files = tiny_runs.save_model_folder(folder / "model"), tiny_runs.write_eval_files(folder)
    files |= {"dtype": dtype}
    began = time.perf_counter()
    straight = child(lambda: whole_run(model, folder / "straight", files))[1]
    early, chance, kills = (
        0.7 * (time.perf_counter() - began),
        random.Random(0),
        0,
    )  # on a machine less busy by then too
    outcomes: Counter[str] = Counter()
    for number in range(num_runs):
        place = folder / f"run-{number}"
        for work in (whole_run, resume_or_begin):
            kills += killed(
                lambda work=work, place=place: work(model, place, files),
                after=chance.uniform(0, early),
            )
        outcomes[child(lambda place=place: resume_or_begin(model, place, files))[1]] += 1
    return {"straight": straight, "kills": kills, "outcomes": outcomes}


def killed(work: Callable[[], str], *, after: float) -> bool:
    """Whether the process was still at work when it was killed."""
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    scenarios = {
        "save": save,
        "run": full,
        "times": times,
        "times-bf16": partial(times, num_runs=30, dtype="bf16"),
    }
    work, (where, *modes) = scenarios[sys.argv[1]], sys.argv[2:]
    sys.stdout.write(
        json.dumps({mode: work(Path(where) / mode, MODES.index(mode)) for mode in modes}) + "\n"
    )
