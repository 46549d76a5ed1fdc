"""Views of results: what they contain, and what may be concluded from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.text import Text

import fake_runs
from tunesmith.cli.views.results import (
    format_kl_scores,
    render_comparisons,
    render_run_record,
    render_scales,
)
from tunesmith.core.events import GenerationSample, Score
from tunesmith.core.types import RunRecord, ScalePoint
from tunesmith.evaluate.scale_choice import describe_recommendation
from view_samples import BETTER, PLAN, render_text


@pytest.mark.parametrize(
    ("difference", "low", "high", "higher_is_better", "text"),
    [
        (0.6, 0.5, 0.7, True, "better"),
        (-0.6, -0.7, -0.5, True, "worse"),
        (-0.6, -0.7, -0.5, False, "better"),
        (0.6, 0.5, 0.7, False, "worse"),
        (0.1, -0.1, 0.3, True, "no difference shown"),
        (0.0, 0.0, 0.0, True, "no difference shown"),
        (0.1, 0.0, 0.3, True, "no difference shown"),
    ],
)
def test_only_an_interval_without_zero_is_a_result(
    difference: float, low: float, high: float, higher_is_better: bool, text: str
) -> None:
    comparison = replace(
        BETTER, difference=difference, low=low, high=high, higher_is_better=higher_is_better
    )
    line = render_text(render_comparisons([comparison])).splitlines()[2].rstrip()
    assert line.endswith(f"]  {text}")


def test_a_metric_is_a_line_with_the_interval_of_its_change() -> None:
    line = " ".join(render_text(render_comparisons([BETTER])).splitlines()[2].split())
    assert line == "test field_f1 200 0.200 0.800 0.600 [0.500, 0.700] better"


@pytest.mark.parametrize("width", [60, 80, 100, 119, 120, 160])
def test_no_interval_is_broken_and_evidence_needs_room(width: int) -> None:
    binary = replace(BETTER, metric="exact_match", improved=80, worsened=0, p_value=1e-9)
    forgot = replace(
        BETTER, task="general text", metric="bits_per_byte", higher_is_better=False, low=-1.1
    )
    text = render_text(render_comparisons([binary, forgot]), width=width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "0.600 [0.500, 0.700]  better" in text
    assert "0.600 [-1.100, 0.700]" in text
    assert ("80 fixed, 0 broken" in text) == (width >= 120)
    assert "↓ lower is better" in text


def test_a_doubtful_verdict_breaks_no_table() -> None:
    """The words about Holm's correction took the room of the metric's name and of the numbers."""
    changes = [fake_runs.make_comparison("exact_match", 0.3, 0.4, half) for half in (0.0999, 0.2)]
    text = render_text(render_comparisons(changes, ("A", "B")), width=80)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[1].split()[0] == "metric"
    assert lines[2].split()[:2] == ["test", "exact_match"]
    assert lines[2].endswith("better *")
    assert "* not after Holm correction (2 comparisons)" in lines


def test_a_long_or_hostile_name_of_a_task_is_short_and_on_one_line() -> None:
    for task in ("test: " + "b" * 200, "test: one\n\x1b[2J# two [red]"):
        change = fake_runs.make_comparison("exact_match", 0.1, 0.8, 0.1, task=task)
        lines = render_text(render_comparisons((change,), ("A", "B")), width=80).splitlines()
        assert len(lines) <= 6
        assert any("better" in line for line in lines)


def test_a_record_shows_answers_side_by_side_and_the_adapter() -> None:
    before, after = (
        GenerationSample(0, "a:1", "Q", "I am an [AI]"),
        GenerationSample(75, "a:1", "Q", '{"a": 1}', expected='{"a": 1}'),
    )
    record = RunRecord(
        "0.1.0", PLAN, (), (BETTER,), 75, 9000, 10.0, 10**9, "runs/x/adapter", ((before, after),)
    )
    text = render_text(render_run_record(record))
    assert "before    I am an [AI]" in text
    assert 'after     {"a": 1}' in text
    assert "75 steps, 900 tokens/s: 10 s of training\n" in text
    assert "peak memory 1.0 GB (1.9 GB predicted)\n" in text
    measured = replace(record, total_seconds=200.0, train_peak_bytes=8 * 10**8)
    measured_text = render_text(render_run_record(measured))
    assert "10 s of training, 3 min 20 s with loading, preflight and evaluation" in measured_text
    assert "1.0 GB (1.9 GB predicted); 800.0 MB in training, the rest in" in measured_text
    assert "prefix sharing" not in text
    assert "adapter: runs/x/adapter" in text
    shared = render_text(render_run_record(replace(record, shared_tokens=1800)))
    assert "prefix sharing saved 1,800 of 9,000 tokens (20.0%)" in shared
    assert "--scale" not in shared
    scales = fake_runs.make_scales(fake_runs.CHEAPER)
    scaled = render_text(render_run_record(replace(record, scales=scales)))
    verify_command = "tunesmith compare runs/x@0.25 runs/x"
    assert f"verify the recommended scale on test_data: {verify_command}" in scaled
    assert "export it: tunesmith export runs/x --to peft --scale 0.25" in scaled


def test_a_record_without_results_says_so_instead_of_an_empty_table() -> None:
    text = render_text(
        render_run_record(
            RunRecord("0.1.0", PLAN, (), (), 6, 9000, 10.0, 10**9, "runs/x/adapter", ())
        )
    )
    assert text.startswith("no before/after: the recipe has neither test_data nor retention_data")
    assert "metric" not in text.splitlines()[1]


def make_task_score(task: str, metric: str, value: float) -> Score:
    return Score(task, metric, value, value - 0.05, value + 0.05, 20, 9)


def test_a_kl_divergence_names_its_unit() -> None:
    (line,) = format_kl_scores([make_task_score("general text", "kl", 0.021)])
    assert Text.from_markup(line).plain == (
        "general text: KL(base ‖ tuned), nats/token 0.021 [-0.029, 0.071]"
    )


@pytest.mark.parametrize("has_general_text", [True, False])
def test_the_recommended_scale_is_marked(has_general_text: bool) -> None:
    losses = (2.0, 1.5, 1.2, 1.04, 1.0)
    bits = (0.8, 0.81, 0.82, 0.84, 0.9)
    points = [
        ScalePoint(
            index / 4,
            make_task_score("eval", "loss", losses[index]),
            make_task_score("general text", "bits_per_byte", bits[index])
            if has_general_text
            else None,
        )
        for index in range(5)
    ]
    lines = render_text(render_scales(points)).splitlines()
    row = next(line.split() for line in lines if line.startswith(" 0.75"))
    assert lines[0].strip() == "Adapter-scale trade-off"
    assert row[:3] == ["0.75", "1.0400", "96%"]
    assert row[3:] == (["-", "0.8400", "40%", "recommended"] if has_general_text else ["-"] * 3)
    assert lines[-1] == describe_recommendation(points)
    assert lines[-1].startswith("scale 0.75 " if has_general_text else "scale 1 ")


def test_general_text_that_gained_much_more_than_it_lost_has_no_share() -> None:
    points = [
        ScalePoint(
            scale,
            make_task_score("eval", "loss", loss),
            make_task_score("general text", "bits_per_byte", bits),
        )
        for scale, loss, bits in ((0, 6.4, 8.684), (0.5, 2.0, 8.143), (1, 1.6, 8.691))
    ]
    rows = [line.split() for line in render_text(render_scales(points)).splitlines()]
    assert [row[5] for row in rows[2:5]] == ["0%", "none", "100%"]


def test_distance_from_the_base_is_bad_on_general_text_only() -> None:
    comparisons = [
        fake_runs.make_comparison("kl", 4.0, 5.0, 0.1, task=task, higher_is_better=False)
        for task in ("test", "general text")
    ]
    text = render_text(render_comparisons(comparisons))
    words = {line.split()[0]: line.rstrip() for line in text.splitlines() if line.strip()}
    assert words["test"].endswith("further from base")
    assert words["general"].endswith("worse")
