"""Score a step of advice: whether its forecast held, and whether it made a graded metric worse.

    score_step(run, step_run) -> StepScore

In: the folder of a run, and that of the run which followed one of its next steps. The forecast is
that which the first run stored at its end. Left out: running the step (run.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tunesmith
from tunesmith.core.evidence import NextStep
from tunesmith.core.run_dir import read_run_record
from tunesmith.core.types import Comparison
from tunesmith.evaluate.statistics import judge_comparison


@dataclass(frozen=True)
class StepScore:
    """`worse`: graded metrics of test rows that are significantly worse, by the items of this seed
    alone: what counts against an advice need not be shown for other seeds."""

    held: bool | None  # None without an interval, or without that metric in both runs
    difference: float | None
    steps: tuple[int | None, int]  # as forecast, and as they were
    seconds: tuple[float | None, float]
    worse: tuple[str, ...]


def score_step(run: Path, step_run: Path) -> StepScore:
    """Raises LookupError if the run has not advised the other one."""
    record = read_run_record(run)
    done = read_run_record(step_run)
    step = find_step(record.verdict.next_steps if record.verdict else (), step_run)
    comparisons = tunesmith.compare(run, step_run).comparisons
    held, difference = judge_forecast(step, comparisons)
    return StepScore(
        held,
        difference,
        (step.steps, done.steps),
        (step.seconds, done.total_seconds),
        list_worse(comparisons),
    )


def find_step(steps: Sequence[NextStep], step_run: Path) -> NextStep:
    """Return the step that trains into a folder of this name."""
    for step in steps:
        words = shlex.split(step.command)
        folder = words[words.index("--output-dir") + 1] if "--output-dir" in words else ""
        if Path(folder).name == step_run.name:
            return step
    raise LookupError(f"{step_run} follows none of the steps")


def judge_forecast(
    step: NextStep, comparisons: Sequence[Comparison]
) -> tuple[bool | None, float | None]:
    """Return whether the interval covers the measured difference, and the difference."""
    for each in comparisons:
        if f"{each.task} {each.metric}" == step.metric and step.low is not None:
            assert step.high is not None
            return step.low <= each.difference <= step.high, each.difference
    return None, None


def list_worse(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    of_items = [replace(each, seed_low=None, seed_high=None) for each in comparisons]
    return tuple(
        f"{each.task} {each.metric}"
        for each in of_items
        if each.higher_is_better and judge_comparison(each) == "worse"
    )
