"""Verdicts on runs with chosen measurements and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_runs
from tunesmith.core.evidence import (
    ErrorAnalysis,
    RunVerdict,
    Shortcut,
)
from tunesmith.core.types import Comparison
from tunesmith.evaluate.run_verdict import judge_run

CONSTANT = Shortcut("flag", "false", 80, 80, 50, 1e-6, 9, 90, ("t:1",))


def make_errors(right: int, n: int = 80, before: int = 0, **changes: Any) -> ErrorAnalysis:
    analysis = ErrorAnalysis(
        metric="exact_match",
        is_binary=True,
        n=n,
        right=right,
        right_before=before,
        fixed=max(0, right - before),
        broken=max(0, before - right),
        mean=right / n,
        low=0.0,
        high=1.0,
        mean_before=before / n,
    )
    return replace(analysis, **changes)


def make_general(lost: float, half: float = 0.005, n: int = 80) -> Comparison:
    comparison = fake_runs.make_comparison(
        "bits_per_byte", 1.0, 1.0 + lost, half, task="general text", higher_is_better=False
    )
    return replace(comparison, after=replace(comparison.after, n=n))


def make_change(difference: float, half: float = 0.1, **changes: Any) -> Comparison:
    return fake_runs.make_comparison("exact_match", 0.3, 0.3 + difference, half, **changes)


def judge(errors: ErrorAnalysis | None, *comparisons: Comparison, **changes: Any) -> RunVerdict:
    record = replace(
        fake_runs.make_record(), comparisons=comparisons, errors=errors, scales=(), **changes
    )
    return judge_run(record, Path("runs/a b"))
