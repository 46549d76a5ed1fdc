"""Events as text: plain lines in a log, nothing that data could use to steer the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from tunesmith.cli.output import flatten_text
from tunesmith.cli.progress import (
    Progress,
    format_duration,
    format_event,
    measuring,
)
from tunesmith.core import progress_log
from tunesmith.core.events import (
    CheckpointSaved,
    CheckResult,
    GenerationSample,
    Score,
    TrainingEnd,
    TrainStep,
)
from tunesmith.core.progress_log import log_progress


def step(number: int) -> TrainStep:
    return TrainStep(number, 1.23456, 210, 40, 0.5, 1e-3, 1.0, 1_940_000_000)


def shown(steps: int, count: int, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with Progress(steps, console) as progress:
        for number in range(1, count + 1):
            progress.show_event(step(number))
        progress.show_event(TrainingEnd(count, "finished", 190.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_plain_line_says_everything_about_a_step() -> None:
    lines = shown(120, 10).splitlines()
    assert lines[-2] == "step 9/120  loss 1.2346  lr 1.00e-03  420 tok/s  1.9 GB  eta 0:56"
    assert lines[-1] == "finished after 10 steps, 3:10 of training"


def test_a_log_stays_short_and_has_the_first_and_last_step() -> None:
    lines = shown(10_000, 10_000).splitlines()
    assert len(lines) == 52
    assert lines[0].startswith("step 1/10000")
    assert lines[-2].startswith("step 10000/10000")
    assert len(shown(3, 3).splitlines()) == 4


def test_the_live_line_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    live = shown(10, 10, terminal=True)
    assert "\x1b[" in live
    assert "step 10/10" in live
    monkeypatch.setenv("CI", "true")
    assert "step 10/10  loss" in shown(10, 10, terminal=True)
    assert "━" not in shown(10, 10, terminal=True)


def test_the_live_line_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a finished run shows "answers: 1 of 30" for ever."""
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(progress_log, "LOG_INTERVAL_SECONDS", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Progress(3, console):
        list(log_progress("abc", 30, "answers"))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith("\x1b[1A\x1b[2K")  # up, and clear the line


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_breaks_lines_at_words(*, is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, color_system=None, width=40)
    evidence = "relative difference at most 0.00%, top-1 equal at 256/256 positions"
    Progress(3, console).show_event(CheckResult("logits match", "ok", evidence))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert (len(lines) > 1) == is_terminal
    assert " ".join(lines) == f"ok  logits match: {evidence}"


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            Score("test", "field_f1", 0.42, 0.35, 0.49, 200, 0),
            "before  test field_f1 0.420 [0.350, 0.490]  n=200",
        ),
        (
            Score("eval", "loss", 1.5, 1.4, 1.6, 50, 20),
            "step 20  eval loss 1.500 [1.400, 1.600]  n=50",
        ),
        (CheckResult("leak", "ok", "[max] 0.0"), "ok  leak: [max] 0.0"),
        (CheckpointSaved(20, "checkpoints/step-20"), "saved checkpoints/step-20"),
        (TrainingEnd(9, "stopped", 3700.0), "stopped after 9 steps, 1:01:40 of training"),
        (GenerationSample(1, "a:1", "Hi", "[red]x[/]\n\x1b[2Jy"), "sample a:1: [red]x[/] [2Jy"),
    ],
)
def test_each_event_is_one_line(
    event: Score | GenerationSample | CheckResult | CheckpointSaved | TrainingEnd, text: str
) -> None:
    assert Text.from_markup(format_event(event)).plain == text


def test_long_texts_are_cut() -> None:
    assert len(flatten_text("x" * 1000)) == 100


def test_durations() -> None:
    assert [format_duration(seconds) for seconds in (0, 59.6, 187, 3787)] == [
        "0:00",
        "1:00",
        "3:07",
        "1:03:07",
    ]


def render_progress(*, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(progress_log, "LOG_INTERVAL_SECONDS", 0.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with measuring(console):
        assert list(log_progress("abc", 5, "answers", num_done=2)) == ["a", "b", "c"]
    list(log_progress("de", 2, "answers"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_long_measurement_logs_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert render_progress(terminal=False, monkeypatch=monkeypatch).splitlines() == [
        "answers: 3 of 5",
        "answers: 4 of 5",
        "answers: 5 of 5",
    ]
    assert "answers: 5 of 5" in render_progress(terminal=True, monkeypatch=monkeypatch)


def test_a_measurement_begins_with_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = io.StringIO()
    with measuring(Console(file=file, force_terminal=True, width=80), start="comparing"):
        pass
    assert "comparing" in file.getvalue()
    assert "loading the model" not in file.getvalue()


def test_short_measurements_are_not_logged() -> None:
    console = Console(file=io.StringIO(), width=120)
    with Progress(3, console):
        list(log_progress("abc", 3, "answers"))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
    assert progress_log.logger.handlers == [], "the listener is removed"
