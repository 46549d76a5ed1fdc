"""Rehearsal reduces forgetting of general text in fine-tuning at a high learning rate."""

import json
from pathlib import Path

import pytest

import tunesmith
from effect_runs import SEEDS, Record
from tiny_runs import train, write_rows
from tunesmith.api import read_record
from tunesmith.core.types import Comparison, Json
from tunesmith.recipe.schema import Recipe

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
    for name, more in (
        ("without", {}),
        ("with", {"rehearsal": {"data": str(others), "ratio": 0.3}}),
    ):
        train(Recipe.model_validate(same | size | more | {"output_dir": str(tmp_path / name)}))
        (changes[name],) = read_record(tmp_path / name).comparisons
    without, rehearsed = changes["without"], changes["with"]
    record(without)
    record(rehearsed)
    assert (without.task, without.after.n) == ("general text", 20)
    assert rehearsed.high < without.low, (
        f"the intervals meet: up to {rehearsed.high:.3f}, from {without.low:.3f}"
    )
