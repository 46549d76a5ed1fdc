"""Progress of a run: one live line on a terminal, plain lines elsewhere.

In: the events of a run, and log messages of long measurements (core/progress_log.py). Out: text on
stderr. Without a terminal, or with CI or NO_COLOR set, at most about fifty step lines are printed
per run, so that logs stay readable. Left out: measuring or deciding anything."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from tunesmith.cli.output import TerminalConsole, escape_markup, format_single_line
from tunesmith.core.events import (
    EXPECTED_TASK,
    PROBE_TASK,
    CheckpointSaved,
    CheckResult,
    Event,
    GenerationSample,
    Score,
    StageStart,
    TrainingEnd,
    TrainStep,
)
from tunesmith.core.formatting import escape_controls, format_bytes, format_count
from tunesmith.core.progress_log import logger

SPEED_WINDOW = 20  # steps of the average
MAX_PLAIN_LINES = 50
LEVEL_STYLES = {"ok": "green", "warn": "yellow", "rollback": "red", "stop": "bold red"}


class Progress:
    """Show the events of a run of `steps` optimizer steps.

    A context manager, so that the terminal is restored."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.steps = steps
        self.console = console or TerminalConsole(stderr=True)
        self.is_live = _is_live(self.console)
        self._recent_steps: deque[TrainStep] = deque(maxlen=SPEED_WINDOW)
        self._bar = Bar(
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,  # what is measured after the last step is not its last line
        )
        self._task = self._bar.add_task("starting", total=steps)

    def __enter__(self) -> Self:
        if self.is_live:
            self._bar.start()
        self._listener = LogListener(self._show_message)
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()
        if self.is_live:
            self._bar.stop()

    def _show_message(self, line: str) -> None:
        if self.is_live:
            self._bar.update(self._task, description=line)
        else:
            self.console.print(line, highlight=False)

    def show_event(self, event: Event) -> None:
        if isinstance(event, StageStart):
            self.steps = event.steps
            self._recent_steps.clear()
            self._bar.reset(self._task, total=event.steps, description="starting")
        if isinstance(event, TrainStep):
            self._show_step(event)
        elif not _is_probe_event(event):
            # a terminal breaks long lines at words, a log keeps them whole
            self.console.print(
                format_event(event), highlight=False, soft_wrap=not self.console.is_terminal
            )

    def _show_step(self, step: TrainStep) -> None:
        self._recent_steps.append(step)
        seconds = sum(recent_step.seconds for recent_step in self._recent_steps)
        speed = sum(recent_step.tokens for recent_step in self._recent_steps) / max(seconds, 1e-9)
        remaining_seconds = (self.steps - step.step) * seconds / len(self._recent_steps)
        line = (
            f"step {step.step}/{self.steps}  loss {step.loss:.4f}  lr {step.learning_rate:.2e}  "
            f"{speed:,.0f} tok/s  {format_bytes(step.peak_bytes)}  "
            f"eta {format_duration(remaining_seconds)}"
        )
        if self.is_live:
            self._bar.update(self._task, completed=step.step, description=line)
            return
        interval = math.ceil(self.steps / MAX_PLAIN_LINES)
        if step.step in (1, self.steps) or step.step % interval == 0:
            self.console.print(line, highlight=False, soft_wrap=True)


def _is_probe_event(event: Event) -> bool:
    """Return whether an event is a guard probe; the guard's verdict summarizes these."""
    if isinstance(event, Score):
        return event.task in (PROBE_TASK, EXPECTED_TASK)
    return isinstance(event, GenerationSample)


def _is_live(console: Console) -> bool:
    return console.is_terminal and not {"CI", "NO_COLOR"} & os.environ.keys()


class LogListener(logging.Handler):
    """Pass messages of core/progress_log.py to `callback` until closed, as escaped rich markup."""

    def __init__(self, callback: Callable[[str], None]) -> None:
        super().__init__()
        self.callback = callback
        self._previous_level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.callback(escape_markup(escape_controls(record.getMessage())))

    def close(self) -> None:
        logger.removeHandler(self)
        logger.setLevel(self._previous_level)
        super().close()


@contextmanager
def measuring(
    console: Console | None = None, *, start: str = "loading the model"
) -> Iterator[None]:
    """Show the progress of a long measurement on stderr; `start` stands there until the first."""
    console = console or TerminalConsole(stderr=True)
    if _is_live(console):
        with console.status(start) as status, closing(LogListener(status.update)):
            yield
    else:
        with closing(LogListener(lambda line: console.print(line, highlight=False))):
            yield


def format_event(
    event: Score | GenerationSample | CheckResult | CheckpointSaved | TrainingEnd | StageStart,
) -> str:
    """Format an event as one line of rich markup; text from data or models is escaped and cut."""
    match event:
        case Score():
            where = f"step {event.step}" if event.step else "before"
            value = format_interval(event.value, event.low, event.high)
            name = escape_markup(f"{event.task} {event.metric}")
            return f"{where}  {name} {value}  n={event.n}"
        case GenerationSample():
            return (
                f"[dim]sample {format_single_line(event.id)}:[/] {format_single_line(event.answer)}"
            )
        case CheckResult():
            style = LEVEL_STYLES[event.level]
            return f"[{style}]{event.level}[/]  {escape_markup(f'{event.kind}: {event.evidence}')}"
        case CheckpointSaved():
            return f"saved {escape_markup(event.path)}"
        case TrainingEnd():
            steps = format_count(event.step, "step")
            duration = format_duration(event.seconds)
            return f"{event.reason} after {steps}, {duration} of training"
        case StageStart():
            head = f"[bold]stage {event.step} of {event.num_stages}[/] {escape_markup(event.name)}"
            return f"{head}: {event.steps} steps, in {escape_markup(event.path)}"


def format_interval(value: float, low: float, high: float) -> str:
    """Format a value with its interval, 0.420 [0.350, 0.490], the bracket escaped for rich."""
    return f"{value:.3f} \\[{low:.3f}, {high:.3f}]"


def format_duration(seconds: float) -> str:
    """Format as 3:07 or 1:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
