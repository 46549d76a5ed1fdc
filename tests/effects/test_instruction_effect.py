"""Instruction tuning of SmolLM2 on the shipped tasks improves held-out rows of all tasks.

The held-out task is measured as well, without a claim about it.
"""

from pathlib import Path

import pytest

from effect_seeds import SEEDS, Record
from tiny_runs import train
from tunesmith.api import read_record
from tunesmith.recipe.load import read_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "instruction.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_over_tasks_gets_better(seed: int, tmp_path: Path, record: Record) -> None:
    tests = [
        source.model_copy(update={"max_examples": 12}) for source in read_recipe(RECIPE).test_data
    ]
    few = {
        "test_data": [source.model_dump(mode="json") for source in tests],
        "max_steps": 24,
        "seed": seed,
    }
    train(read_recipe(RECIPE, **few, output_dir=str(tmp_path / "run")))
    comparisons = {
        (comparison.task, comparison.metric): comparison
        for comparison in read_record(tmp_path / "run").comparisons
    }
    mean = comparisons["test: mean of tasks", "loss"]
    new = comparisons["test: exceptions (held out)", "loss"]
    right = comparisons["test: mean of tasks", "exact_match"]
    for comparison in (mean, new, right):
        record(comparison)
    assert (mean.after.n, new.after.n) == (36, 12)
    assert mean.high < 0
    assert right.low > 0
