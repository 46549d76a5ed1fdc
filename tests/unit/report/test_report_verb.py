"""`tunesmith report`, and the page at the end of a run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import fake_runs
from tiny_runs import build_sum_rows, write_rows
from tunesmith.cli import run as run_commands

Outcome = tuple[int, str, str]


def test_the_verb_prints_the_path(tmp_path: Path, tunesmith: Callable[..., Outcome]) -> None:
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    other = tmp_path / "other.html"
    code, out, err = tunesmith("report", str(run))
    assert (code, out.splitlines()[-1], err) == (0, str(run / "report.html"), "")
    assert out.startswith("Verdict: ")
    code, out, _ = tunesmith("report", str(run), "--out", str(other), "--json")
    assert (code, json.loads(out)["report"]) == (0, str(other))
    assert json.loads(out)["verdict"]["name"] == "useful, not ready"
    assert other.read_text() == (run / "report.html").read_text()
    code, out, err = tunesmith("report", str(tmp_path))
    assert (code, out) == (2, "")
    assert "not a run folder" in err


def test_a_run_writes_its_page(
    tmp_path: Path, tiny_folder: Path, tunesmith: Callable[..., Outcome]
) -> None:
    data = write_rows(tmp_path / "train.jsonl", build_sum_rows(1, 6))
    run = tmp_path / "run"
    test = write_rows(tmp_path / "test.jsonl", build_sum_rows(50, 3))
    arguments = [
        "train",
        "--model",
        str(tiny_folder),
        "--data",
        str(data),
        "--test-data",
        str(test),
        "--max-steps",
        "2",
    ]
    code, out, err = tunesmith(*arguments, "--output-dir", str(run), "--dtype", "fp32", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    assert f"report: {run / 'report.html'}" in err
    page = (run / "report.html").read_text()
    assert '<h1 id="verdict-title">Not measured</h1>' in page, "three test rows are too few"
    assert '<section id="errors"' in page


def test_a_failing_page_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    (run / "report.html").mkdir()
    run_commands.write_page(run)
    assert "warning: no report" in capsys.readouterr().err
    run_commands.write_page(tmp_path)
    assert capsys.readouterr().err == ""
