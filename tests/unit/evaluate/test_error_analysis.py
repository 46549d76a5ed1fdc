"""Errors by form, field, value and task, with counts, intervals and rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tunesmith.core.events import GenerationSample
from tunesmith.core.evidence import MAX_GROUP_ROWS, MAX_GROUPS, ErrorAnalysis, ErrorGroup
from tunesmith.core.json_io import dump_json, parse_as
from tunesmith.evaluate.error_analysis import analyze_errors
from tunesmith.evaluate.results import EvalResults, MetricValues
from tunesmith.evaluate.statistics import compute_wilson_interval
from tunesmith.evaluate.training_answers import build_training_values

Answers = Sequence[tuple[str, str]]  # expected, answered


def make_results(
    answers: Answers,
    *,
    metric: str = "exact_match",
    tasks: Sequence[str] = (),
    digests: Sequence[str] = (),
    prefix: str = "t",
) -> EvalResults:
    samples: list[GenerationSample] = []
    for index, (expected, answered) in enumerate(answers):
        prompt = "word " * (index % 10 + 1)
        samples.append(GenerationSample(1, f"{prefix}:{index}", prompt, answered, expected))
    names = list(dict.fromkeys(tasks)) or [""]
    measurements: list[MetricValues] = []
    for name in names:
        part = [sample for index, sample in enumerate(samples) if not tasks or tasks[index] == name]
        ids = tuple(sample.id for sample in part)
        values = tuple(float(sample.answer == sample.expected) for sample in part)
        measurements.append(MetricValues(f"test: {name}" if name else "test", metric, ids, values))
    rows = {sample.id: digest for sample, digest in zip(samples, digests, strict=False)}
    return EvalResults(tuple(measurements), tuple(samples), {"test_data": rows} if rows else {})


def analyze(before: EvalResults | None, after: EvalResults) -> ErrorAnalysis:
    analysis = analyze_errors(before, after)
    assert analysis is not None
    return analysis


def get_groups(analysis: ErrorAnalysis, by: str) -> dict[str, ErrorGroup]:
    table = analysis.get_table(by)
    return {group.name: group for group in table.groups} if table else {}


def make_object(index: int, **changes: object) -> str:
    return json.dumps({"name": f"n{index}", "flag": index % 3 == 0, "size": index % 4} | changes)


def test_errors_by_field_count_the_answers_that_are_wrong_there_alone() -> None:
    after = [(make_object(i), make_object(i, flag=False)) for i in range(30)]
    after += [(make_object(i), make_object(i, flag=i % 3 != 0, size=9)) for i in range(30, 40)]
    after += [(make_object(i), "not JSON") for i in range(40, 45)]
    before = [(make_object(i), "?") for i in range(45)]
    analysis = analyze(make_results(before), make_results(after))
    assert (analysis.n, analysis.right, analysis.right_before) == (45, 20, 0)
    assert (analysis.fixed, analysis.broken) == (20, 0)
    fields = get_groups(analysis, "field")
    assert next(iter(fields)) == "flag"
    flag = fields["flag"]
    assert (flag.n, flag.wrong, flag.only_here, flag.wrong_before) == (40, 20, 10, 40)
    low, high = compute_wilson_interval(20, 40)
    assert (flag.error, flag.low, flag.high) == pytest.approx((0.5, 1 - high, 1 - low))
    assert flag.rows[0] == "t:0"
    assert len(flag.rows) == MAX_GROUP_ROWS
    assert (fields["size"].wrong, fields["size"].only_here, fields["name"].wrong) == (10, 0, 0)
    assert get_groups(analysis, "format")["not a JSON object"].wrong == 5
    values = get_groups(analysis, "expected_value")
    assert (values["flag = true"].n, values["flag = true"].wrong) == (15, 15)
    confusions = {(c.field, c.expected, c.answered): c.n for c in analysis.confusions}
    assert confusions["flag", "true", "false"] == 14


def test_missing_and_further_fields_are_errors() -> None:
    answers = [('{"a": 1, "b": 2}', '{"a": 1}'), ('{"a": 1}', '{"a": 1, "c": 3}')]
    fields = get_groups(analyze(None, make_results(answers)), "field")
    assert {name: (group.n, group.wrong) for name, group in fields.items()} == {
        "a": (2, 0),
        "b": (1, 1),
        "c": (1, 1),
    }


def test_labels_have_their_confusions() -> None:
    labels = ["bug"] * 20 + ["question"] * 15 + ["spam"] * 5
    answers = [(label, "bug" if label == "spam" else label) for label in labels]
    training = build_training_values(["bug"] * 90 + ["question"] * 109 + ["spam"], 200)
    analysis = analyze_errors(None, make_results(answers), training)
    assert analysis is not None
    values = get_groups(analysis, "label")
    assert (values["spam"].wrong, values["spam"].n, values["spam"].training_rows) == (5, 5, 1)
    assert (values["bug"].wrong, values["bug"].training_rows) == (0, 90)
    (confusion,) = analysis.confusions
    assert (confusion.expected, confusion.answered, confusion.n) == ("spam", "bug", 5)


def test_held_out_tasks_are_no_part_of_the_errors() -> None:
    answers = [("x" * (index + 1), "x" * (index + 1) if index < 30 else "y") for index in range(40)]
    transfer = make_results(answers, tasks=["easy"] * 25 + ["hard (held out)"] * 15)
    assert (analyze(None, transfer).n, analyze(None, transfer).right) == (25, 25)


def test_what_the_metric_finds_right_counts_as_the_label() -> None:
    results = make_results([("net", " net\n")] * 9 + [("mail", "the mail")] * 9)
    values = (1.0,) * 9 + (0.0,) * 9
    part = replace(results.measurements[0], metric="accuracy", values=values)
    analysis = analyze(None, EvalResults((part,), results.samples))
    assert [(name, each.wrong) for name, each in get_groups(analysis, "label").items()] == [
        ("mail", 9),
        ("net", 0),
    ]
    assert analysis.other_answers == {"the mail": 9}
    (confusion,) = analysis.confusions
    assert (confusion.expected, confusion.answered, confusion.n) == ("mail", None, 9)
    form = replace(part, metric="regex")
    assert get_groups(analyze(None, EvalResults((form,), results.samples)), "label")


def test_the_strictest_metric_decides() -> None:
    results = make_results([("a", "a"), ("b", "c")])
    others = [
        MetricValues("test", name, ("t:0", "t:1"), values)
        for name, values in (("chrf", (0.5, 0.7)), ("loss", (0.1, 0.2)), ("json_valid", (0.0, 0.0)))
    ]
    both = EvalResults((*others, *results.measurements), results.samples)
    assert analyze(None, both).metric == "exact_match"
    soft = analyze(None, EvalResults(tuple(others), results.samples))
    assert (soft.metric, soft.is_binary, soft.right, soft.mean) == ("chrf", False, 0, 0.6)
    assert analyze_errors(None, EvalResults((others[1],), results.samples)) is None
    custom = MetricValues("test", "mine.py:score", ("t:0", "t:1"), (1.0, 0.0))
    named = EvalResults((custom, others[1]), results.samples)
    assert analyze_errors(None, named) is None
    analysis = analyze_errors(None, named, graded_metrics=["folder/mine.py:score"])
    assert analysis is not None
    assert (analysis.metric, analysis.right) == ("mine.py:score", 1)


def test_general_text_and_means_of_tasks_are_no_test_rows() -> None:
    mean = MetricValues(
        "test: mean of tasks", "exact_match", ("t:0", "t:1"), (0.0, 0.0), strata=("a", "b")
    )
    general = MetricValues("general text", "exact_match", ("g:0", "g:1"), (0.0, 0.0))
    assert analyze_errors(None, EvalResults((mean, general))) is None


def test_two_models_are_paired_by_the_content_of_their_items() -> None:
    first = make_results([("a", "a"), ("b", "x"), ("c", "x")], digests=["1", "2", "3"], prefix="p")
    second = make_results([("c", "c"), ("b", "x"), ("a", "x")], digests=["3", "2", "1"], prefix="q")
    analysis = analyze(first, second)
    assert (analysis.right_before, analysis.right, analysis.fixed, analysis.broken) == (1, 1, 1, 1)
    other = make_results([("z", "z")] * 3, digests=["7", "8", "9"], prefix="q")
    assert analyze(first, other).right_before is None


@pytest.mark.parametrize("answers", [[], [("a", "b")], [("a", "a")] * 2, [("a", "b")] * 2])
def test_no_one_and_two_items(answers: Answers) -> None:
    analysis = analyze_errors(None, make_results(answers))
    assert (analysis is None) == (not answers)
    if analysis is not None:
        assert 0 <= analysis.low <= analysis.mean <= analysis.high <= 1


def test_all_right_and_all_wrong() -> None:
    right = analyze(None, make_results([(make_object(i), make_object(i)) for i in range(40)]))
    assert (right.right, right.confusions, right.shortcuts) == (40, (), ())
    assert all(group.wrong == 0 for group in get_groups(right, "field").values())
    assert get_groups(right, "field")["flag"].high < 0.1
    wrong = analyze(None, make_results([(make_object(i), "") for i in range(40)]))
    assert (wrong.right, get_groups(wrong, "field")) == (0, {})
    assert get_groups(wrong, "format")["not a JSON object"].wrong == 40


@pytest.mark.promise
def test_hostile_fields_labels_and_tasks_keep_an_analysis_small() -> None:
    evil = "\x1b[31m\u202e" + "A" * 200
    row = {f"{evil}{index}": f"{evil}{index}" for index in range(1_500)}
    answers = [(json.dumps(row), json.dumps(row | {f"{evil}1": index})) for index in range(24)]
    analysis = analyze(None, make_results(answers, tasks=[f"{evil}{i % 12}" for i in range(24)]))
    assert len(dump_json(analysis)) < 100_000
    for table in analysis.tables:
        assert len(table.groups) <= MAX_GROUPS
        assert all(len(group.name) <= 140 for group in table.groups)
    table = analysis.get_table("field")
    assert table is not None
    assert table.omitted > 400
    assert len({group.name for group in table.groups}) == len(table.groups)


def test_an_analysis_is_read_back_from_a_record() -> None:
    training = build_training_values([make_object(i) for i in range(90)], 90)
    answers = [(make_object(i), make_object(i, flag=False)) for i in range(60)]
    analysis = analyze_errors(make_results(answers), make_results(answers), training)
    assert analysis is not None
    assert analysis.shortcuts
    assert parse_as(ErrorAnalysis, json.loads(dump_json(analysis))) == analysis
