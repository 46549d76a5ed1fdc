"""Runs of the tiny recipe with some keys changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_runs import (
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    select_steps,
    train,
    write_rows,
)
from tunesmith.core.events import Event, Score, TrainStep
from tunesmith.core.types import Plan
from tunesmith.recipe.schema import Recipe


@dataclass(frozen=True)
class Baseline:
    """The run of the tiny recipe as it is, which all cases share."""

    steps: list[TrainStep]
    adapter: bytes


class Lab:
    """Run the tiny recipe with changed keys, each time in a new folder; `last` is the latest."""

    def __init__(self, model: Path, folder: Path, baseline: Baseline | None = None) -> None:
        self.model = model
        self.folder = folder
        self.baseline = baseline or Baseline([], b"")
        self.runs = 0
        self.last: Recipe

    def run_baseline(self) -> Baseline:
        steps = self.steps()
        return Baseline(steps, read_adapter_bytes(self.last))

    def plan(self, **changed: Any) -> Plan:
        """Plan a run without training."""
        self.runs += 1
        self.last = make_tiny_recipe(self.model, self.folder / str(self.runs), **changed)
        return plan_recipe(self.last)

    def events(self, **changed: Any) -> list[Event]:
        self.runs += 1
        self.last = make_tiny_recipe(self.model, self.folder / str(self.runs), **changed)
        return train(self.last)

    def steps(self, **changed: Any) -> list[TrainStep]:
        return select_steps(self.events(**changed))

    def adapter(self, **changed: Any) -> bytes:
        self.events(**changed)
        return read_adapter_bytes(self.last)

    def scores(self, **changed: Any) -> dict[tuple[str, str], Score]:
        """Return the last score of each (task, metric)."""
        results = [event for event in self.events(**changed) if isinstance(event, Score)]
        return {(score.task, score.metric): score for score in results}

    def rows(self, values: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        return str(write_rows(self.folder / name, values))

    @property
    def output(self) -> Path:
        assert isinstance(self.last.output_dir, Path)
        return self.last.output_dir
