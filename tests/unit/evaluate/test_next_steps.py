"""Next steps after a run: commands that follow from what was measured, with their forecasts."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.tasks.scores import find_step, judge_forecast, list_worse

import fake_runs
from judged_runs import CONSTANT, judge, make_change, make_errors, make_general
from tunesmith.cli.args import parse_recipe_args
from tunesmith.core.events import Event, Rollback, Score
from tunesmith.core.evidence import NextStep, RunVerdict, Shortcut
from tunesmith.core.run_dir import read_run_plan
from tunesmith.core.sealed_json import seal_json
from tunesmith.core.types import Plan, RunRecord
from tunesmith.evaluate.run_verdict import judge_run, read_verdict
from tunesmith.plan.build import build_plan
from tunesmith.plan.resolved import FOLLOWING, resolve_recipe
from tunesmith.recipe.load import rebuild_recipe
from tunesmith.recipe.schema import Recipe

IMPROVING = (0.40, 0.60, 0.70, 0.80)  # exact_match on 80 eval rows: its noise is 0.09
FLAT = (0.40, 0.78, 0.79, 0.80)  # the last is the best by an item
WORSE = (0.70, 0.90, 0.80, 0.70)
FALLING_LOSS = (2.0, 1.5, 1.2, 1.1)


def make_plan(run: str = "runs/a", **wishes: Any) -> Plan:
    """Return the plan of 336 rows in batches of 8 for 3 epochs, 126 steps, as recipes leave it."""
    values = {"model": "tiny", "data": "/d/d.jsonl", "eval_data": "/d/e.jsonl", **wishes}
    rows = replace(fake_runs.REPORT, rows=336, length_percentiles={"p50": 80, "max": 300})
    roles = {"data": rows, "eval_data": replace(rows, rows=80), "test_data": replace(rows, rows=80)}
    return build_plan(
        rebuild_recipe(values),
        machine=fake_runs.MACHINE,
        model=fake_runs.MODEL,
        data=roles,
        output_dir=Path(run),
        now="2026-01-01T00:00:00",
    )


def make_evals(values: tuple[float, ...], steps: int, metric: str = "exact_match") -> list[Event]:
    """Return the scores of evaluations at equal distances."""
    events: list[Event] = []
    for number, value in enumerate(values, start=1):
        step = min(steps, number * -(-steps // len(values)))  # as eval_steps of the plan
        events.append(Score("eval", metric, value, value - 0.09, value + 0.09, 80, step))
    return events


def judge_steps(
    folder: Path,
    values: tuple[float, ...] = (),
    right: int = 35,
    *,
    metric: str = "exact_match",
    plan: Plan | None = None,
    **changes: Any,
) -> tuple[NextStep, ...]:
    """Return the next steps of a run with these evaluations and so many right answers of 80."""
    plan = plan or make_plan(str(folder / "run"))
    record = make_record(plan, right, **changes)
    run = fake_runs.write_run(
        folder / "run", plan=plan, record=record, events=make_evals(values, record.steps, metric)
    )
    return judge_run(record, run).next_steps


def make_record(plan: Plan, right: int = 35, **changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "comparisons": (make_change(right / 80),),
        "errors": make_errors(right),
        "steps": plan.steps,
        "selected_step": plan.steps,
        "train_seconds": 2.0 * plan.steps,
        "total_seconds": 2.0 * plan.steps + 60,
    }
    return fake_runs.make_record(plan, **fields | changes)


def test_longer_training_is_for_answers_that_get_better_beyond_their_noise(tmp_path: Path) -> None:
    longer = judge_steps(tmp_path / "a", IMPROVING)[0]
    run = shlex.quote(str(tmp_path / "a" / "run"))
    assert longer.command == (
        f"tunesmith train {run}/resolved.yaml --num-train-epochs 6 --output-dir {run}-6-epochs"
    )
    assert longer.reason == (
        "train longer: eval exact_match was 0.600 at step 64 and 0.800 at step 126"
    )
    # two seconds a step, and a minute beside the steps
    assert (longer.metric, longer.steps, longer.seconds) == ("test exact_match", 252, 564.0)
    assert longer.low is not None
    assert longer.high is not None
    # two samples of test answers differ by 0.14, two seeds by 0.08; the last doubling brought 0.2
    assert abs(longer.low + 0.164) < 0.001
    assert abs(longer.high - 0.2625) < 0.001, "no more than there is left"
    assert longer.forecast == (
        "252 steps, about 9 min 24 s; test exact_match -0.164 to +0.262: the last doubling of the "
        "steps brought +0.200 on eval_data"
    )
    flat = judge_steps(tmp_path / "b", FLAT)
    assert flat[0].reason == (
        "no gain from training longer is shown: eval exact_match was 0.780 at step 64 and 0.800 at "
        "step 126, within the noise of 80 rows, 0.090; read the wrong "
        "answers, and add rows"
    )
    by_loss = judge_steps(tmp_path / "c", FALLING_LOSS, metric="loss")[0]
    assert by_loss.reason.startswith("train longer: eval loss was 1.500")
    assert "how much is left to gain is not known" in by_loss.forecast
    for folder, steps in (("d", judge_steps(tmp_path / "d", FLAT)), ("e", flat)):
        assert not any("train" in step.command.split() for step in steps[:1]), folder


def test_a_run_that_was_too_long_or_was_ended_is_not_trained_longer(tmp_path: Path) -> None:
    shorter = judge_steps(tmp_path / "a", WORSE, selected_step=63)[0]
    assert shorter.reason.startswith("add rows, or train less: eval exact_match was 0.900")
    assert "--num-train-epochs 1.5 " in shorter.command
    assert shorter.forecast.endswith("no better than now, in less time")
    assert shorter.low == -(shorter.high or 0)
    rollback = Rollback(90, 63, "high KL", "", "", is_end=True)
    ended = judge_steps(tmp_path / "b", IMPROVING, rollbacks=(rollback,), steps=90)
    assert ended[0].reason.startswith("let training end: train with half the learning rate")
    assert not any("epochs" in step.command for step in ended)
    few_wrong = judge_steps(tmp_path / "c", IMPROVING, right=76)
    assert few_wrong[0].reason == (
        "hold out more test rows: 4 of 80 answers are wrong, and a gain shows from 6 on"
    )
    assert not any("--num-train-epochs" in step.command for step in few_wrong)
    ready = judge_steps(
        tmp_path / "d", IMPROVING, 80, comparisons=(make_change(0.6), make_general(0.001))
    )
    assert [step.command.split()[1] for step in ready] == ["export", "train"]
    assert "no better than now" in ready[1].forecast


def test_short_runs_take_half_the_batch_first(tmp_path: Path) -> None:
    plan = make_plan(str(tmp_path / "a" / "run"), batch_size=16)
    half, longer = judge_steps(tmp_path / "a", IMPROVING, plan=plan)[:2]
    assert "--batch-size 8 " in half.command
    # twice the steps of half the rows take as long
    assert (half.steps, half.seconds) == (126, 186.0)
    assert (longer.steps, longer.seconds) == (126, 312.0)


def test_max_steps_that_ended_a_run_are_what_changes(tmp_path: Path) -> None:
    plan = make_plan(str(tmp_path / "a" / "run"), max_steps=300)
    longer = judge_steps(tmp_path / "a", IMPROVING, plan=plan)[0]
    assert "--max-steps 600 --output-dir" in longer.command
    assert longer.steps == 600
    assert longer.reason.startswith("train longer: max_steps ended the run, and eval exact_match")
    begun = make_plan(str(tmp_path / "b" / "run"), max_steps=2)
    first = judge_steps(tmp_path / "b", (), 0, plan=begun, comparisons=(make_change(0.0),))[0]
    assert first.reason == "train longer: max_steps ended the run, and 2 steps are few"
    assert "--max-steps 100 " in first.command


def test_a_constant_with_few_other_rows_needs_rows() -> None:
    def list_reasons(constant: Shortcut) -> list[str]:
        verdict = judge(make_errors(35, shortcuts=(constant,)), make_change(0.4))
        return [step.reason for step in verdict.next_steps]

    assert list_reasons(CONSTANT)[0] == "add training rows where flag is not false: 9 of 90 now"
    # `data check` names a field whose most frequent value has more than 80% of the rows
    enough = replace(CONSTANT, training_rows=18, total_rows=90)
    assert not any("add training rows" in reason for reason in list_reasons(enough))
    unknown = replace(CONSTANT, training_rows=None, total_rows=None)
    assert list_reasons(unknown)[0].endswith("count its values in the training rows")


def list_training_steps(folder: Path) -> list[NextStep]:
    """Return a step of each rule that trains."""
    harmful = (make_change(-0.4),)
    forgotten = (make_change(0.6), make_general(0.05))
    verdicts = [
        judge_steps(folder / "1", IMPROVING),
        judge_steps(folder / "2", WORSE, selected_step=63),
        judge_steps(folder / "3", (), comparisons=harmful),
        judge_steps(folder / "4", (), comparisons=forgotten),
        judge_steps(folder / "5", IMPROVING, plan=make_plan(batch_size=16)),
        judge_steps(folder / "6", IMPROVING, plan=make_plan(max_steps=300)),
        judge_steps(folder / "7", FLAT),
    ]
    return [step for steps in verdicts for step in steps if step.command.startswith("tunesmith tr")]


def test_a_step_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    steps = list_training_steps(tmp_path)
    named: set[str] = set()
    for step in steps:
        program, verb, recipe_file, flag, _, *rest = shlex.split(step.command)
        assert (program, verb, rest[0]) == ("tunesmith", "train", "--output-dir")
        run = Path(recipe_file).parent
        plan = read_run_plan(run)
        (run / "resolved.yaml").write_text(yaml.safe_dump(resolve_recipe(plan)))
        recipe = parse_recipe_args(shlex.split(step.command)[2:])
        assert isinstance(recipe, Recipe)
        again = make_plan(rest[1], **recipe.model_dump(mode="json"))
        key = flag.removeprefix("--").replace("-", "_")
        differ = {name for name in plan.values if again.values[name] != plan.values[name]}
        follows = {"num_train_epochs"} if key == "max_steps" else set[str]()
        assert differ - set(FOLLOWING) <= {key} | follows
        assert again.steps == step.steps, "the forecast has the steps of the plan"
        named.add(key)
    assert named == {"num_train_epochs", "batch_size", "max_steps", "learning_rate", "seed"}


def test_a_step_that_was_tried_is_told_and_not_advised(tmp_path: Path) -> None:
    step = judge_steps(tmp_path, IMPROVING)[0]
    run = tmp_path / "run"
    plan = read_run_plan(run)
    resolved = resolve_recipe(plan) | {"num_train_epochs": 6}
    tried = make_plan(str(tmp_path / "other name"), **resolved)
    record = make_record(tried, comparisons=(make_change(0.3),))
    stored = replace(make_record(plan), verdict=RunVerdict("no effect", "", next_steps=(step,)))
    (run / "record.json").write_bytes(seal_json(stored))
    fake_runs.write_run(tmp_path / "other name", plan=tried, record=record)
    first = read_verdict(run).next_steps[0]
    assert first.reason == (
        f"--num-train-epochs 6 was tried in {tmp_path}/other name: test exact_match 0.600, 0.738 "
        "here"
    )
    assert first.command == f"tunesmith compare {run} '{tmp_path}/other name'"
    (tmp_path / "other name" / "record.json").write_text("{")
    assert read_verdict(run).next_steps[0].reason.endswith("which has no result")
    (tmp_path / "other name" / "record.json").unlink()
    assert read_verdict(run).next_steps[0].reason.endswith("which has no result")
    # another file, another setting, or another format: not the same step
    for number, other in enumerate(
        (
            replace(tried, data={**tried.data, "data": replace(fake_runs.REPORT, fingerprint="f")}),
            make_plan(str(tmp_path / "seed"), **{**resolved, "seed": 7}),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert judge_steps(folder, IMPROVING)[0].steps == step.steps
        fake_runs.write_run(folder / "x", plan=other)
        (folder / "broken").mkdir()
        (folder / "broken" / "plan.json").write_text("{}")
        assert "was tried" not in read_verdict(folder / "run").next_steps[0].reason


def test_what_forgets_is_scaled_or_trained_at_half_the_rate() -> None:
    record = replace(
        fake_runs.make_record(),
        comparisons=(make_change(0.6), make_general(0.05)),
        errors=make_errors(80),
        scales=fake_runs.make_scales(fake_runs.CHEAPER),
    )
    scaled, half = judge_run(record, Path("runs/x")).next_steps[:2]
    assert scaled.command == "tunesmith compare runs/x@0.25 runs/x"
    assert half.metric == "general text bits_per_byte"
    assert half.low is not None
    assert half.high is not None
    assert (round(half.low, 3), round(half.high, 3)) == (-0.107, 0.057)


def test_what_is_shown_has_the_forecast() -> None:
    from rich.console import Console

    from tunesmith.cli.views.verdict import render_verdict
    from tunesmith.train.model_card import render_card

    step = NextStep("go on", "tunesmith train x", "test f1", -0.1, 0.2, 9, 60.0, "9 steps; so so")
    verdict = RunVerdict("no effect", "", next_steps=(step,))
    console = Console(width=200, record=True)
    console.print(render_verdict(verdict))
    assert "9 steps; so so" in console.export_text()
    assert "9 steps; so so" in render_card(fake_runs.make_record(verdict=verdict), {})


def test_a_forecast_is_scored_by_the_run_that_followed_it(tmp_path: Path) -> None:
    step = judge_steps(tmp_path, IMPROVING)[0]
    followed = Path(shlex.split(step.command)[-1])
    assert find_step((NextStep("read", "tunesmith report x"), step), followed) is step
    with pytest.raises(LookupError, match="follows none"):
        find_step((step,), tmp_path / "other")
    for difference, is_held in ((0.2, True), (-0.16, True), (0.3, False), (-0.2, False)):
        worse = make_change(difference)
        assert judge_forecast(step, (make_general(0.5), worse)) == (is_held, worse.difference)
    assert judge_forecast(step, (make_general(0.5),)) == (None, None)
    assert list_worse((make_change(-0.2), make_change(-0.05), make_general(0.5))) == (
        "test exact_match",
    )
