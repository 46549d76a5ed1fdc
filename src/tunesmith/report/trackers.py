"""Export the events of a run to TensorBoard or Weights & Biases.

    with RunTracker(run, "tensorboard") as tracker: tracker.send(event)   while it trains
    export_run(run, "wandb")                                              afterwards

A thread talks to the tracker, so a step never waits for it, and whatever goes wrong there ends up
in `problem` and not in the run. Events that the folder already holds, of a resumed run, are sent
first. Scalars of steps and scores are exported, checks and answers as text; several stages share
one axis of steps. Weights & Biases stays offline unless WANDB_MODE says otherwise. A new tracker is
a class and a line in TRACKERS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, Self, cast

from tunesmith.core.atomic import refuse_link
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.events import CheckResult, Event, GenerationSample, Score, StageStart, TrainStep
from tunesmith.core.run_dir import (
    STAGES_DIR,
    is_run,
    is_staged,
    read_events,
    read_run_plan,
    require_run,
)
from tunesmith.core.types import Json
from tunesmith.plan.stages import read_staged_plan

FLUSH_SECONDS = 60.0  # how long the end of a run waits for what is still to be sent


class Tracker(Protocol):
    def __init__(self, run: Path, config: Json) -> None: ...
    def log_scalars(self, step: int, values: dict[str, float]) -> None: ...
    def log_text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, which replace those of an earlier export."""

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
    """A run of the project `tunesmith`, in RUN/wandb; `wandb sync` uploads it later.

    The step is a value like others, since W&B refuses to go back, which a rollback does.
    """

    def __init__(self, run: Path, config: Json) -> None:
        import wandb

        self.html = wandb.Html
        self.run = wandb.init(
            project="tunesmith",
            name=run.absolute().name,
            dir=str(run),
            config=config,
            mode=cast("Any", os.environ.get("WANDB_MODE", "offline")),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def log_text(self, step: int, name: str, text: str) -> None:
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self.run.log({"step": step, name: self.html(escaped)})

    def close(self) -> None:
        self.run.finish()


# name -> class, package
TRACKERS: dict[str, tuple[type[Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WandB, "wandb"),
}


class RunTracker:
    """Send events from a thread. After the context, `problem` is what went wrong, or empty.

    Raises InputError for a tracker that does not exist or is not installed, or whose folder is a
    link.
    """

    def __init__(self, run: Path, tracker_name: str) -> None:
        if tracker_name not in TRACKERS:
            raise InputError(
                f"unknown tracker {tracker_name!r:.80}",
                where="--track",
                fix=f"use one of {', '.join(TRACKERS)}",
            )
        refuse_link(run / tracker_name)
        self.run = run
        self.tracker_class, package = TRACKERS[tracker_name]
        if find_spec(package) is None:
            raise InputError(
                f"{tracker_name} needs {package}, which is not installed",
                where="--track",
                fix=f"pip install '.[{tracker_name}]' in tunesmith's folder, or leave --track out "
                "and export the finished run with `tunesmith report RUN --track`",
            )
        self.problem = ""
        # read before the run goes on, so that no event is sent twice
        self._history = read_history(run) if is_run(run) else []
        self._queue: SimpleQueue[Event | None] = SimpleQueue()  # None: no more events
        self._thread = Thread(
            target=self._export_events, name=f"{tracker_name} export", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def send(self, event: Event) -> None:
        self._queue.put(event)

    def __exit__(self, *error: object) -> None:
        self._queue.put(None)
        if self._thread.ident is None:
            return
        self._thread.join(FLUSH_SECONDS)
        if self._thread.is_alive():
            self.problem = f"it was still sending after {FLUSH_SECONDS:.0f} s"

    def _export_events(self) -> None:
        try:
            tracker: Tracker | None = None
            for event, steps_before in self._iter_events():
                if tracker is None:
                    tracker = self.tracker_class(self.run, _read_config(self.run))
                log_event(event, steps_before + event.step, tracker)
            if tracker is not None:
                tracker.close()
        except Exception as error:  # noqa: BLE001 - the run must not end with its tracker
            self.problem = " ".join(f"{type(error).__name__}: {error}".split())

    def _iter_events(self) -> Iterator[tuple[Event, int]]:
        """Yield the events of the folder, then those that are sent, with the steps before them."""
        yield from self._history
        steps_before = 0
        while (event := self._queue.get()) is not None:
            if isinstance(event, StageStart):
                steps_before = _count_steps_before(self.run)[event.step - 1]
            yield event, steps_before


def export_run(run: Path, tracker_name: str) -> None:
    """Send all events of a run folder. Raises InputError for no run, MachineError on failure."""
    require_run(run)
    with RunTracker(run, tracker_name) as tracker:
        pass
    if tracker.problem:
        raise MachineError(f"{tracker_name}: {tracker.problem}", where=str(run))


def log_event(event: Event, step: int, tracker: Tracker) -> None:
    match event:
        case TrainStep():
            names = ("loss", "learning_rate", "grad_norm", "peak_bytes")
            scalars = {f"train/{name}": getattr(event, name) for name in names}
            scalars["train/tokens_per_second"] = event.tokens / max(event.seconds, 1e-9)
            tracker.log_scalars(step, scalars)
        case Score():
            name = f"{event.task}/{event.metric}".replace(" ", "_")
            scalars = {name: event.value, f"{name}/low": event.low, f"{name}/high": event.high}
            tracker.log_scalars(step, scalars)
        case CheckResult():
            name = f"checks/{event.kind}".replace(" ", "_")
            tracker.log_text(step, name, f"{event.level}: {event.evidence}")
        case GenerationSample():
            tracker.log_text(step, f"answers/{event.id}", event.answer)
        case _:
            pass


def read_history(run: Path) -> list[tuple[Event, int]]:
    """Return the events that a folder holds, each with the steps of the stages before its own."""
    folders = {run: 0}
    if is_staged(run):
        plans = read_staged_plan(run).plans
        for plan, steps_before in zip(plans, _count_steps_before(run), strict=True):
            folders[run / STAGES_DIR / Path(plan.config.output_dir).name] = steps_before
    history: list[tuple[Event, int]] = []
    for folder, steps_before in folders.items():
        for event in read_events(folder):
            history.append((event, steps_before))
    return history


def _count_steps_before(run: Path) -> list[int]:
    """Return, for each stage, the steps of all earlier stages."""
    totals = [0]
    for plan in read_staged_plan(run).plans[:-1]:
        totals.append(totals[-1] + plan.steps)
    return totals


def _read_config(run: Path) -> Json:
    """Return the value of every setting; of several stages, the last one's."""
    plan = read_staged_plan(run).plans[-1] if is_staged(run) else read_run_plan(run)
    return plan.values
