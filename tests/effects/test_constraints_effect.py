"""A ban on AI self-mentions, trained with the rows of the recipe, lowers their rate in SmolLM2."""

from pathlib import Path

import pytest

from effect_seeds import SEEDS, Record
from tiny_runs import train
from tunesmith.api import read_record
from tunesmith.recipe.schema import Recipe

ROWS = Path(__file__).parents[2] / "recipes" / "data" / "constraints"


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_ban_holds_on_held_out_prompts(seed: int, tmp_path: Path, record: Record) -> None:
    files = {
        "data": str(ROWS / "train.jsonl"),
        "test_data": str(ROWS / "test.jsonl"),
        "output_dir": str(tmp_path / "run"),
    }
    size = {"batch_size": 8, "max_steps": 18, "learning_rate": 5e-4, "seed": seed}
    never = [{"check": check, "mode": "ban"} for check in ("ai-self-mention", "apology")]
    train(Recipe.model_validate({"model": "smollm2-135m-instruct", "never": never} | files | size))
    comparisons = {
        (comparison.task, comparison.metric): comparison
        for comparison in read_record(tmp_path / "run").comparisons
    }
    violations = comparisons["eliciting prompts", "breaks ai-self-mention"]
    logp = comparisons["eliciting prompts", "bad_logp"]
    record(violations)
    record(logp)
    assert violations.after.n == 20
    assert violations.high < 0
    assert logp.high < 0
