"""The full data check at the start of a run, where it costs little of the run's time.

    check_all_texts(plan, inputs) -> (plan with all findings, CheckResults to tell)

A plan checks what it reads anyway; `tunesmith data check` reads all texts. A run does so too if
that takes at most MAX_SHARE of its time, by the measured rate of the check (docs/results/
data-check.md) and the time of the plan. Nothing is refused by a finding: what cannot be trained on
was refused before. Left out: the checks (data/checks/)."""

from __future__ import annotations

import dataclasses

from tunesmith.core.events import DATA_CHECK, CheckResult
from tunesmith.core.formatting import MAX_ROW_IDS, format_count, format_duration
from tunesmith.core.types import DataReport, Plan
from tunesmith.data.dataset import Dataset
from tunesmith.plan.flops import estimate_run_flops
from tunesmith.session.inputs import RunInputs, build_data_reports

MAX_SHARE = 0.05  # of the time of a run
START_SECONDS = 2.0  # imports, and the model that detects languages
BYTES_PER_SECOND = 1.2e6  # 20,000 rows of 2.2 kB took 36.1 s of one core
# Operations per second of a core or a GPU where no speed is known: high, so that a run is not taken
# to be longer than it is. The demo reaches 1.1e11 on each of two Zen 4 cores.
FASTEST_FLOPS = {"cpu": 2.5e11, "cuda": 1e15}
MAX_FINDINGS = 5


def check_all_texts(plan: Plan, inputs: RunInputs) -> tuple[Plan, tuple[CheckResult, ...]]:
    """Return the plan with the findings of the full check, and the results to tell.

    If the check would take too long (`explain_skipped_check`), the plan is unchanged and there are
    no results."""
    if explain_skipped_check(plan, inputs):
        return plan, ()
    reports = build_data_reports(inputs, needs_all_texts=True)
    data = plan.data | {role: _shorten_rows(report) for role, report in reports.items()}
    return dataclasses.replace(plan, data=data), tuple(_list_results(reports))


def explain_skipped_check(plan: Plan, inputs: RunInputs) -> str:
    """Return why a run does not read all texts, empty if it does."""
    check_seconds = estimate_check_seconds(inputs.datasets)
    run_seconds = estimate_run_seconds(plan)
    if check_seconds <= MAX_SHARE * run_seconds:
        return ""
    return (
        f"only the quick data checks run: reading all texts takes about "
        f"{format_duration(check_seconds)}, more than {MAX_SHARE:.0%} of the run; "
        "see `tunesmith data check`"
    )


def estimate_check_seconds(datasets: dict[str, Dataset]) -> float:
    """Return the seconds of the full check, by the bytes of all rows."""
    num_bytes = 0
    for dataset in datasets.values():
        num_bytes += sum(dataset.get_row_bytes(index) for index in range(len(dataset)))
    return START_SECONDS + num_bytes / BYTES_PER_SECOND


def estimate_run_seconds(plan: Plan) -> float:
    """Return the planned seconds of a run; at least so many if no speed is known."""
    if plan.total_seconds or plan.seconds:
        return plan.total_seconds or min(plan.seconds)
    units = plan.machine.cores if plan.machine.device == "cpu" else 1
    return estimate_run_flops(plan) / (FASTEST_FLOPS[plan.machine.device] * max(1, units))


def _shorten_rows(report: DataReport) -> DataReport:
    """Return the report with the rows that are printed, as a plan stores it."""
    findings = tuple(
        dataclasses.replace(finding, rows=finding.rows[:MAX_ROW_IDS]) for finding in report.findings
    )
    return dataclasses.replace(report, findings=findings)


def _list_results(reports: dict[str, DataReport]) -> list[CheckResult]:
    """Return a warning per finding to look at, the first few, or one result that is ok."""
    rows = sum(report.rows for report in reports.values())
    lines: list[str] = []
    for role, report in reports.items():
        for finding in report.findings:
            if finding.level != "info":
                lines.append(f"{role}: {finding.message}")
    if not lines:
        evidence = f"nothing to look at in {format_count(rows, 'row')}"
        return [CheckResult(DATA_CHECK, "ok", evidence, num_checked=rows)]
    results = [CheckResult(DATA_CHECK, "warn", line) for line in lines[:MAX_FINDINGS]]
    if len(lines) > MAX_FINDINGS:
        more = format_count(len(lines) - MAX_FINDINGS, "finding")
        results.append(CheckResult(DATA_CHECK, "warn", f"{more} more: tunesmith data check"))
    return results
