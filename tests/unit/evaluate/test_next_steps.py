"""Next steps after a run: commands that follow from what was measured."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_runs
from judged_runs import CONSTANT, judge, make_change, make_errors, make_general
from tunesmith.cli.args import parse_recipe_args
from tunesmith.core.evidence import (
    NextStep,
    Shortcut,
)
from tunesmith.evaluate.run_verdict import judge_run


def test_next_steps_follow_from_what_was_measured() -> None:
    record = fake_runs.make_record()
    plan = replace(record.plan, data=record.plan.data | {"eval_data": record.plan.data["data"]})
    errors = make_errors(35, shortcuts=(CONSTANT,))
    improving = judge(errors, make_change(0.4), plan=plan, selected_step=record.steps)
    epochs = plan.config.num_train_epochs * 2
    assert [step.command for step in improving.next_steps] == [
        "tunesmith data check 'runs/a b/recipe.yaml'",
        f"tunesmith train 'runs/a b/resolved.yaml' --num-train-epochs {epochs:g} "
        f"--output-dir 'runs/a b-{epochs:g}-epochs'",
        "tunesmith tune lr 'runs/a b/resolved.yaml'",
    ]
    assert improving.next_steps[0].reason == (
        "add training rows where flag is not false: 9 of 90 now"
    )
    overfit = judge(make_errors(35), make_change(0.4), plan=plan, selected_step=1)
    assert not any("epochs" in step.command for step in overfit.next_steps)
    harmful = judge(make_errors(1, before=9), make_change(-0.4), plan=plan)
    assert "--learning-rate" in harmful.next_steps[0].command
    ready = judge(make_errors(80), make_change(0.6), make_general(0.01), plan=plan)
    assert ready.next_steps[0].command == "tunesmith export 'runs/a b' --to peft"
    scaled = judge(make_errors(80), make_change(0.6), make_general(0.05))
    assert scaled.next_steps[0].command.startswith("tunesmith train ")
    record = replace(
        record,
        comparisons=(make_change(0.6), make_general(0.05)),
        errors=make_errors(80),
        scales=fake_runs.make_scales(fake_runs.CHEAPER),
    )
    first = judge_run(record, Path("runs/x")).next_steps[0]
    assert first.command == "tunesmith compare runs/x@0.25 runs/x"


def test_a_constant_with_enough_other_rows_needs_training_not_rows() -> None:
    record = fake_runs.make_record()
    plan = replace(record.plan, data=record.plan.data | {"eval_data": record.plan.data["data"]})

    def list_reasons(constant: Shortcut, selected_step: int) -> list[str]:
        errors = make_errors(35, shortcuts=(constant,))
        verdict = judge(errors, make_change(0.4), plan=plan, selected_step=selected_step)
        return [step.reason for step in verdict.next_steps]

    enough = replace(CONSTANT, training_rows=18, total_rows=90)
    first = list_reasons(enough, record.steps)[0]
    assert first.startswith("train longer: eval_data was best at the last step")
    assert first.endswith("; flag is not learned yet")
    assert not any("add training rows" in reason for reason in list_reasons(enough, 1))
    # `data check` names a field whose most frequent value has more than 80% of the rows
    few = replace(enough, training_rows=17)
    assert list_reasons(few, record.steps)[0] == (
        "add training rows where flag is not false: 17 of 90 now"
    )
    assert "not learned" not in list_reasons(few, record.steps)[1]
    unknown = replace(enough, training_rows=None, total_rows=None)
    assert list_reasons(unknown, 1)[0].endswith("count its values in the training rows")


def test_smaller_steps_are_for_short_runs_of_batches_that_still_improve() -> None:
    record = fake_runs.make_record()
    plan = replace(record.plan, data=record.plan.data | {"eval_data": record.plan.data["data"]})
    errors = make_errors(35, shortcuts=(replace(CONSTANT, training_rows=30),))

    def list_steps(steps: int, batch_size: int | None, selected_step: int) -> list[NextStep]:
        size = replace(record.plan.settings["seed"], value=batch_size)
        verdict = judge(
            errors,
            make_change(0.4),
            plan=plan.with_settings(batch_size=size),
            steps=steps,
            selected_step=selected_step,
        )
        return list(verdict.next_steps)

    smaller, longer = list_steps(99, 5, 99)[:2]
    assert smaller.reason == (
        "halve the batch: 99 steps are few, and eval_data was best at the last; "
        "flag is not learned yet"
    )
    assert smaller.command == (
        "tunesmith train 'runs/a b/resolved.yaml' --batch-size 2 --output-dir 'runs/a b-batch-2'"
    )
    assert longer.reason == "train longer: eval_data was best at the last step, after 1 epoch"
    for steps, batch_size, selected_step in (
        (100, 2, 100),
        (99, 1, 99),
        (99, None, 99),
        (99, 2, 50),
    ):
        others = list_steps(steps, batch_size, selected_step)
        assert others
        assert not any("--batch-size" in step.command for step in others)


def list_commands_of_max_steps(steps: int, selected_step: int, **recipe: Any) -> list[str]:
    """Return the next steps of a run without effect that max_steps ended, as REASON: COMMAND."""
    record = fake_runs.make_record()
    plan = replace(record.plan, recipe=record.plan.recipe | {"max_steps": steps} | recipe)
    if selected_step:
        plan = replace(plan, data=plan.data | {"eval_data": plan.data["data"]})
    verdict = judge(
        make_errors(0), make_change(0.0), plan=plan, steps=steps, selected_step=selected_step
    )
    assert verdict.name == "no effect"
    return [f"{step.reason}: {step.command}" for step in verdict.next_steps]


def test_a_run_that_max_steps_ended_is_told_to_train_longer_first() -> None:
    longer, rates, _ = list_commands_of_max_steps(2, 2, num_train_epochs="auto")
    assert longer == (
        "train longer: max_steps ended the run after 2 steps, and eval_data was best at the last: "
        "tunesmith train 'runs/a b/resolved.yaml' --max-steps 100 --output-dir 'runs/a b-longer'"
    )
    assert "tune lr" in rates
    assert (
        "--max-steps 600 --num-train-epochs auto"
        in (list_commands_of_max_steps(300, 300, num_train_epochs=2.0)[0])
    )
    unknown = list_commands_of_max_steps(1, 0, num_train_epochs="auto")[0]
    assert unknown.startswith("train longer: max_steps ended the run after 1 step: tunesmith train")
    for steps, selected_step in ((300, 100), (100, 0)):
        others = list_commands_of_max_steps(steps, selected_step)
        assert others
        assert not any("--max-steps" in line for line in others)


def test_next_steps_are_commands_that_parse(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "resolved.yaml").write_text("model: m\ndata: d.jsonl\n")
    record = fake_runs.make_record()
    plan = replace(record.plan, data=record.plan.data | {"eval_data": record.plan.data["data"]})
    for errors, change in ((make_errors(35), 0.4), (make_errors(1, before=9), -0.4), (None, 0.0)):
        comparisons = (make_change(change),) if errors else ()
        verdict = judge(errors, *comparisons, plan=plan, selected_step=record.steps)
        for step in verdict.next_steps:
            program, verb, *arguments = shlex.split(step.command)
            assert program == "tunesmith"
            if verb == "train":
                arguments[0] = arguments[0].replace("runs", str(tmp_path))
                assert parse_recipe_args(arguments)
