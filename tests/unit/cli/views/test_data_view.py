"""Views of `data check` and `data split`."""

from __future__ import annotations

from dataclasses import replace

from tunesmith.cli.views.data import render_data, render_split
from tunesmith.data.split import SplitResult
from view_samples import REPORT, render_text


def test_data_shows_counts_and_findings() -> None:
    text = render_text(render_data({"data": REPORT}))
    assert "1,200" in text
    assert "  !  empty_answer  answers are [empty] (a.jsonl:7)" in text
    assert text.splitlines()[-2].rstrip() == "data"


def test_counts_of_nothing_have_no_column_and_no_header_is_broken() -> None:
    lengths = {"p50": 200, "max": 900}
    report = replace(
        REPORT, dropped={}, truncated=0, documents=REPORT.rows, length_percentiles=lengths
    )
    text = render_text(render_data({"data": report, "retention_data": report}), width=80)
    head = text.splitlines()[1].split()
    assert head == ["role", "rows", "tokens", "supervised", "median", "longest"]
    dropped = replace(report, dropped={"too long": 3}, truncated=2)
    text = render_text(render_data({"data": report, "test_data": dropped}), width=80)
    assert text.splitlines()[1].split()[4:6] == ["dropped", "truncated"]
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())


def test_a_split_shows_files_strata_and_what_was_not_done() -> None:
    rows = {"train": 1200, "eval": 150}
    strata = {"[billing]": {"train": 700, "eval": 90}}
    split = SplitResult(
        "parts", rows, {"train": 900, "eval": 100}, strata, has_near_check=False, skipped_rows=3
    )
    lines = [" ".join(line.split()) for line in render_text(render_split(split)).splitlines()]
    assert "train.jsonl 1,200 900" in lines
    assert "[billing] 700 90" in lines
    assert "3 rows skipped: `tunesmith data check` says why" in lines
    assert "near duplicates were not checked: pip install '.[audit]' in tunesmith's folder" in lines
    assert lines[-1] == "parts"
