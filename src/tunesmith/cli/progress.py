"""A run as it goes: one live line on a terminal, plain lines elsewhere.

In: the events of a run, one by one, and what watch.py tells of a long measurement. Out: text on stderr. Plain lines
(no terminal, CI or NO_COLOR) come at most about fifty times a run, so that a log stays readable. Nothing is measured or
decided here.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from tunesmith.core.atomic import size
from tunesmith.core.events import EXPECTED, PROBES, Done, Event, Sample, Saved, Score, Stage, StepResult, Verdict
from tunesmith.core.progress_log import LOG

WINDOW = 20  # steps that the speed is averaged over
PLAIN_LINES = 50
LEVEL_STYLES = {"ok": "green", "warn": "yellow", "rollback": "red", "stop": "bold red"}


class Progress:
    """Shows the events of a run of `steps` optimizer steps. Use it as a context, so that the terminal is restored."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.steps = steps
        self.console = console or Console(stderr=True)
        self.live = self.console.is_terminal and not {"CI", "NO_COLOR"} & os.environ.keys()
        self._recent: deque[StepResult] = deque(maxlen=WINDOW)
        self._bar = Bar(BarColumn(bar_width=24), TextColumn("{task.description}"), console=self.console)
        self._task = self._bar.add_task("starting", total=steps)

    def __enter__(self) -> Self:
        if self.live:
            self._bar.start()
        self._listener = Listener(self._tell)
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()
        if self.live:
            self._bar.stop()

    def _tell(self, line: str) -> None:
        if self.live:
            self._bar.update(self._task, description=line)
        else:
            self.console.print(line, highlight=False)

    def show(self, event: Event) -> None:
        if isinstance(event, Stage):
            self.steps = event.steps
            self._recent.clear()
            self._bar.reset(self._task, total=event.steps, description="starting")
        if isinstance(event, StepResult):
            self._show_step(event)
        elif not _of_a_probe(event):
            self.console.print(line_of(event), highlight=False, soft_wrap=True)

    def _show_step(self, step: StepResult) -> None:
        self._recent.append(step)
        seconds = sum(recent.seconds for recent in self._recent)
        speed = sum(recent.tokens for recent in self._recent) / max(seconds, 1e-9)
        left = (self.steps - step.step) * seconds / len(self._recent)
        line = (
            f"step {step.step}/{self.steps}  loss {step.loss:.4f}  lr {step.learning_rate:.2e}  "
            f"{speed:,.0f} tok/s  {size(step.peak_bytes)}  eta {clock(left)}"
        )
        if self.live:
            self._bar.update(self._task, completed=step.step, description=line)
        elif step.step in (1, self.steps) or step.step % -(-self.steps // PLAIN_LINES) == 0:
            self.console.print(line, highlight=False, soft_wrap=True)


def _of_a_probe(event: Event) -> bool:
    """Many numbers and answers, which the guard sums up."""
    return isinstance(event, Sample) or (isinstance(event, Score) and event.task in (PROBES, EXPECTED))


class Listener(logging.Handler):
    """Gives what watch.py tells to `tell`, until it is closed."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell, self._level_before = tell, LOG.level
        LOG.setLevel(logging.INFO)
        LOG.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(record.getMessage())

    def close(self) -> None:
        LOG.removeHandler(self)
        LOG.setLevel(self._level_before)
        super().close()


@contextmanager
def measuring(console: Console | None = None) -> Iterator[None]:
    """While something is measured: how far it is, on stderr; nothing of what is short."""
    console = console or Console(stderr=True)
    if console.is_terminal and not {"CI", "NO_COLOR"} & os.environ.keys():
        with console.status("measuring") as status, closing(Listener(status.update)):
            yield
    else:
        with closing(Listener(lambda line: console.print(line, highlight=False))):
            yield


def line_of(event: Score | Sample | Verdict | Saved | Done | Stage) -> str:
    """One line of rich markup. Text from data or models is escaped, and cut where a line break would be."""
    match event:
        case Score():
            where = f"step {event.step}" if event.step else "before"
            return f"{where}  {event.task} {event.metric} {interval(event.value, event.low, event.high)}  n={event.n}"
        case Sample():
            return f"[dim]sample {one_line(event.id)}:[/] {one_line(event.answer)}"
        case Verdict():
            style = LEVEL_STYLES[event.level]
            return f"[{style}]{event.level}[/]  {event.kind}: {escape(event.evidence)}"
        case Saved():
            return f"saved {escape(event.path)}"
        case Done():
            return f"{event.reason} after {event.step} steps in {clock(event.seconds)}"
        case Stage():
            name = escape(event.name)
            return f"[bold]stage {event.step} of {event.of}[/] {name}: {event.steps} steps, in {escape(event.path)}"


def interval(value: float, low: float, high: float) -> str:
    """A value with its interval: 0.420 [0.350, 0.490]. The bracket is escaped for rich."""
    return f"{value:.3f} \\[{low:.3f}, {high:.3f}]"


def one_line(text: str, most: int = 100) -> str:
    """Text of unknown origin on one line: no markup, no control characters."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return escape(plain if len(plain) <= most else plain[: most - 1] + "…")


def clock(seconds: float) -> str:
    """3:07, or 1:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
