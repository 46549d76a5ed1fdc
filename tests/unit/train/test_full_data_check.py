"""A run reads all texts where that takes little of its time, and says so where it does not."""

import dataclasses
from pathlib import Path

import pytest

from tiny_runs import build_sum_rows, make_chat_row, make_tiny_recipe, write_rows
from tunesmith.core.events import DATA_CHECK, CheckResult
from tunesmith.core.run_dir import read_run_plan
from tunesmith.core.types import Plan
from tunesmith.report.data_checks import list_checks
from tunesmith.report.run_data import load_report_data
from tunesmith.report.summary import build_summary
from tunesmith.report.training_curves import build_curves
from tunesmith.session import inputs
from tunesmith.session.inputs import RunInputs
from tunesmith.train import full_data_check, run
from tunesmith.train.full_data_check import (
    check_all_texts,
    estimate_check_seconds,
    estimate_run_seconds,
    explain_skipped_check,
)

KEY = "AKIAQ7DFH2LMNX5TRV4W"


def make_plan(model: Path, folder: Path, answer: str, seconds: float) -> tuple[Plan, RunInputs]:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*build_sum_rows(1, 5), make_chat_row("the key please", answer)]
    data = str(write_rows(folder / "rows.jsonl", rows))
    run_inputs = inputs.load_inputs(make_tiny_recipe(model, folder, data=data))
    plan = inputs.make_plan(run_inputs)
    return dataclasses.replace(plan, total_seconds=seconds), run_inputs


def test_a_long_run_reads_all_texts_and_tells_what_it_finds(
    tiny_folder: Path, tmp_path: Path
) -> None:
    plan, run_inputs = make_plan(tiny_folder, tmp_path, f"it is {KEY}", 1000)
    assert explain_skipped_check(plan, run_inputs) == ""
    events = list(run.train(plan, run_inputs))
    results = [
        event for event in events if isinstance(event, CheckResult) and event.kind == DATA_CHECK
    ]
    assert any("data: 1 of 6 rows" in result.evidence for result in results)
    assert {result.level for result in results} == {"warn"}
    assert len(results) <= full_data_check.MAX_FINDINGS + 1
    stored = read_run_plan(Path(plan.config.output_dir))
    report = stored.data["data"]
    assert report.is_fully_checked
    assert "secrets" in [finding.check for finding in report.findings]
    assert not any(KEY in str(finding) for finding in report.findings)
    states = {view.title: view.state for view in list_checks(stored.data)}
    assert states["Keys and passwords"] == "found"
    assert states["Nearly equal rows"] == "clean"
    page_data = load_report_data(Path(plan.config.output_dir))
    views = build_curves(page_data)
    assert views is not None
    assert not any(each.kind == DATA_CHECK for each in (*views[0].alerts, *views[0].passed))
    assert any(results[0].evidence in caution for caution in build_summary(page_data).cautions)


def test_a_short_run_does_not_and_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    plan, run_inputs = make_plan(tiny_folder, tmp_path, f"it is {KEY}", 10)
    assert check_all_texts(plan, run_inputs) == (plan, ())
    reason = explain_skipped_check(plan, run_inputs)
    assert reason.startswith("only the quick data checks run: reading all texts takes about 2 s")
    states = {view.title: view.state for view in list_checks(plan.data)}
    assert states["Keys and passwords"] == "not run"


def test_nothing_to_look_at_is_said_with_the_number_of_rows(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run_inputs = make_plan(tiny_folder, tmp_path, "it is 7", 1000)
    reports = {role: dataclasses.replace(report, findings=()) for role, report in plan.data.items()}
    monkeypatch.setattr(full_data_check, "build_data_reports", lambda *_, **__: reports)
    checked, results = check_all_texts(plan, run_inputs)
    assert checked.data == reports
    (result,) = results
    assert (result.level, result.num_checked) == ("ok", 6)


def test_estimates(tiny_folder: Path, tmp_path: Path) -> None:
    plan, run_inputs = make_plan(tiny_folder, tmp_path, "it is 7", 0)
    num_bytes = (tmp_path / "rows.jsonl").stat().st_size
    seconds = estimate_check_seconds(run_inputs.datasets) - full_data_check.START_SECONDS
    assert seconds == pytest.approx(num_bytes / full_data_check.BYTES_PER_SECOND, rel=0.05)
    known = dataclasses.replace(plan, seconds=(300.0, 400.0))
    assert estimate_run_seconds(known) == 300
    assert estimate_run_seconds(dataclasses.replace(known, total_seconds=350.0)) == 350
    # without a measured speed, a run is taken to be at least so long as the fastest core needs
    slow = dataclasses.replace(plan, machine=dataclasses.replace(plan.machine, cores=1))
    fast = dataclasses.replace(plan, machine=dataclasses.replace(plan.machine, cores=4))
    assert estimate_run_seconds(slow) == pytest.approx(4 * estimate_run_seconds(fast))
