"""Sweeps of a tiny model: the recipe, and running it to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_runs import build_sum_rows, make_tiny_recipe, write_rows
from tunesmith.advise.sweep.records import SweepRecord
from tunesmith.advise.sweep.run_sweep import run_sweep
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs

SWEEP: dict[str, Any] = {"learning_rate": [0.0001, 0.01], "seeds": 2}


def make_sweep_recipe(model: Path, folder: Path, sweep: Any = None, **changed: Any) -> Recipe:
    """Return a recipe of 4 steps with 6 held-out rows of each role."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "eval_data": str(write_rows(folder / "eval.jsonl", build_sum_rows(100, 6))),
        "test_data": str(write_rows(folder / "test.jsonl", build_sum_rows(200, 6))),
        "data": str(write_rows(folder / "train.jsonl", build_sum_rows(1, 8))),
        "eval_steps": 2,
    }
    values = {"guard": "off", "metrics": ["bits_per_byte"], "sweep": sweep or SWEEP}
    return make_tiny_recipe(model, folder, **(files | values | changed))


def sweep(recipe: Recipe, folder: Path, **options: Any) -> SweepRecord:
    *_, record = run_sweep(inputs.load_inputs(recipe), folder, **options)
    assert isinstance(record, SweepRecord)
    return record
