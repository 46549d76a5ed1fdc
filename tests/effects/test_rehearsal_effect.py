"""Rehearsal reduces forgetting of general text in fine-tuning at a high learning rate."""

import json
from pathlib import Path

import pytest

import tunesmith
from effect_seeds import SEEDS, Record
from tiny_runs import write_rows
from tunesmith.api import read_record
from tunesmith.core.run_dir import EVAL_BEFORE_FILE
from tunesmith.core.types import Comparison, Json
from tunesmith.evaluate.model_ref import load_results
from tunesmith.evaluate.results import EvalResults
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner
from tunesmith.train import run

DEMO = Path(tunesmith.__file__).parent / "recipe" / "demo"


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_less_is_forgotten(seed: int, tmp_path: Path, record: Record) -> None:
    texts: list[Json] = [
        json.loads(line) for line in (DEMO / "general.jsonl").read_text().splitlines()
    ]
    held_out = write_rows(tmp_path / "general.jsonl", texts[::4])
    others = write_rows(tmp_path / "others.jsonl", [text for n, text in enumerate(texts) if n % 4])
    same = {
        "model": "smollm2-135m-instruct",
        "data": str(DEMO / "train.jsonl"),
        "retention_data": str(held_out),
    }
    size = {"batch_size": 2, "max_steps": 8, "learning_rate": 2e-3, "warmup_ratio": 0, "seed": seed}
    changes: dict[str, Comparison] = {}
    before: EvalResults | None = None  # the same texts and model for both: measured once
    for name, more in (
        ("without", {}),
        ("with", {"rehearsal": {"data": str(others), "ratio": 0.3}}),
    ):
        recipe = Recipe.model_validate(same | size | more | {"output_dir": str(tmp_path / name)})
        run_inputs = inputs.load_inputs(recipe)
        list(run.train(planner.make_plan(run_inputs), run_inputs, before=before))
        before = load_results(tmp_path / name, EVAL_BEFORE_FILE)
        (changes[name],) = read_record(tmp_path / name).comparisons
    without, rehearsed = changes["without"], changes["with"]
    record(without)
    record(rehearsed)
    assert (without.task, without.after.n) == ("general text", 20)
    assert rehearsed.high < without.low, (
        f"the intervals meet: up to {rehearsed.high:.3f}, from {without.low:.3f}"
    )
