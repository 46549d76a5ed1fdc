"""A run that collapses in its first steps, before the detectors of the training loss speak."""

from pathlib import Path

import pytest

from tiny_runs import build_sum_rows, make_tiny_recipe, plan_recipe, write_rows
from tunesmith.core.errors import GateError
from tunesmith.core.run_dir import read_rollbacks
from tunesmith.train import run


def test_it_goes_back_to_the_start_at_the_first_evaluation(
    trained_model: Path, tmp_path: Path
) -> None:
    """Without probes; checkpoints of the collapsed steps are no good ones."""
    recipe = make_tiny_recipe(
        trained_model,
        tmp_path,
        data=str(write_rows(tmp_path / "rows.jsonl", build_sum_rows(1, 24))),
        eval_data=str(write_rows(tmp_path / "eval.jsonl", build_sum_rows(100, 12))),
        eval_steps=4,
        save_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
    )
    plan = plan_recipe(recipe)
    assert plan.config.probe_steps == 0
    with pytest.raises(GateError, match=r"answers unlearned: .* already rolled back 3 times"):
        list(run.train(plan))
    rollbacks = read_rollbacks(tmp_path / "run")
    assert [(one.kind, one.step, one.to) for one in rollbacks] == [("answers unlearned", 4, 0)] * 3
