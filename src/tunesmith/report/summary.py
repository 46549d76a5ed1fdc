"""The first screen of the page: the verdict, what changed, whether it is real, what it cost.

In: ReportData. Out: Summary, which verdict.html.jinja draws. The verdict and the next steps are
those of evaluate/run_verdict.py. A metric is better or worse by the rule of the terminal
(evaluate/statistics.py), and a change that does not survive the correction for several comparisons
is marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core.events import EVAL_TASK, GENERAL_TASK, CheckResult
from tunesmith.core.evidence import RunVerdict, VerdictName
from tunesmith.core.formatting import format_bytes, format_count, format_duration
from tunesmith.core.types import Comparison, RunRecord
from tunesmith.evaluate.goals import MEAN_OF_TASKS
from tunesmith.evaluate.results import describe_truncation
from tunesmith.evaluate.run_verdict import FORGETTING_UNKNOWN, judge_unfinished, renew_verdict
from tunesmith.evaluate.scale_choice import describe_bargain
from tunesmith.evaluate.statistics import (
    NO_DIFFERENCE,
    TOO_FEW_ITEMS,
    describe_evidence,
    judge_comparisons,
)
from tunesmith.report.data_checks import list_overlaps
from tunesmith.report.run_data import ReportData, is_graded_metric

Tone = Literal["good", "bad", "mixed", "open"]
Outcome = Literal["better", "worse", "doubtful", "same", "unclear"]
OUTCOMES: dict[str, Outcome] = {
    "better": "better",
    "worse": "worse",
    NO_DIFFERENCE: "same",
    TOO_FEW_ITEMS: "unclear",
}
MAX_CAUTIONS = 8
TONES: dict[VerdictName, Tone] = {
    "ready": "good",
    "useful, not ready": "mixed",
    "no effect": "open",
    "harmful": "bad",
    "not measured": "open",
}
ITEM_NOUNS = {GENERAL_TASK: "general texts", EVAL_TASK: "rows that also chose the checkpoint"}
UNITS = {"bits_per_byte": "bits per byte", "loss": "nats per token"}


@dataclass(frozen=True)
class Claim:
    """A comparison and what may be concluded from it."""

    comparison: Comparison
    outcome: Outcome
    verdict: str
    evidence: str

    @property
    def metric(self) -> str:
        return self.comparison.metric.replace("_", " ")

    @property
    def title(self) -> str:
        """The metric, with its task unless that is the usual one; general text has one metric."""
        task = self.comparison.task
        if task == GENERAL_TASK:
            return task
        return self.metric if task == "test" else f"{task}: {self.metric}"

    @property
    def unit(self) -> str:
        return UNITS.get(self.comparison.metric, "")


@dataclass(frozen=True)
class Summary:
    tone: Tone
    headline: str
    verdict: RunVerdict
    sentence: str = ""  # about a run without results, or about a better scale
    changes: tuple[Claim, ...] = ()  # graded metrics first, in the order of the recipe
    evidence: tuple[str, ...] = ()
    general: tuple[Claim, ...] = ()  # on general text
    costs: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def shown_cautions(self) -> tuple[str, ...]:
        return self.cautions[:MAX_CAUTIONS]


def build_claims(record: RunRecord) -> tuple[Claim, ...]:
    claims: list[Claim] = []
    verdicts = judge_comparisons(record.comparisons)
    for comparison, verdict in zip(record.comparisons, verdicts, strict=True):
        outcome = OUTCOMES.get(verdict, "doubtful")
        evidence = describe_evidence(comparison).replace("; McNemar ", ", ")
        claims.append(Claim(comparison, outcome, verdict, evidence))
    return tuple(claims)


def build_summary(run: ReportData) -> Summary:
    record = run.record
    cautions = _list_cautions(run)
    if record is None:
        verdict = judge_unfinished(run.path, run.steps_done, run.steps_planned, run.failure)
        if run.failure:
            sentence = "Nothing here may be used as a result."
            return Summary("bad", "A check stopped this run", verdict, sentence, cautions=cautions)
        return Summary("open", "Not finished", verdict, cautions=cautions)
    verdict = renew_verdict(record, run.path)
    claims = build_claims(record)
    general = tuple(claim for claim in claims if claim.comparison.task == GENERAL_TASK)
    task_claims = [claim for claim in claims if claim not in general]
    changes = _sort_claims(record, task_claims)
    is_explained = bool(general) or FORGETTING_UNKNOWN in verdict.reasons
    bargain = describe_bargain(record.scales)
    sentence = f"On eval_data, {bargain}; not yet checked on the graded metrics." if bargain else ""
    return Summary(
        tone=TONES[verdict.name],
        headline=verdict.name.capitalize(),
        verdict=verdict,
        sentence=sentence,
        changes=changes,
        evidence=tuple(_list_evidence(run, record, claims)),
        general=general,
        costs=tuple(_list_costs(record, is_explained=is_explained)),
        cautions=cautions,
    )


def _sort_claims(record: RunRecord, claims: Sequence[Claim]) -> tuple[Claim, ...]:
    """Return graded metrics first, then likelihoods."""
    settings = record.plan.config.metrics
    graded = [claim for claim in claims if is_graded_metric(claim.comparison.metric, settings)]
    return (*graded, *(claim for claim in claims if claim not in graded))


# ---------------------------------------------------------------- evidence, cost, cautions


def _count_items(claims: Sequence[Claim]) -> list[str]:
    """Return how many items of each kind were compared; a mean of tasks has those of the tasks."""
    counts: dict[str, dict[str, int]] = {}  # noun -> task -> items
    for claim in claims:
        task = claim.comparison.task
        if not MEAN_OF_TASKS.search(task):
            tasks = counts.setdefault(ITEM_NOUNS.get(task.partition(":")[0], "test rows"), {})
            tasks[task] = max(tasks.get(task, 0), claim.comparison.after.n)
    return [f"{sum(tasks.values())} {noun}" for noun, tasks in counts.items()]


def _list_evidence(run: ReportData, record: RunRecord, claims: Sequence[Claim]) -> list[str]:
    lines: list[str] = []
    if claims:
        counts = ", ".join(_count_items(claims))
        lines.append(f"Compared in pairs, on the same items before and after: {counts}.")
        lines.append(_describe_significance(claims))
        if any("test_data" in stage.plan.data for stage in run.stages):
            lines.append("The test rows were used once, for this comparison.")
        if any(claim.comparison.task == GENERAL_TASK for claim in claims) and _is_selected_on(run):
            lines.append(
                "The general texts were not used once only: during training, the beginnings of a "
                "few of them limited which checkpoint could be chosen."
            )
    seeds = dict.fromkeys(str(stage.plan.config.seed) for stage in run.stages)
    each = " for each stage" if len(seeds) > 1 else ""
    lines.append(
        f"One seed only{each} ({', '.join(seeds)}): the intervals do not cover seed-to-seed "
        "variation."
    )
    passed = sum(check.level == "ok" for check in record.preflight)
    total = sum(check.num_checked != 0 for check in record.preflight)
    lines.append(f"{passed} of {total} applicable preflight checks passed on this model and data.")
    return lines


def _is_selected_on(run: ReportData) -> bool:
    """Return whether forgetting of general text limited the choice of a checkpoint."""
    return any(
        "eval_data" in stage.plan.data and stage.plan.config.guard_forgetting != "off"
        for stage in run.stages
    )


def _describe_significance(claims: Sequence[Claim]) -> str:
    count = len(claims)
    significant = sum(claim.outcome in ("better", "worse") for claim in claims)
    if count == 1:
        return f"The change is {'' if significant else 'not '}statistically significant (95% CI)."
    return (
        f"{significant} of {count} changes are statistically significant "
        f"(95% CI, Holm correction for {count} comparisons)."
    )


def _list_costs(record: RunRecord, *, is_explained: bool) -> list[str]:
    lines = [] if is_explained else ["Forgetting was not measured: retention_data is none."]
    duration = format_duration(record.train_seconds)
    steps = f"{record.steps:,} steps, {record.tokens:,} tokens"
    line = f"{duration} of training: {steps}."
    if record.total_seconds:
        total = format_duration(record.total_seconds)
        line = f"{duration} of training: {steps}; {total} with loading, preflight and evaluation."
    lines.append(line)
    machine = record.plan.machine
    cores = format_count(machine.cores, "core")
    lines.append(
        f"Peak memory {format_bytes(record.peak_bytes)}, on {machine.device_name} ({cores})."
    )
    if (weights := find_weights_file(record)) is not None:
        size = format_bytes(weights.stat().st_size)
        lines.append(f"{size} on disk: {weights.parent.name}/{weights.name}.")
    return lines


def _list_cautions(run: ReportData) -> tuple[str, ...]:
    cautions: list[str] = []
    for stage in run.stages:
        cautions += stage.plan.warnings
        cautions += list_overlaps(stage.plan.data)
    if run.record:
        cautions += describe_truncation(run.record.comparisons)
        cautions += [f"resumed with changed inputs: {text}" for text in run.record.input_changes]
    for stage in run.stages:
        for check in stage.select_events(CheckResult):
            evidence = check.evidence.partition("\n")[0]
            if check.level != "ok" and evidence not in cautions:  # an overlap of rows is in both
                cautions.append(f"step {check.step}: {check.kind}: {evidence}")
    return tuple(dict.fromkeys(cautions))  # stages may repeat them


def find_weights_file(record: RunRecord) -> Path | None:
    """Return the file of the trained weights, if it still exists."""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        file = Path(record.adapter) / name
        if file.is_file():
            return file
    return None
