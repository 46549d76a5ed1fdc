"""`tunesmith report`, and the page that a run leaves."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import fake_runs
from tiny_runs import sums, write_rows
from tunesmith.cli import run as run_commands

Outcome = tuple[int, str, str]


def test_the_verb_says_where_the_page_is(tmp_path: Path, tunesmith: Callable[..., Outcome]) -> None:
    run, other = (
        fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record()),
        tmp_path / "other.html",
    )
    assert tunesmith("report", str(run)) == (0, f"{run / 'report.html'}\n", "")
    code, out, _ = tunesmith("report", str(run), "--out", str(other), "--json")
    assert (code, json.loads(out)["report"]) == (0, str(other))
    assert other.read_text() == (run / "report.html").read_text()
    code, out, err = tunesmith("report", str(tmp_path))
    assert (code, out) == (2, "")
    assert "not a run folder" in err


def test_a_run_leaves_its_page(
    tmp_path: Path, tiny_folder: Path, tunesmith: Callable[..., Outcome]
) -> None:
    data, run = write_rows(tmp_path / "train.jsonl", sums(1, 6)), tmp_path / "run"
    test = write_rows(tmp_path / "test.jsonl", sums(50, 3))
    words = [
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
    code, out, err = tunesmith(*words, "--output-dir", str(run), "--dtype", "fp32", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    assert f"report: {run / 'report.html'}" in err
    assert re.search(r"\d metrics? of the answers: \d better", (run / "report.html").read_text())


def test_a_run_without_a_page_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    (run / "report.html").mkdir()
    run_commands.write_page(run)
    assert "warning: no report" in capsys.readouterr().err
    run_commands.write_page(tmp_path)
    assert capsys.readouterr().err == ""
