"""Instruction tuning of SmolLM2 on the shipped tasks: held-out rows of all tasks together get
better, with an interval. What the held-out task does is measured beside it, and claimed by
nobody."""

from pathlib import Path

import pytest

from seeds import SEEDS
from tiny_runs import train
from tunesmith.api import read_recipe, read_record

RECIPE = Path(__file__).parents[2] / "recipes" / "instruction.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_over_tasks_gets_better(seed: int, tmp_path: Path) -> None:
    tests = [
        source.model_copy(update={"max_examples": 12}) for source in read_recipe(RECIPE).test_data
    ]
    few = {
        "test_data": [source.model_dump(mode="json") for source in tests],
        "max_steps": 24,
        "seed": seed,
    }
    train(read_recipe(RECIPE, **few, output_dir=str(tmp_path / "run")))
    found = {(one.task, one.metric): one for one in read_record(tmp_path / "run").comparisons}
    mean, new = found["test: mean of tasks", "loss"], found["test: exceptions (held out)", "loss"]
    assert (mean.after.n, new.after.n) == (36, 12)
    assert mean.high < 0, (
        f"the interval of the change, [{mean.low:.3f}, {mean.high:.3f}], leaves out zero"
    )
    right = found["test: mean of tasks", "exact_match"]
    assert right.low > 0, (
        f"the interval of the change, [{right.low:.3f}, {right.high:.3f}], leaves out zero"
    )
