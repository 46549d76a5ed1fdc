"""A process that lets children die at every call that changes a file, and sees what can be made of
the rest.

    LD_PRELOAD=faultyfiles.so python dying.py save|watched|full|times|times-bf16 FOLDER MODE...
    -> one JSON object on stdout

`save`: the children write the third checkpoint of a tiny training. `watched`: one does a whole tiny
run, whose folder is copied at each call: a process that is killed there leaves just these files.
`full`: each does a whole tiny run on a disk that fills up. `times`: the same, killed at random
times. Every state of the folder is gone on with in a fresh child; equal states are gone on with
once. Forked, because importing torch takes seconds; one thread, because threads do not survive a
fork."""

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

MODES = ("off", "die", "tear", "full", "watch")  # as in faultyfiles.c
OFF, DIE, TEAR, FULL, WATCH = range(len(MODES))
SHIM = ctypes.CDLL(None)
WATCHER = ctypes.CFUNCTYPE(None, ctypes.c_long, ctypes.c_int, ctypes.c_int)
STEPS = 5
OTHER_FILES = (
    *(".lock", ".lock.pid", "plan.json", "fingerprint.json", "data.json", "recipe.yaml"),
    "resolved.yaml",
)
TIMED_FILES = (
    *OTHER_FILES,
    "README.md",
    "manifest.json",
    "record.json",
    "trainer_state.json",
    "tunesmith.json",
)
DEATH_EVERY = 25  # of the calls of a watched run, whose state is compared with that of a death


def child(work: Callable[[], str]) -> tuple[int, str]:
    """Exit status of a forked process, and what `work` returned in it or what the error was."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        code, answer = 1, ""
        renew_thread_pool()
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


def renew_thread_pool() -> None:
    """Replace torch's pool, whose threads a fork has lost, before several threads do it at once and
    one finds none ("Invalid thread pool!"), as when transformers converts weights to bf16."""
    torch.set_num_threads(1)


def armed(folder: Path, call: int, mode: int) -> None:
    SHIM.faulty_arm(os.fsencode(folder.resolve()), ctypes.c_long(call), mode)


def final_name(path: Path) -> str:
    """Return the name that a temporary file (.tmp-NAME-PID-RANDOM) will have."""
    match = re.fullmatch(r"\.tmp-(.+)-\d+-[0-9a-f]+", path.name)
    return match[1] if match else path.name


def tidied(folder: Path, *, has_times: bool = True) -> str:
    """What opening the folder makes of it, as a digest: the folder's own name does not count, nor
    do the times of events, and without `has_times` no other, so that two runs can be compared."""
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
        elif path.is_file() and final_name(path) not in (OTHER_FILES if has_times else TIMED_FILES):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            parts.append((name.partition(".tmp-")[0], digest))
        else:
            parts.append(name.partition(".tmp-")[0])
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Call:
    """A call that changes a file: its number, and what a fault can do to it."""

    number: int
    needs_room: bool
    can_tear: bool

    def fails_in(self, mode: int) -> bool:
        """Whether this call differs from others: a call that writes nothing is not torn, and a
        full disk lets one that needs no room pass."""
        return {DIE: True, TEAR: self.can_tear, FULL: self.needs_room}[mode]


def watch_calls(
    folder: Path,
    work: Callable[[], object],
    see: Callable[[int, bool], object] = lambda _number, _is_torn: None,
) -> list[Call]:
    """Do the work in a child, and `see` each call below the folder before it is done, and each
    write once more half done; return the calls."""

    def watch() -> str:
        seen: dict[int, tuple[bool, bool]] = {}

        @WATCHER
        def note(number: int, needs_room: int, is_torn: int) -> None:
            seen[number] = (bool(needs_room), bool(is_torn))
            see(number, bool(is_torn))

        SHIM.faulty_watch(note)
        armed(folder, 0, WATCH)
        work()
        armed(folder, 0, OFF)
        return json.dumps([(number, *kind) for number, kind in seen.items()])

    status, answer = child(watch)
    assert status == 0, answer
    return [Call(*values) for values in json.loads(answer)]


def die_at(folder: Path, number: int, mode: int, die: Callable[[Path], str]) -> tuple[int, str]:
    return child(lambda: (armed(folder, number, mode), die(folder))[1])


def go_on_once(folder: Path, go_on: Callable[[Path], str], outcomes: dict[str, str]) -> str:
    """Go on from the folder, unless an equal one is among the outcomes; return its digest."""
    tidy, digest = child(lambda: tidied(folder))
    assert tidy == 0, digest
    if digest not in outcomes:
        outcomes[digest] = child(lambda: go_on(folder))[1]
    shutil.rmtree(folder, ignore_errors=True)
    return digest


def try_calls(
    first: Path,
    calls: Sequence[Call],
    mode: int,
    die: Callable[[Path], str],
    go_on: Callable[[Path], str],
) -> dict[str, object]:
    """`die` in a copy of `first` at each call that differs in this mode, and at the one after the
    last; what `go_on` makes of each state that this leaves."""
    outcomes: dict[str, str] = {}
    endings: Counter[str] = Counter()
    tried = [call.number for call in calls if call.fails_in(mode)]
    for number in (*tried, len(calls) + 1):
        folder = first.with_name(f"{first.name}-{number}")
        shutil.copytree(first, folder) if first.exists() else None
        status, messages = die_at(folder, number, mode, die)
        endings[f"{status} {re.sub('[0-9.]+', 'N', messages.partition(': ')[2])}".strip()] += 1
        go_on_once(folder, go_on, outcomes)
    return {
        "calls": len(tried),
        "outcomes": Counter(outcomes.values()),
        "endings": endings,
    }


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

    seen = folder / "seen"
    shutil.copytree(first, seen)
    calls = watch_calls(seen, lambda: save_third(seen))
    actual = try_calls(first, calls, mode, save_third, go_on_training)
    return {"straight": child(lambda: weights_after(new_training()))[1], **actual}


# ---------------------------------------------------------------- a whole run


def write_files(folder: Path) -> dict[str, str]:
    """Held-out rows whose answers are a letter: of a run with longer ones, a third of the time goes
    into generating those of a model that never ends them."""
    files = tiny_runs.write_eval_files(folder)
    for role, first in (("eval_data", 100), ("test_data", 200)):
        rows = [tiny_runs.make_chat_row(f"say {n}", "a") for n in range(first, first + 3)]
        tiny_runs.write_rows(Path(files[role]), rows)
    return files


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


def watched(folder: Path, _mode: int) -> dict[str, object]:
    """What becomes of the state at each call of one run, also with half of a write done; some are
    compared with those that a death leaves."""
    folder.mkdir()
    model, files = tiny_runs.save_model_folder(folder / "model"), write_files(folder)
    straight = child(lambda: whole_run(model, folder / "straight", files))[1]
    place, kept = folder / "run", folder / "kept"

    def keep(number: int, is_torn: bool) -> None:
        state = kept / f"{number}-{is_torn}"
        state.mkdir(parents=True)
        shutil.copytree(place, state / "run") if place.exists() else None

    calls = watch_calls(place, lambda: whole_run(model, place, files), keep)
    shutil.rmtree(place)
    outcomes: dict[str, str] = {}
    deaths: Counter[str] = Counter()
    for call, is_torn in [*((each, False) for each in calls), *((each, True) for each in calls)]:
        if is_torn and not call.can_tear:
            continue
        state = kept / f"{call.number}-{is_torn}"
        assert state.is_dir(), f"call {call.number} was not seen"
        (state / "run").rename(place) if (state / "run").exists() else None
        if call.number % DEATH_EVERY == 0:
            seen = child(lambda: tidied(place, has_times=False))
            go_on_once(place, lambda place: resume_or_begin(model, place, files), outcomes)
            mode = TEAR if is_torn else DIE
            status, _ = die_at(
                place, call.number, mode, lambda place: whole_run(model, place, files)
            )
            is_same = child(lambda: tidied(place, has_times=False)) == seen
            deaths[f"{status} {'same' if is_same else 'another'} state"] += 1
        go_on_once(place, lambda place: resume_or_begin(model, place, files), outcomes)
    return {
        "straight": straight,
        "calls": len(calls),
        "torn": sum(call.can_tear for call in calls),
        "outcomes": Counter(outcomes.values()),
        "deaths": deaths,
    }


def full(folder: Path, mode: int) -> dict[str, object]:
    folder.mkdir()
    model, files = tiny_runs.save_model_folder(folder / "model"), write_files(folder)
    straight = child(lambda: whole_run(model, folder / "straight", files))[1]
    seen = folder / "seen"
    calls = watch_calls(seen, lambda: whole_run(model, seen, files))
    actual = try_calls(
        folder / "run",
        calls,
        mode,
        lambda place: whole_run(model, place, files),
        lambda place: resume_or_begin(model, place, files),
    )
    return {"straight": straight, **actual}


# ---------------------------------------------------------------- at random times


def times(folder: Path, _mode: int, num_runs: int = 20, dtype: str = "fp32") -> dict[str, object]:
    folder.mkdir()
    model, files = tiny_runs.save_model_folder(folder / "model"), write_files(folder)
    files |= {"dtype": dtype}
    began = time.perf_counter()
    straight = child(lambda: whole_run(model, folder / "straight", files))[1]
    early = 0.7 * (time.perf_counter() - began)
    chance = random.Random(0)
    kills = 0
    outcomes: Counter[str] = Counter()
    for number in range(num_runs):
        place = folder / f"run-{number}"
        for work in (whole_run, resume_or_begin):
            after = chance.uniform(0, early)
            was_killed = killed(
                lambda work=work, place=place: work(model, place, files), after=after
            )
            kills += was_killed
            if work is whole_run and not was_killed:  # the machine is less busy by now
                early = 0.7 * after
        outcomes[child(lambda place=place: resume_or_begin(model, place, files))[1]] += 1
    return {"straight": straight, "kills": kills, "outcomes": outcomes}


def killed(work: Callable[[], str], *, after: float) -> bool:
    """Whether the process was still at work when it was killed."""
    if (pid := os.fork()) == 0:
        renew_thread_pool()
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
        "watched": watched,
        "full": full,
        "times": times,
        "times-bf16": partial(times, num_runs=30, dtype="bf16"),
    }
    work, (where, *modes) = scenarios[sys.argv[1]], sys.argv[2:]
    sys.stdout.write(
        json.dumps({mode: work(Path(where) / mode, MODES.index(mode)) for mode in modes}) + "\n"
    )
