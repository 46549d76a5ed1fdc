"""The verdict on a run: each by its rule, the level first, and next steps that are commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fake_runs
from judged_runs import CONSTANT, judge, make_change, make_errors, make_general
from tunesmith.core.errors import InputError
from tunesmith.core.evidence import (
    ErrorAnalysis,
    ErrorGroup,
    ErrorTable,
    Floor,
)
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.types import Comparison, PlanValue, RunRecord
from tunesmith.evaluate.run_verdict import judge_run, judge_unfinished, read_verdict
from tunesmith.evaluate.statistics import compute_mcnemar_p
from tunesmith.train.model_card import render_card


@pytest.mark.parametrize(
    ("errors", "comparisons", "name"),
    [
        (None, (), "not measured"),
        (None, (make_general(0.001),), "not measured"),
        (make_errors(80), (make_change(0.6), make_general(0.01)), "ready"),
        (make_errors(80), (make_change(0.6),), "useful, not ready"),
        (make_errors(72), (make_change(0.6), make_general(0.01)), "ready"),
        (make_errors(71), (make_change(0.6), make_general(0.01)), "useful, not ready"),
        (make_errors(10, 10), (make_change(0.6),), "useful, not ready"),
        (make_errors(80), (make_change(0.6), make_general(0.05)), "useful, not ready"),
        (make_errors(80), (make_change(0.6), make_general(0.018)), "useful, not ready"),
        (make_errors(80), (make_change(0.6), make_general(0.001, n=4)), "useful, not ready"),
        (make_errors(80, shortcuts=(CONSTANT,)), (make_change(0.6),), "useful, not ready"),
        (
            make_errors(80, metric="json_valid"),
            (replace(make_change(0.6), metric="json_valid"),),
            "useful, not ready",
        ),
        (make_errors(40), (make_change(0.05), make_general(0.001)), "no effect"),
        (make_errors(0), (make_change(0.0, 0.0),), "no effect"),
        (make_errors(10, before=40), (make_change(-0.3), make_general(0.001)), "harmful"),
        (make_errors(40), (make_change(0.05), make_general(0.05)), "harmful"),
        (make_errors(80), (make_change(0.6), make_general(0.3)), "harmful"),
    ],
)
def test_each_verdict_has_its_rule(
    errors: ErrorAnalysis | None, comparisons: tuple[Comparison, ...], name: str
) -> None:
    verdict = judge(errors, *comparisons)
    assert verdict.name == name
    assert bool(verdict.reasons) or name in ("ready", "not measured", "no effect", "harmful")
    assert len(verdict.next_steps) <= 3


def test_the_level_comes_first_then_the_change_and_the_cost() -> None:
    verdict = judge(make_errors(35), make_change(0.4375), make_general(0.051))
    assert verdict.level == "35 of 80 answers are exactly right, 0 before"
    assert verdict.change == "35 fixed, 0 broken: better, p < 0.001"
    assert verdict.cost == (
        "General text got 5.1% worse (1.000 -> 1.051 bits per byte): 2.5 times the limit of 0.02"
    )
    assert "44% of the answers are right; ready needs 90%" in verdict.reasons


def test_a_limit_that_the_user_set_is_theirs() -> None:
    record = fake_runs.make_record()
    limit = replace(record.plan.settings["seed"], value=0.04, decided_by="user")
    plan = record.plan.with_settings(forgetting_margin=limit)
    verdict = judge(make_errors(80), make_change(0.6), make_general(0.1), plan=plan)
    assert verdict.cost.endswith("2.5 times your limit of 0.04")


def test_what_was_not_measured_is_not_ready_unless_the_user_does_not_care() -> None:
    verdict = judge(make_errors(80), make_change(0.6))
    assert verdict.name == "useful, not ready"
    assert verdict.reasons[0].startswith("forgetting was not measured (retention_data: none)")
    plan = fake_runs.make_record().plan
    off = replace(plan.settings["guard_forgetting"], value="off", decided_by="user")
    unconcerned = judge(
        make_errors(80), make_change(0.6), plan=plan.with_settings(guard_forgetting=off)
    )
    assert unconcerned.name == "ready"
    assert unconcerned.cost == "Forgetting is not measured: retention_data is none"
    measured = judge(make_errors(80), make_change(0.6), make_general(0.05), plan=plan)
    assert measured.name == "useful, not ready"


def test_gates_of_the_recipe_replace_the_level_that_is_ready() -> None:
    record = fake_runs.make_record()
    half = replace(make_change(0.3), after=replace(make_change(0.3).after, value=0.6))
    for gate, name in ((">= 0.5", "ready"), (">= 0.8", "useful, not ready")):
        plan = replace(record.plan, recipe=record.plan.recipe | {"gates": {"exact_match": gate}})
        verdict = judge(make_errors(48), half, make_general(0.01), plan=plan)
        assert verdict.name == name
    assert verdict.reasons == ("test exact_match is 0.600; your gate is exact_match >= 0.8",)


def test_a_metric_without_right_and_wrong_is_never_ready() -> None:
    errors = make_errors(80, metric="chrf", is_binary=False, mean=0.93, mean_before=0.2)
    chrf = replace(make_change(0.6), metric="chrf")
    verdict = judge(errors, chrf, make_general(0.01))
    assert verdict.name == "useful, not ready"
    assert verdict.level == "Mean chrf 0.93 of 80 answers, 0.20 before"
    assert verdict.reasons == (
        "chrf has no value above which an answer is right: set one in `gates`",
    )
    assert judge(None, replace(chrf, metric="loss", higher_is_better=False)).name == "harmful"


def test_what_got_worse_is_a_reason() -> None:
    worse = replace(make_change(-0.2), metric="json_valid")
    verdict = judge(make_errors(80), make_change(0.6), worse, make_general(0.01))
    assert verdict.name == "useful, not ready"
    assert verdict.reasons == ("test json_valid got worse: 0.300 -> 0.100",)


def test_of_several_tasks_their_mean_decides() -> None:
    mean = replace(make_change(0.5), task="test: mean of tasks")
    part = replace(make_change(0.0), task="test: a")
    assert judge(make_errors(80), part, mean, make_general(0.01)).name == "ready"


def test_a_task_that_got_worse_is_not_hidden_by_the_mean() -> None:
    tasks = (
        make_change(0.0, 0.3, task="test: mean of tasks"),
        make_change(0.6, task="test: a"),
        make_change(-0.3, task="test: b"),
    )
    verdict = judge(make_errors(60, before=12), *tasks, make_general(0.001))
    assert verdict.name == "harmful"
    assert verdict.change == "48 fixed, 0 broken; mean of the tasks: no difference shown"
    assert verdict.reasons[0] == "test: b exact_match got worse: 0.300 -> 0.000"
    assert verdict.reasons[-1] == (
        "the mean of the tasks did not get better, only test: a exact_match 0.300 -> 0.900"
    )
    assert judge(make_errors(60), *tasks[:2]).name == "useful, not ready", "one task got better"
    better = replace(tasks[0], low=0.05, high=0.5, difference=0.2)
    assert judge(make_errors(60), better, *tasks[1:]).name == "useful, not ready"


def test_a_task_that_got_worse_counts_where_the_mean_is_not_shown_to_be_worse() -> None:
    """After the correction for several comparisons, the mean may be worse by its own p alone."""
    mean = make_change(-0.1, 0.0999, task="test: mean of tasks")
    tasks = (mean, make_change(0.6, task="test: a"), make_change(-0.8, task="test: b"))
    verdict = judge(make_errors(60, before=12), *tasks, make_general(0.001))
    assert "worse, but not after Holm correction" in verdict.change
    assert verdict.name == "harmful"


def test_a_gain_in_content_counts_where_the_strictest_metric_shows_none() -> None:
    """Such as objects of which one field is always wrong, or texts of which none is exact."""
    errors = make_errors(0)
    no_change = make_change(0.0)
    fields = replace(make_change(0.6), metric="field_f1")
    verdict = judge(errors, no_change, fields, make_general(0.001))
    assert verdict.name == "useful, not ready"
    assert verdict.reasons[-1] == "exact_match did not get better, only field_f1 0.300 -> 0.900"
    constant = make_errors(0, shortcuts=(CONSTANT,))
    assert judge(constant, no_change, fields, make_general(0.001)).name == "no effect"
    chrf = replace(make_change(-0.2), metric="chrf")
    assert judge(errors, no_change, fields, chrf, make_general(0.001)).name == "no effect"
    assert judge(errors, make_change(-0.2), fields, make_general(0.001)).name == "harmful"
    few = replace(no_change, p_value=1.0, after=replace(no_change.after, n=5))
    assert judge(errors, few, fields, make_general(0.001)).name == "not measured"


def test_a_gain_in_a_custom_metric_is_named_where_the_deciding_one_shows_none() -> None:
    plan = fake_runs.make_record().plan
    metrics = replace(plan.settings["metrics"], value=("exact_match", "my/grades.py:tone"))
    plan = plan.with_settings(metrics=metrics)
    tone = replace(make_change(0.6), metric="grades.py:tone")
    verdict = judge(make_errors(80), make_change(0.0), tone, make_general(0.001), plan=plan)
    assert verdict.name == "useful, not ready"
    assert verdict.reasons == (
        "exact_match did not get better, only grades.py:tone 0.300 -> 0.900",
    )


def test_a_level_that_a_floor_may_have_is_not_ready() -> None:
    floor = Floor("most frequent answer", 0.9, 80, 0.05, -0.01, 0.11, is_beaten=False)
    beaten = replace(floor, name="bag of words", value=0.92, is_beaten=True)
    errors = make_errors(76, floors=(floor, beaten))
    verdict = judge(errors, make_change(0.6), make_general(0.01))
    assert verdict.name == "useful, not ready"
    assert verdict.reasons == (
        "not shown to beat most frequent answer, 0.950 against 0.900 [-0.010, +0.110]",
    )
    assert judge(replace(errors, floors=(beaten,)), make_change(0.6), make_general(0.01)).name == (
        "ready"
    )


def test_test_rows_that_repeat_training_rows_are_a_reason() -> None:
    """A gain on them may be memory."""
    plan = fake_runs.make_record().plan
    names = []
    for count, check, level in (
        (200, "near_leaks", "error"),
        (200, "ngram_overlap", "info"),
        (200, "leaks", "warn"),  # a prompt of data with another answer
        (100, "near_leaks", "error"),
        (200, "duplicates", "error"),
    ):
        message = f"{count} of 1,200 rows repeat a row of data almost exactly"
        finding = replace(fake_runs.FINDING, check=check, level=level, message=message, count=count)
        report = replace(fake_runs.REPORT, findings=(finding,))
        repeated = replace(plan, data=plan.data | {"test_data": report})
        verdict = judge(make_errors(80), make_change(0.6), make_general(0.01), plan=repeated)
        names.append(verdict.name)
        if verdict.reasons:
            assert verdict.reasons == (f"test_data: {message}",)
    assert names == ["useful, not ready", "ready", "ready", "ready", "ready"]


def test_a_base_that_needs_no_training_is_said() -> None:
    no_change = make_change(0.0)
    for before, step in ((80, "advise"), (76, "hold out more test rows: 4 of 80")):
        verdict = judge(make_errors(before, before=before), no_change, make_general(0.001))
        assert verdict.name == "no effect"
        reason = f"{before} of 80 answers were right before training: there was little to gain"
        assert reason in verdict.reasons
        assert step in f"{verdict.next_steps[0].reason}: {verdict.next_steps[0].command}"
    poor = judge(make_errors(60, before=60), no_change, make_general(0.001))
    assert "little to gain" not in str(poor.reasons)
    better = judge(make_errors(80, before=72), make_change(0.1, 0.05), make_general(0.001))
    assert "little to gain" not in str(better.reasons)
    form = make_errors(80, before=80, metric="json_valid")
    assert "advise" not in str(judge(form, replace(no_change, metric="json_valid")).next_steps)


def test_where_nothing_grades_the_answers_a_command_does() -> None:
    form = replace(make_change(0.6), metric="json_valid")
    loss = replace(make_change(-0.6, higher_is_better=False), metric="loss")
    command = "tunesmith eval 'runs/a b' --metrics exact_match"
    for errors, change in ((make_errors(80, metric="json_valid"), form), (None, loss)):
        verdict = judge(errors, change, make_general(0.001))
        assert verdict.next_steps[0].command == command
    formless = judge(make_errors(0, metric="json_valid"), form, make_general(0.001))
    assert command not in [step.command for step in formless.next_steps]
    graded = judge(make_errors(40), make_change(0.5), make_general(0.001))
    assert command not in [step.command for step in graded.next_steps]


def test_only_answers_that_the_test_rows_expect_can_be_graded() -> None:
    """Of plain text there are none, and of preference rows another metric decides."""
    loss = replace(make_change(-0.6, higher_is_better=False), metric="loss")
    plan = fake_runs.make_record().plan

    def list_commands(rows: str, stage: str) -> str:
        data = plan.data | {"test_data": replace(fake_runs.REPORT, format=rows)}
        staged = replace(plan, data=data).with_settings(
            stage=replace(plan.settings["seed"], value=stage)
        )
        verdict = judge(None, loss, make_general(0.001), plan=staged)
        return str([step.command for step in verdict.next_steps])

    assert "--metrics exact_match" in list_commands("completion", "sft")
    for rows, stage in (
        ("text", "sft"),
        ("messages, text", "sft"),
        ("preference", "preference"),
        ("completion", "preference"),  # KTO
        ("text", "cpt"),
    ):
        assert "--metrics" not in list_commands(rows, stage)


def test_the_side_of_the_limit_is_told_where_it_is_close() -> None:
    for lost, times in (
        (0.0195, "0.98 times"),
        (0.01999, "just under"),
        (0.02001, "just over"),
        (0.0205, "1.02 times"),
        (0.03, "1.5 times"),
    ):
        verdict = judge(make_errors(80), make_change(0.6), make_general(lost))
        assert f"{times} the limit of 0.02" in verdict.cost
        is_beyond = verdict.next_steps[0].reason.startswith("forget less")
        assert is_beyond == (times == "1.5 times"), "with the whole interval"


def test_a_gain_in_form_alone_is_no_effect_and_said() -> None:
    form = replace(make_change(0.6), metric="json_valid")
    likelihood = replace(make_change(-0.6, higher_is_better=False), metric="loss")
    verdict = judge(make_errors(0), make_change(0.0), form, likelihood, make_general(0.001))
    assert verdict.name == "no effect"
    assert verdict.reasons[-1] == ("exact_match did not get better, only json_valid 0.300 -> 0.900")


def test_where_answers_are_wrong_is_on_the_first_screen() -> None:
    groups = (
        ErrorGroup("flag", 80, 33, 0.4, 0.3, 0.5),
        ErrorGroup("closes", 80, 10, 0.1, 0.0, 0.2),
        ErrorGroup("date", 80, 0, 0.0, 0.0, 0.1),
    )
    no_object = ErrorGroup("not a JSON object", 90, 10, 0.1, 0.0, 0.2)
    tables = (ErrorTable("format", (no_object,)), ErrorTable("field", groups))
    errors = make_errors(35, tables=tables)
    change = make_change(0.4)
    cut = replace(change, after=replace(change.after, truncated=8))
    assert judge(errors, cut, make_general(0.001)).reasons == (
        "44% of the answers are right; ready needs 90%",
        "8 of 80 answers reach the limit of new tokens and are cut off",
        "not a JSON object: 10 of 90 answers",
        "wrong most often: flag in 33 of 80 answers, closes in 10",
    )
    few_cut = replace(change, after=replace(change.after, truncated=7))
    assert len(judge(errors, few_cut, make_general(0.001)).reasons) == 3
    assert judge(replace(errors, right=79), cut, make_general(0.001)).name == "ready"


def test_what_was_forgotten_has_a_step_where_no_scale_is_better() -> None:
    record = fake_runs.make_record()
    for lost, is_told in ((0.05, True), (0.001, False)):
        verdict = judge(make_errors(80), make_change(0.6), make_general(lost), plan=record.plan)
        reasons = [step.reason for step in verdict.next_steps]
        assert ("forget less: train with half the learning rate, 5e-05" in reasons) == is_told
    poor = judge(make_errors(60), make_change(0.6), make_general(0.05), plan=record.plan)
    assert not any("half-rate" in step.command for step in poor.next_steps), "it costs answers"
    cheaper = fake_runs.make_scales(fake_runs.CHEAPER)
    forgotten = (make_change(0.6), make_general(0.05))
    scaled = judge_run(
        replace(record, comparisons=forgotten, errors=make_errors(80), scales=cheaper), Path("r")
    )
    assert "compare" in scaled.next_steps[0].command
    # scale 0.25 loses 0.025 bits per byte
    assert scaled.next_steps[0].reason.endswith(
        "of the forgetting, still 1.2 times the limit: verify it"
    )
    assert "half the learning rate" in scaled.next_steps[1].reason
    limit = replace(record.plan.settings["seed"], value=0.03)
    wider = record.plan.with_settings(forgetting_margin=limit)
    mended = judge_run(
        replace(record, plan=wider, comparisons=forgotten, errors=make_errors(80), scales=cheaper),
        Path("r"),
    )
    assert mended.next_steps[0].reason.endswith("of the forgetting: verify it")
    assert "half the learning rate" not in str(mended.next_steps)


@pytest.mark.parametrize(
    "general", [make_general(0.001, 0.5, n=4), make_general(-0.01, 0.05), make_general(0.0, 0.05)]
)
def test_no_step_is_for_forgetting_that_was_not_measured(general: Comparison) -> None:
    """Neither where texts are too few, nor where general text did not get worse."""
    record = replace(
        fake_runs.make_record(),
        comparisons=(make_change(0.6), general),
        errors=make_errors(80),
        scales=fake_runs.make_scales(fake_runs.CHEAPER),
    )
    steps = str(judge_run(record, Path("r")).next_steps)
    assert "forget" not in steps
    assert "compare" not in steps


def test_a_base_that_is_all_right_has_no_wrong_answers_to_read() -> None:
    no_change = make_change(0.0)
    all_right = judge(make_errors(80, 80), no_change)
    assert all_right.name == "no effect"
    assert "read the wrong answers" not in str(all_right.next_steps)
    all_wrong = judge(make_errors(0), no_change)
    assert "read the wrong answers; without eval_data" in str(all_wrong.next_steps)


def test_five_right_or_wrong_answers_are_too_few_to_tell() -> None:
    """Even five of five that are fixed have p = 0.06, so "no effect" would be said of any model."""
    all_fixed = make_change(0.6, p_value=compute_mcnemar_p(5, 0))
    five = replace(all_fixed, after=replace(all_fixed.after, n=5))
    assert judge(make_errors(5, 5), five).name == "not measured"
    graded = replace(five, p_value=None)
    assert judge(make_errors(5, 5), graded).name == "not measured"
    all_fixed = replace(all_fixed, p_value=compute_mcnemar_p(6, 0))
    six = replace(all_fixed, after=replace(all_fixed.after, n=6))
    assert judge(make_errors(6, 6), six).name == "useful, not ready"
    corrected = judge(make_errors(6, 6), six, make_general(0.001))
    assert corrected.name == "not measured", "of two comparisons, p = 0.03 is too large"


def test_no_difference_says_what_could_have_been_shown() -> None:
    change = make_change(0.05, min_detectable=0.25)
    verdict = judge(make_errors(40), change, make_general(0.001))
    assert verdict.name == "no effect"
    assert verdict.change == (
        "40 fixed, 0 broken: no difference shown; 80 rows can show one of 0.25"
    )
    assert "hold out more test rows: 80 test rows may miss an effect below 0.25" in [
        step.reason for step in verdict.next_steps
    ]
    sharp = judge(make_errors(40), replace(change, min_detectable=0.1), make_general(0.001))
    assert "hold out" not in str(sharp.next_steps)


def test_two_items_are_not_measured() -> None:
    change = make_change(0.6)
    few = replace(change, after=replace(change.after, n=2))
    verdict = judge(make_errors(2, 2), few)
    assert (verdict.name, verdict.level) == (
        "not measured",
        "2 of 2 answers are exactly right, 0 before",
    )
    assert verdict.next_steps[0].reason == "hold out more test rows: 2 are too few to tell"
    untested = judge(None, replace(change, task="eval"))
    assert untested.next_steps[0].reason == "hold out test rows: the recipe has none"


HOSTILE = "\x1b[2J[red]`<b>\u202e$(rm -rf ~)\n# title"


def test_hostile_names_stay_text() -> None:
    shortcut = replace(CONSTANT, field=HOSTILE * 100, value=HOSTILE * 100)
    verdict = judge(make_errors(35, shortcuts=(shortcut,)), make_change(0.4))
    record = replace(fake_runs.make_record(), verdict=verdict)
    card = render_card(record, {})
    assert "\x1b" not in card
    assert "\n# title" not in card
    assert "<b>" not in card.replace("\\<b\\>", "")
    for step in verdict.next_steps:
        assert "\x1b" not in step.command
        assert "rm -rf" not in step.command


def test_the_card_and_the_record_have_the_verdict() -> None:
    verdict = judge(make_errors(35, shortcuts=(CONSTANT,)), make_change(0.4))
    record = replace(fake_runs.make_record(), verdict=verdict, errors=make_errors(35))
    card = render_card(record, {})
    assert card.index("## Verdict: useful, not ready") < card.index("## Results")
    assert "35 of 80 answers are exactly right, 0 before" in card
    assert "`tunesmith data check 'a b/recipe.yaml'`" in card.replace("runs/", "")
    again = parse_as(RunRecord, read_back(record))
    assert (again.verdict, again.errors) == (verdict, record.errors)


def read_back(record: RunRecord) -> Any:
    return json.loads(dump_json(record))


def test_unfinished_and_failed_runs_are_not_measured(tmp_path: Path) -> None:
    verdict = judge_unfinished(Path("runs/x"), 30, 65, "")
    assert (verdict.name, verdict.next_steps[0].command) == (
        "not measured",
        "tunesmith resume runs/x",
    )
    assert verdict.level.startswith("30 of 65 steps are done")
    failed = judge_unfinished(Path("runs/x"), 0, 65, "preflight refused\nbecause")
    assert (failed.reasons, failed.next_steps) == (("preflight refused",), ())
    run = fake_runs.write_run(tmp_path / "open", record=None)
    assert read_verdict(run).name == "not measured"
    with pytest.raises(InputError, match="not a run folder"):
        read_verdict(tmp_path)


def test_a_finished_run_is_read_from_its_record(tmp_path: Path) -> None:
    verdict = judge(make_errors(35), make_change(0.4))
    record = replace(fake_runs.make_record(), verdict=verdict)
    run = fake_runs.write_run(tmp_path / "run", record=record)
    assert read_verdict(run) == replace(verdict, next_steps=judge_run(record, run).next_steps)
    assert read_json(run / "record.json")["verdict"]["name"] == "useful, not ready"


def make_likelihood(metric: str, before: float, after: float, **changes: Any) -> Comparison:
    lower = metric == "bits_per_byte"
    return fake_runs.make_comparison(
        metric, before, after, 0.01, higher_is_better=not lower, **changes
    )


@pytest.mark.parametrize(
    ("after", "lost", "name"),
    [(0.8, 0.01, "ready"), (1.1, 0.001, "harmful"), (0.8, 0.5, "harmful")],
)
def test_pretraining_is_judged_by_its_texts_next_to_general_text(
    after: float, lost: float, name: str
) -> None:
    plan = fake_runs.make_record().plan.with_settings(stage=PlanValue("cpt", "user", ""))
    gain = make_likelihood("bits_per_byte", 1.0, after)
    verdict = judge(None, gain, make_general(lost), plan=plan)
    assert verdict.name == name
    assert verdict.level == f"80 test texts take {after:.3f} bits per byte, 1.000 before"


def test_pretraining_that_loses_more_than_it_gains_is_not_ready() -> None:
    plan = fake_runs.make_record().plan.with_settings(
        stage=PlanValue("cpt", "user", ""), forgetting_margin=PlanValue(0.1, "user", "")
    )
    gain = make_likelihood("bits_per_byte", 1.0, 0.97)
    verdict = judge(None, gain, make_general(0.06), plan=plan)
    assert verdict.name == "useful, not ready"
    assert verdict.reasons == (
        "general text lost 0.060 bits per byte, more than the test texts gained (0.030)",
    )


@pytest.mark.parametrize(
    ("accuracy", "controlled", "name", "reason"),
    [
        (0.9, 0.8, "ready", ""),
        (0.9, 0.4, "useful, not ready", "the gain may be of length alone: with longer and"),
        (0.9, None, "useful, not ready", "the gain may be of length alone: nearly all"),
        (0.5, 0.5, "useful, not ready", "50% of the pairs [40%, 60%] are ordered as in the rows"),
        (0.3, 0.3, "harmful", ""),
    ],
)
def test_preference_is_judged_by_pairs_of_long_and_short_answers(
    accuracy: float, controlled: float | None, name: str, reason: str
) -> None:
    plan = fake_runs.make_record().plan.with_settings(stage=PlanValue("preference", "user", ""))
    changes = [make_likelihood("preference_accuracy", 0.4, accuracy)]
    if controlled is not None:
        changes.append(make_likelihood("length_controlled_accuracy", 0.4, controlled))
    verdict = judge(make_errors(0), *changes, make_general(0.001), plan=plan)
    assert verdict.name == name
    assert any(each.startswith(reason) for each in verdict.reasons) or not reason
    assert (
        verdict.level == f"The chosen answer is likelier in {accuracy:.0%} of 80 pairs, 40% before"
    )


def test_kto_is_judged_by_its_margin() -> None:
    plan = fake_runs.make_record().plan.with_settings(stage=PlanValue("preference", "user", ""))
    verdict = judge(None, make_likelihood("margin", -2.0, 3.0), make_general(0.001), plan=plan)
    assert verdict.name == "ready"
    assert verdict.level.startswith("margin on 80 test rows: -2.000 -> 3.000")


def test_tasks_that_were_not_trained_are_no_part_of_the_verdict() -> None:
    tasks = (
        make_change(0.5, task="test: mean of tasks"),
        make_change(0.0, 0.3, task="test: c (held out)"),
        make_change(0.0, 0.3, task="test: mean of held-out tasks"),
    )
    assert judge(make_errors(80), *tasks, make_general(0.01)).name == "ready"
    worse = replace(make_change(-0.2), task="test: mean of held-out tasks")
    verdict = judge(make_errors(80), tasks[0], worse, make_general(0.01))
    assert verdict.name == "useful, not ready"
    assert verdict.reasons == (
        "test: mean of held-out tasks exact_match got worse: 0.300 -> 0.100",
    )
    assert judge(make_errors(80), tasks[2], make_general(0.01)).name == "no effect"


def test_labels_of_which_only_the_form_was_learned_are_no_effect() -> None:
    """As on labels by hash: accuracy from 0 to the share of the most frequent label."""
    floor = Floor("most frequent answer", 0.33, 100, 0.0, -0.1, 0.1, is_beaten=False)
    errors = make_errors(33, 100, metric="accuracy", floors=(floor,))
    gain = fake_runs.make_comparison("accuracy", 0.0, 0.33, 0.1)
    known = fake_runs.make_comparison("multiple_choice", 0.25, 0.3, 0.1)
    verdict = judge(errors, gain, known, make_general(0.0))
    assert verdict.name == "no effect"
    assert verdict.level.startswith(
        "33 of 100 answers are the right label, 0 before; by likelihood"
    )
    assert verdict.reasons[0].startswith(
        "more than the form is not shown to be learned: neither answers nor likelihoods beat "
        "the most frequent label, 33%"
    )
    beaten = replace(errors, floors=(replace(floor, is_beaten=True),))
    assert judge(beaten, gain, known, make_general(0.0)).name == "useful, not ready"
    better = fake_runs.make_comparison("multiple_choice", 0.25, 0.8, 0.1)
    assert judge(errors, gain, better, make_general(0.0)).name == "useful, not ready"
    lopsided = replace(errors, floors=(replace(floor, value=0.9),))
    assert judge(lopsided, gain, known, make_general(0.0)).name == "useful, not ready"
