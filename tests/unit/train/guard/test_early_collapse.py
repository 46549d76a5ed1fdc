"""A run that collapses in its first steps, before the detectors of the training loss speak."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import build_sum_rows, make_tiny_recipe, plan_recipe, train, write_rows
from tunesmith.core.errors import GateError
from tunesmith.core.events import Event, TrainStep
from tunesmith.core.run_dir import read_rollbacks, read_run_record
from tunesmith.evaluate.run_verdict import is_collapsed
from tunesmith.train import run
from tunesmith.train.guard import guarded_loop


@pytest.mark.promise
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
    list(run.train(plan))
    rollbacks = read_rollbacks(tmp_path / "run")
    assert [(one.kind, one.step, one.to) for one in rollbacks] == [("answers unlearned", 4, 0)] * 4
    assert [one.is_end for one in rollbacks] == [False] * 3 + [True]
    record = read_run_record(tmp_path / "run")
    assert record.selected_step == 0
    assert is_collapsed(record), "it is the model before training"

    (tmp_path / "run" / "record.json").unlink()  # as if it was killed before its end
    assert not any(isinstance(event, TrainStep) for event in run.resume(tmp_path / "run"))
    assert read_run_record(tmp_path / "run").rollbacks == rollbacks


@pytest.mark.promise
def test_values_that_are_not_finite_at_an_evaluation_go_back(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step would go back, too, but it comes after the evaluation."""
    evaluate = guarded_loop.eval_during_training
    failures = [GateError("loss of eval.jsonl:1 is nan")]

    def fail_once(*args: Any, **settings: Any) -> Iterator[Event]:
        if settings["step"] == 4 and failures:
            raise failures.pop()
        return evaluate(*args, **settings)

    monkeypatch.setattr(guarded_loop, "eval_during_training", fail_once)
    rows = str(write_rows(tmp_path / "rows.jsonl", build_sum_rows(1, 24)))
    eval_rows = str(write_rows(tmp_path / "eval.jsonl", build_sum_rows(100, 6)))
    changes = {"data": rows, "eval_data": eval_rows, "eval_steps": 2, "save_steps": 1}
    train(make_tiny_recipe(tiny_folder, tmp_path, **changes))
    (rollback,) = read_rollbacks(tmp_path / "run")
    assert (rollback.kind, rollback.step, rollback.to) == ("non-finite", 4, 2)
    assert rollback.evidence == "loss of eval.jsonl:1 is nan"
