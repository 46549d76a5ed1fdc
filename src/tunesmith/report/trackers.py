"""The events of a run, sent to TensorBoard or Weights & Biases by a process of its own.

    with Tracked(run, "tensorboard") as tracked: ...    a run; afterwards tracked.problem is what went wrong
    send(run, "wandb")                                  a run that has ended

The process reads events.jsonl as it grows, so a run neither waits for a tracker nor falls with it:
it may be missing, slow, offline or broken. It ends when its standard input does, which the system
closes if the run is killed. What is sent: numbers of steps and scores, and verdicts and answers as
texts; several stages are one line of steps. Weights & Biases writes files only, unless WANDB_MODE
says otherwise. A new tracker is a class and a line in TRACKERS."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import (
    EVENTS_FILE,
    PLAN_FILE,
    STAGES_DIR,
    STAGES_FILE,
    is_staged,
    require_run,
)
from tunesmith.core.types import Json

POLL_SECONDS = 1.0  # seconds between two looks
FLUSH_SECONDS = 60.0  # seconds that the end of a run waits for what is still to be sent


class Tracker(Protocol):
    def __init__(self, run: Path, config: Json) -> None: ...
    def log_scalars(self, step: int, values: dict[str, float]) -> None: ...
    def log_text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, written anew by each process."""

    def __init__(self, run: Path, config: Json) -> None:
        from tensorboardX import SummaryWriter

        for old_file in (run / "tensorboard").glob("events.out.tfevents.*"):
            old_file.unlink()
        self.writer = SummaryWriter(str(run / "tensorboard"), flush_secs=5)
        self.log_text(0, "plan", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of the project `tunesmith`, in RUN/wandb; `wandb sync` sends it later. Steps are a
    value like others, since after a rollback they are taken again."""

    def __init__(self, run: Path, config: Json) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(
            project="tunesmith", name=run.absolute().name, dir=str(run), config=config, mode=mode
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def log_text(self, step: int, name: str, text: str) -> None:
        import wandb

        self.run.log(
            {"step": step, name: wandb.Html(text.replace("&", "&amp;").replace("<", "&lt;"))}
        )

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, tuple[type[Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WandB, "wandb"),
}


def find_missing_package(tracker_name: str) -> str:
    """What to install, or nothing. Raises InputError for what there is not."""
    if tracker_name not in TRACKERS:
        raise InputError(
            f"there is no tracker {tracker_name!r:.80}",
            where="--track",
            fix=f"use one of {', '.join(TRACKERS)}",
        )
    return (
        ""
        if find_spec(TRACKERS[tracker_name][1])
        else f"it is not installed: pip install 'tunesmith[{tracker_name}]'"
    )


# ---------------------------------------------------------------- from outside


class TrackerProcess:
    """Follows the run that will be in a folder; see above. `problem` is known once the context has
    ended."""

    def __init__(self, run: Path, tracker_name: str) -> None:
        self.problem, self._log = find_missing_package(tracker_name), tempfile.TemporaryFile()  # noqa: SIM115 - closed with the context
        self._child: subprocess.Popen[bytes] | None = None
        if not self.problem:
            command = [sys.executable, "-m", "tunesmith.report.trackers", str(run), tracker_name]
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._child is not None:
            self.problem = self._wait_for_end(self._child)
        self._log.close()

    def _wait_for_end(self, child: subprocess.Popen[bytes]) -> str:
        assert child.stdin is not None
        child.stdin.close()
        try:
            if not child.wait(FLUSH_SECONDS):
                return ""
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return f"it was still sending after {FLUSH_SECONDS:.0f} s"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return (
            " ".join([line.strip() for line in lines if line.strip()][-1:])
            or f"exit code {child.returncode}"
        )


def send_events(run: Path, tracker_name: str) -> None:
    """All events of a run folder at once. Raises InputError for what is no run folder, MachineError
    if it fails."""
    require_run(run)
    tracker_process = TrackerProcess(run, tracker_name)
    with tracker_process:
        pass
    if tracker_process.problem:
        raise MachineError(f"{tracker_name}: {tracker_process.problem}", where=str(run))


# ---------------------------------------------------------------- inside the process


@dataclass
class EventTail:
    """What is new in the events of a run, whatever it has of stages. A line that is not whole is
    left for later."""

    run: Path
    offsets: dict[Path, int] = field(default_factory=dict[Path, int])

    def read_new_events(self) -> Iterator[tuple[int, Json]]:
        """(steps of earlier stages, event)."""
        for folder, steps_before in self._list_folders():
            file = folder / EVENTS_FILE
            if not file.is_file():
                continue
            with file.open("rb") as stream:
                stream.seek(self.offsets.get(file, 0))
                chunk = stream.read()
            complete_lines = chunk[: chunk.rfind(b"\n") + 1]
            self.offsets[file] = self.offsets.get(file, 0) + len(complete_lines)
            yield from ((steps_before, json.loads(line)) for line in complete_lines.splitlines())

    def _list_folders(self) -> list[tuple[Path, int]]:
        if not is_staged(self.run):
            return [(self.run, 0)]
        folders, steps_before = [(self.run, 0)], 0
        for plan in read_json(self.run / STAGES_FILE)["plans"]:
            name = Path(plan["settings"]["output_dir"]["value"]).name
            folders.append((self.run / STAGES_DIR / name, steps_before))
            steps_before += plan["steps"]
        return folders

    def read_config(self) -> Json:
        """Every value of the plan, of several stages the last one's."""
        plan = (
            read_json(self.run / STAGES_FILE)["plans"][-1]
            if is_staged(self.run)
            else read_json(self.run / PLAN_FILE)
        )
        return {key: setting["value"] for key, setting in plan["settings"].items()}


def log_event(event: Json, step: int, tracker: Tracker) -> None:
    match event["type"]:
        case "step":
            speed = event["tokens"] / max(event["seconds"], 1e-9)
            names = ("loss", "learning_rate", "grad_norm", "peak_bytes")
            tracker.log_scalars(
                step,
                {f"train/{name}": event[name] for name in names} | {"train/tokens_a_second": speed},
            )
        case "score":
            name = f"{event['task']}/{event['metric']}".replace(" ", "_")
            tracker.log_scalars(
                step,
                {name: event["value"], f"{name}/low": event["low"], f"{name}/high": event["high"]},
            )
        case "verdict":
            tracker.log_text(
                step,
                f"verdicts/{event['kind']}".replace(" ", "_"),
                f"{event['level']}: {event['evidence']}",
            )
        case "sample":
            tracker.log_text(step, f"answers/{event['id']}", event["answer"])
        case _:
            pass


def follow_run(run: Path, tracker_name: str) -> None:
    """Until standard input ends, and then what is left."""
    reader, tracker, is_last = EventTail(run), None, False
    while True:
        if tracker is None and (is_staged(run) or (run / PLAN_FILE).is_file()):
            tracker = TRACKERS[tracker_name][0](run, reader.read_config())
        if tracker is not None:
            for steps_before, event in reader.read_new_events():
                log_event(event, steps_before + event["step"], tracker)
        if is_last:
            break
        is_last = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
    if tracker is not None:
        tracker.close()


if __name__ == "__main__":
    os.nice(10)
    follow_run(Path(sys.argv[1]), sys.argv[2])
