"""Sections of the page: errors, answers, checks of the data, and curves."""

import json
import re
from dataclasses import replace
from html import unescape
from importlib.resources import files
from inspect import getsource
from pathlib import Path

import pytest
from test_page import read_text

import fake_runs
from tunesmith.core.events import GenerationSample, Score
from tunesmith.core.evidence import MAX_GROUP_ROWS, RunVerdict
from tunesmith.core.json_io import to_jsonable
from tunesmith.core.run_dir import EVAL_AFTER_FILE, EVAL_BEFORE_FILE, read_run_record
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.core.types import DataReport, Finding, PlanValue, WeightedText
from tunesmith.data.checks.row_checks import ROW_CHECKS
from tunesmith.data.checks.run import DATASET_CHECKS
from tunesmith.evaluate.error_analysis import analyze_errors
from tunesmith.evaluate.results import EvalResults, MetricValues, compare_results
from tunesmith.report.data_checks import CHECK_GROUPS, list_checks
from tunesmith.report.error_tables import build_errors
from tunesmith.report.page import render_page
from tunesmith.report.run_data import load_report_data
from tunesmith.report.samples import (
    FILTERS,
    build_sample_diffs,
    build_samples,
    indent_json,
)
from tunesmith.report.summary import build_summary
from tunesmith.report.svg_charts import LineChart
from tunesmith.report.training_curves import build_curves

# ---------------------------------------------------------------- what is still wrong


def write_graded_run(path: Path, answers: list[tuple[str, str]]) -> Path:
    """Write a run with these expected and answered texts; before training, all were "?"."""
    results: dict[str, EvalResults] = {}
    for name in (EVAL_BEFORE_FILE, EVAL_AFTER_FILE):
        samples: list[GenerationSample] = []
        for index, (expected, answered) in enumerate(answers):
            answer = answered if name == EVAL_AFTER_FILE else "?"
            samples.append(GenerationSample(0, f"t:{index}", f"q{index}", answer, expected))
        grades = tuple(float(sample.answer == sample.expected) for sample in samples)
        ids = tuple(sample.id for sample in samples)
        measurement = MetricValues("test", "exact_match", ids, grades)
        results[name] = EvalResults((measurement,), tuple(samples))
    before, after = results.values()
    comparisons = compare_results(before, after, step=30)
    record = fake_runs.make_record(
        comparisons=comparisons, errors=analyze_errors(before, after), samples=()
    )
    files = {name: to_jsonable(each) for name, each in results.items()}
    return fake_runs.write_run(path, record=record, files=files)


def make_answers() -> list[tuple[str, str]]:
    """Return 40 answers of which the field `flag` is a constant, and of 13 wrong."""
    answers: list[tuple[str, str]] = []
    for index in range(40):
        flag = index % 3 == 0
        expected = json.dumps({"name": f"n{index}", "flag": flag})
        answers.append((expected, json.dumps({"name": f"n{index}", "flag": False})))
    return answers


@pytest.mark.parametrize(("num_texts", "by"), [(21, "format"), (20, "field")])
def test_the_form_comes_first_where_most_answers_lack_it(
    num_texts: int, by: str, tmp_path: Path
) -> None:
    answers = make_answers()
    texts = [(expected, "no object") for expected, _ in answers[:num_texts]]
    view = build_errors(
        load_report_data(write_graded_run(tmp_path / "run", texts + answers[num_texts:]))
    )
    assert view is not None
    assert view.open_table is not None
    assert view.open_table.by == by
    if by == "format":
        assert view.open_table.groups[0].group.wrong == num_texts


def test_the_form_comes_first_where_no_field_is_wrong(tmp_path: Path) -> None:
    """Else the first screen lists values that have nothing to do with the errors."""
    right = [(expected, expected) for expected, _ in make_answers()]
    texts = [(expected, "no object") for expected, _ in right[:15]]
    run = write_graded_run(tmp_path / "run", texts + right[15:])
    view = build_errors(load_report_data(run))
    assert view is not None
    assert view.open_table is not None
    assert view.open_table.by == "format"


def test_rows_of_several_tasks_are_counted_once(tmp_path: Path) -> None:
    changes = [
        fake_runs.make_comparison("exact_match", 0.1, 0.8, 0.1, task=f"test: {task}")
        for task in ("a", "b", "mean of tasks")
    ]
    general = fake_runs.FORGOT
    record = fake_runs.make_record(comparisons=(*changes, *changes, general))
    html = render_page(load_report_data(fake_runs.write_run(tmp_path / "run", record=record)))
    assert "on the same items before and after: 160 test rows, 80 general texts." in html


def test_the_first_screen_says_the_level_the_cost_and_what_next(tmp_path: Path) -> None:
    run = write_graded_run(tmp_path / "run", make_answers())
    html = render_page(load_report_data(run))
    first = html[html.index('<section id="verdict"') : html.index('<section id="errors"')]
    assert "26 of 40 answers are exactly right, 0 before</bdi>." in first
    assert "Forgetting is not measured" in first
    assert "constant: flag is false in 40 of 40 answers, expected in 26" in first
    assert "Still wrong: 14 of 40" in first
    commands = re.findall(r'<div class="command"><code dir="auto">([^<]+)</code><button', first)
    assert 1 <= len(commands) <= 3
    assert all(command.startswith("tunesmith ") for command in commands)


def test_errors_are_counted_by_field_with_links_to_their_rows(tmp_path: Path) -> None:
    run = write_graded_run(tmp_path / "run", make_answers())
    view = build_errors(load_report_data(run))
    assert view is not None
    assert view.open_table is not None
    first = view.open_table.groups[0]
    assert (first.group.name, first.group.wrong, first.link) == ("flag", 14, "14 wrong")
    assert first.interval == f"{first.group.low:.0%} to {first.group.high:.0%}"
    html = render_page(load_report_data(run))
    links = re.findall(r'data-rows="([^"]*)" data-field="([^"]*)"', html)
    rows, field = (json.loads(unescape(value)) for value in links[0])
    assert (rows[0], field) == ("t:0", "flag")
    assert set(rows) <= {f"t:{index}" for index in range(0, 40, 3)}
    text = read_text(run)
    assert "14 of 40 answers are wrong by exact match . 26 fixed, 0 broken." in text
    assert "By expected value" in text
    assert "Wrong values that were answered" in text


def test_where_nothing_is_wrong_the_section_says_so(tmp_path: Path) -> None:
    right = [(expected, expected) for expected, _ in make_answers()]
    text = read_text(write_graded_run(tmp_path / "run", right))
    assert "No answer is wrong by exact match : all 40 are right." in text
    assert "Still wrong" not in text
    plain = read_text(fake_runs.write_run(tmp_path / "plain", record=fake_runs.make_record()))
    assert "What is still wrong" not in plain


def test_all_wrong_and_very_few_answers_have_a_page(tmp_path: Path) -> None:
    for count in (2, 7):
        wrong = [("yes", "no")] * count
        text = read_text(write_graded_run(tmp_path / str(count), wrong))
        assert f"{count} of {count} answers are wrong" in text
    assert "Not measured" in read_text(tmp_path / "2")


def test_an_answer_below_1_is_not_wrong_by_a_metric_that_none_reaches(tmp_path: Path) -> None:
    graded = write_graded_run(tmp_path / "run", [("yes", "no")] * 20)
    record = read_run_record(graded)
    assert record.errors is not None
    chrf = replace(record.errors, metric="chrf", is_binary=False)
    record = replace(record, errors=chrf, verdict=None)
    files = {name: read_sealed_json(graded / name) for name in (EVAL_BEFORE_FILE, EVAL_AFTER_FILE)}
    text = read_text(fake_runs.write_run(tmp_path / "chrf", record=record, files=files))
    assert "20 of 20 answers are below 1 by chrf ." in text
    assert "Below 1: 20 of 20" in text
    assert "Still wrong" not in text


def test_only_the_first_rows_of_a_group_are_known(tmp_path: Path) -> None:
    wrong = [("yes" if index % 2 else "no", "maybe") for index in range(80)]
    run = write_graded_run(tmp_path / "run", wrong)
    assert f"first {MAX_GROUP_ROWS} of 40" in read_text(run)


# ---------------------------------------------------------------- answers


def test_an_object_is_compared_by_its_fields(tmp_path: Path) -> None:
    run = write_graded_run(tmp_path / "run", make_answers())
    diffs = {diff.id: diff for diff in build_sample_diffs(load_report_data(run))}
    assert diffs["t:0"].wrong_fields == ["flag"]
    assert diffs["t:1"].wrong_fields == []
    view = build_samples(load_report_data(run))
    assert view is not None
    assert view.chips == [("flag", 14)]
    name, flag = diffs["t:0"].fields
    assert (name.name, name.expected, name.before, name.after) == ("name", '"n0"', None, '"n0"')
    assert (flag.expected, flag.after, flag.is_right) == ("true", "false", False)
    assert [title for title, _ in diffs["t:0"].panes] == ["Before"], "which is no object"


def test_a_list_is_broken_into_lines_and_a_key_twice_is_left_alone() -> None:
    assert indent_json('[1,{"a":2}]') == '[\n  1,\n  {\n    "a": 2\n  }\n]'
    for text in ('{"a":1,"a":2}', "[1e999]", "[" * 50_000, "{no", "plain"):
        assert indent_json(text) == text


def test_the_messages_before_the_prompt_are_folded(tmp_path: Path) -> None:
    pair = fake_runs.make_pair(1, "a", "b", "b")
    samples = (tuple(replace(each, context="system: be brief") for each in pair),)
    record = fake_runs.make_record(samples=samples)
    html = render_page(load_report_data(fake_runs.write_run(tmp_path / "run", record=record)))
    assert '<details class="context"><summary>Messages before the prompt</summary>' in html
    assert "system: be brief" in html


def test_every_filter_has_a_word_for_its_emptiness() -> None:
    script = files("tunesmith.report").joinpath("page.js").read_text()
    keys = re.findall(r'^    "([\w-]+)": \(', script, flags=re.MULTILINE)
    assert keys == list(FILTERS)
    assert all(message.endswith(".") for _, message in FILTERS.values())


def test_without_a_grade_of_right_and_wrong_filters_follow_the_grades(tmp_path: Path) -> None:
    samples = (fake_runs.make_pair(1, "a", "b"), fake_runs.make_pair(2, "a", "a"))
    record = fake_runs.make_record(samples=samples)
    view = build_samples(load_report_data(fake_runs.write_run(tmp_path / "run", record=record)))
    assert view is not None
    assert [key for key, _, _ in view.filters] == ["all", "better", "worse", "changed"]


def test_few_answers_are_printed(tmp_path: Path) -> None:
    run = write_graded_run(tmp_path / "run", make_answers())
    view = build_samples(load_report_data(run))
    assert view is not None
    assert [diff.state for diff in view.printed] == ["wrong"] * 3 + ["fixed"] * 2


# ---------------------------------------------------------------- data


def list_results(
    *findings: Finding, is_full: bool = False, **reports: DataReport
) -> dict[str, tuple[str, str]]:
    report = replace(fake_runs.REPORT, findings=findings, is_fully_checked=is_full)
    roles = reports or {"data": fake_runs.REPORT, "test_data": report}
    return {check.title: (check.state, check.result) for check in list_checks(roles)}


def test_checks_that_did_not_run_are_not_clean(tmp_path: Path) -> None:
    text = read_text(fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record()))
    plan = replace(fake_runs.PLAN, data={"data": replace(fake_runs.REPORT, findings=())})
    quick = read_text(fake_runs.write_run(tmp_path / "quick", plan=plan))
    assert "Only the quick checks ran. Not run: " in quick
    assert "Keys and passwords not run" in quick
    assert "Equal rows nothing found" in quick
    assert "tunesmith data check quick/recipe.yaml Copy" in quick
    assert "few rows" in text


def test_overlap_of_training_and_held_out_rows_is_shown(tmp_path: Path) -> None:
    leak = Finding("leaks", "error", "2 of 80 rows are also in data", 2, ("t:1", "t:2"))
    results = list_results(leak)
    assert results["Held-out rows that are also training rows"] == (
        "found",
        "found: 2 in test_data",
    )
    near = "Passages that held-out rows share with training rows"
    assert results[near] == ("not run", "not run")
    overlap = Finding("ngram_overlap", "info", "1 of 80 rows shares a 13-gram", 1)
    assert list_results(overlap, is_full=True)[near] == ("found", "found: 1 in test_data")
    shared = replace(fake_runs.REPORT, findings=(leak, overlap))
    plan = replace(fake_runs.PLAN, data={"data": fake_runs.REPORT, "test_data": shared})
    run = fake_runs.write_run(tmp_path / "run", plan=plan, record=fake_runs.make_record(plan))
    cautions = build_summary(load_report_data(run)).cautions
    assert "test_data: 2 of 80 rows are also in data" in cautions
    assert "test_data: 1 of 80 rows shares a 13-gram" in cautions
    alone = list_results(data=replace(fake_runs.REPORT, findings=()))
    assert alone[near][0] == "not applicable"


def test_lengths_and_the_first_row_are_shown(tmp_path: Path) -> None:
    parts = (WeightedText("<user>4 & 4?", 0.0), WeightedText("it is <8>", 1.0))
    report = replace(fake_runs.REPORT, length_counts={"16": 0, "32": 5, "64": 10}, first_row=parts)
    plan = replace(fake_runs.PLAN, data={"data": report})
    page = render_page(load_report_data(fake_runs.write_run(tmp_path / "run", plan=plan)))
    assert "&lt;user&gt;4 &amp; 4?<mark>it is &lt;8&gt;</mark>" in page
    text = read_text(tmp_path / "run")
    assert "17 to 32 5" in text
    assert "1 to 16" not in text, "no bin before the first document"
    assert "33 to 64 10" in text
    assert page.count('<rect class="all" width="50.0"') == 1
    plan = replace(fake_runs.PLAN, data={"data": replace(fake_runs.REPORT, first_row=())})
    plain = read_text(fake_runs.write_run(tmp_path / "plain", plan=plan))
    assert "as the model sees it" not in plain


def test_general_texts_are_named_with_the_data(tmp_path: Path) -> None:
    plan = replace(fake_runs.PLAN, recipe={"model": "tiny", "retention_data": "d/general.jsonl"})
    record = fake_runs.make_record(plan)
    text = read_text(fake_runs.write_run(tmp_path / "run", plan=plan, record=record))
    assert "retention_data: general.jsonl, 80 texts measured; only measured" in text
    plain = read_text(fake_runs.write_run(tmp_path / "plain", record=fake_runs.make_record()))
    assert "retention_data: " not in plain


def test_next_steps_name_no_folder_of_the_user(tmp_path: Path) -> None:
    run = tmp_path / "alice" / "run"
    run.parent.mkdir()
    output_dir = PlanValue(str(run), "user", "")
    plan = fake_runs.PLAN.with_settings(output_dir=output_dir)
    verdict = RunVerdict("no effect", f"see {run}")
    record = fake_runs.make_record(plan, verdict=verdict)
    text = read_text(fake_runs.write_run(run, plan=plan, record=record))
    assert "tunesmith eval run --metrics exact_match Copy" in text
    assert "alice" not in text
    run.rename(tmp_path / "moved")
    assert "alice" not in read_text(tmp_path / "moved")


def test_a_check_without_its_extra_did_not_run(tmp_path: Path) -> None:
    missing = Finding("languages", "info", "languages are not checked: py3langid is not installed")
    results = list_results(missing, is_full=True)
    assert results["Languages"][0] == "not run"
    assert results["Keys and passwords"] == ("clean", "nothing found")
    assert list_results(is_full=True)["Nearly equal rows"] == ("clean", "nothing found")
    report = replace(fake_runs.REPORT, findings=(missing,), is_fully_checked=True)
    plan = replace(fake_runs.PLAN, data={"data": report, "test_data": report})
    text = read_text(fake_runs.write_run(tmp_path / "run", plan=plan))
    assert "All texts were read, but packages are missing. Not run: languages." in text
    assert "quick checks" not in text
    assert "5% of the run" not in text


def test_every_check_of_the_data_is_in_one_group() -> None:
    names = [name for group in CHECK_GROUPS for name in group.checks]
    assert sorted(names) == sorted({*DATASET_CHECKS, *ROW_CHECKS} - {"row_checks"})
    row_checks = set(ROW_CHECKS)
    for group in CHECK_GROUPS:
        if group.reads_all:
            continue
        assert not row_checks & set(group.checks)
        for name in group.checks:
            assert "text_stats" not in getsource(DATASET_CHECKS[name]), name


# ---------------------------------------------------------------- curves


def find_charts(path: Path) -> dict[str, LineChart]:
    views = build_curves(load_report_data(path))
    assert views is not None
    return {chart.axes.title: chart for view in views for chart in view.charts}


def test_curves_begin_before_training_and_show_limit_and_n(tmp_path: Path) -> None:
    events = fake_runs.make_events()
    events += [Score("probes", "forgotten", 0.05, 0.01, 0.1, 8, step) for step in (10, 20, 30)]
    events += [Score("eval", "exact_match", 0.5, 0.2, 0.8, 16, step) for step in (10, 20, 30)]
    record = fake_runs.make_record(scales=fake_runs.make_scales(), selected_step=20)
    charts = find_charts(fake_runs.write_run(tmp_path / "run", record=record, events=events))
    lost = charts["General text lost, bits per byte (limit 0.02, n = 8)"]
    assert lost.axes.limit == 0.02
    assert lost.rows[0] == ["0", "0", "0 to 0"]
    assert charts["eval: loss (n = 40)"].rows[0][:2] == ["0", "2"], "of the base model"
    accuracy = charts["eval: exact match (n = 16)"]
    assert accuracy.frame.y_ticks == (0, 0.25, 0.5, 0.75, 1)
    assert "Not measured before training." in accuracy.axes.description
    for chart in charts.values():
        assert [mark.title for mark in chart.marks if mark.kind == "kept"]
    assert {
        "Training loss (log scale)",
        "Learning rate",
        "Gradient norm before clipping",
        "Tokens per second",
        "Peak memory so far",
    } <= set(charts)


def test_steps_without_time_or_gradient_break_no_chart(tmp_path: Path) -> None:
    steps = [replace(fake_runs.make_step(n, 0.0), grad_norm=0.0, seconds=0.0) for n in (1, 2)]
    charts = find_charts(fake_runs.write_run(tmp_path / "run", events=steps))
    assert "Training loss" in charts, "zero has no logarithm"
    assert "Tokens per second" in charts
