"""Data, cost, reproduction and provenance of a run.

In: ReportData. Out: what data.html.jinja, cost.html.jinja, reproduce.html.jinja and
provenance.html.jinja draw; the plan needs no view.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from tunesmith.core.atomic import MANIFEST, read_sealed_files
from tunesmith.core.events import GENERAL_TASK, TrainStep
from tunesmith.core.formatting import format_bytes, format_count, format_duration
from tunesmith.core.run_dir import RECIPE_FILE
from tunesmith.core.types import DataReport, Finding, Plan
from tunesmith.recipe.fields import NO_DATA
from tunesmith.report.data_checks import CheckView, list_checks
from tunesmith.report.run_data import InputHashes, ReportData, StageData
from tunesmith.report.summary import find_weights_file


@dataclass(frozen=True)
class RoleView:
    """The rows of one role, such as data or test_data."""

    role: str
    report: DataReport
    num_dropped: int
    reasons: tuple[tuple[str, str, int], ...]  # what happened, reason, rows

    @property
    def file_name(self) -> str:
        return self.report.path.rpartition("/")[2]

    @property
    def lengths(self) -> list[tuple[int, int, int, float]]:
        """The documents by length: shortest and longest of the bin, how many, and their percentage
        of the fullest bin."""
        counts = self.report.length_counts
        most = max(counts.values())
        shortest = 1
        bins: list[tuple[int, int, int, float]] = []
        for longest, count in counts.items():
            if count or bins:
                bins.append((shortest, int(longest), count, 100 * count / most))
            shortest = int(longest) + 1
        return bins


@dataclass(frozen=True)
class DataView:
    stage: StageData
    roles: tuple[RoleView, ...]
    findings: tuple[tuple[str, Finding], ...]  # role, finding
    checks: tuple[CheckView, ...]
    command: str  # that runs the checks which did not run
    retention: str  # the texts of retention_data, which are no rows of a role

    @property
    def is_fully_checked(self) -> bool:
        return any(role.report.is_fully_checked for role in self.roles)

    @property
    def roles_with_lengths(self) -> list[RoleView]:
        return [role for role in self.roles if role.report.length_counts]

    @property
    def not_run(self) -> list[CheckView]:
        return [check for check in self.checks if check.state == "not run"]

    @property
    def ran(self) -> list[CheckView]:
        return [check for check in self.checks if check.state != "not run"]


def build_data(run: ReportData) -> list[DataView]:
    views: list[DataView] = []
    for stage in run.stages:
        roles = tuple(_build_role(role, report) for role, report in stage.plan.data.items())
        findings: list[tuple[str, Finding]] = []
        for role, report in stage.plan.data.items():
            findings += [(role, finding) for finding in report.findings]
        checks = tuple(list_checks(stage.plan.data))
        recipe = shlex.quote(str(stage.path / RECIPE_FILE))
        command = f"tunesmith data check {recipe}"
        retention = _describe_retention(stage)
        views.append(DataView(stage, roles, tuple(findings), checks, command, retention))
    return views


def _describe_retention(stage: StageData) -> str:
    """Return the file of the general texts and how many were measured; empty without any."""
    source = stage.plan.recipe.get("retention_data")
    if source in (None, NO_DATA):
        return ""
    name = str(source).rpartition("/")[2]
    comparisons = stage.record.comparisons if stage.record else ()
    counts = [each.after.n for each in comparisons if each.task == GENERAL_TASK]
    measured = f", {counts[0]:,} texts measured" if counts else ""
    return f"{name}{measured}; only measured, never trained on, and not checked"


def _build_role(role: str, report: DataReport) -> RoleView:
    reasons: list[tuple[str, str, int]] = []
    for label, counts in (
        ("dropped", report.dropped),
        ("rejected", report.rejected),
        ("breaks a constraint, filtered", report.filtered),
        ("breaks a constraint, trained against", report.banned),
    ):
        reasons += [(label, reason, count) for reason, count in counts.items()]
    num_dropped = sum(report.dropped.values()) + sum(report.rejected.values())
    return RoleView(role, report, num_dropped, tuple(reasons))


# ---------------------------------------------------------------- cost


@dataclass(frozen=True)
class CostRow:
    """A measured quantity; without a prediction, `predicted` and `ratio` are "-"."""

    label: str
    stage_name: str
    predicted: str
    measured: str
    ratio: str


@dataclass(frozen=True)
class CostView:
    rows: list[CostRow]
    stages: list[tuple[StageData, dict[str, int]]]  # component -> predicted bytes


def build_cost(run: ReportData) -> CostView | None:
    rows: list[CostRow] = []
    stages: list[tuple[StageData, dict[str, int]]] = []
    for stage in run.stages:
        rows += _build_cost_rows(stage)
        memory_bytes = stage.plan.phase_bytes | stage.plan.memory_bytes
        components = {name: size for name, size in memory_bytes.items() if size and name != "peak"}
        stages.append((stage, components))
    return CostView(rows, stages) if rows else None


def _build_cost_rows(stage: StageData) -> list[CostRow]:
    plan = stage.plan
    steps = stage.select_events(TrainStep)
    if not steps:
        return []
    seconds = sum(step.seconds for step in steps)
    tokens = sum(step.tokens for step in steps)
    peak = max(step.peak_bytes for step in steps)
    predicted_peak = plan.memory_bytes.get("peak")
    predicted_memory = format_bytes(predicted_peak) if predicted_peak else "-"
    memory_ratio = f"{peak / predicted_peak:.2f}" if predicted_peak else "-"
    time_ratio = "-"
    if plan.seconds and len(steps) >= plan.steps:
        predicted_seconds = (min(plan.seconds) + max(plan.seconds)) / 2
        time_ratio = f"{seconds / predicted_seconds:.2f}" if predicted_seconds else "-"
    predicted_time = " to ".join(format_duration(bound) for bound in plan.seconds)
    predicted_time = predicted_time or "not predicted: this machine was not measured"
    speed = f"{tokens / max(seconds, 1e-9):,.0f}"
    return [
        CostRow("Peak memory", stage.name, predicted_memory, format_bytes(peak), memory_ratio),
        CostRow("Training time", stage.name, predicted_time, format_duration(seconds), time_ratio),
        CostRow("Tokens per second", stage.name, "-", speed, "-"),
    ]


# ---------------------------------------------------------------- reproduction


def build_reproduction(run: ReportData) -> list[str]:
    """Return commands that run it again; a stage starts from the adapter of the previous one."""
    commands: list[str] = []
    previous = ""
    for stage in run.stages:
        output_dir = f"runs/again/{stage.name}".rstrip("/")
        if stage.recipe:
            recipe = shlex.quote(str(stage.path / RECIPE_FILE))
            start = f" --adapter-from {previous}" if previous else ""
            commands.append(f"tunesmith train {recipe}{start} --output-dir {output_dir}")
        previous = output_dir
    if run.record is not None:
        commands.append(f"tunesmith eval {shlex.quote(str(run.path))}")
    return commands


# ---------------------------------------------------------------- provenance


@dataclass(frozen=True)
class ProvenanceView:
    stage: StageData
    rows: tuple[tuple[str, str], ...]  # item, value
    hashes: tuple[tuple[str, str], ...]  # file, sha256


def build_provenance(run: ReportData) -> list[ProvenanceView]:
    views: list[ProvenanceView] = []
    for stage in run.stages:
        hashes = (*_list_input_hashes(stage.input_hashes), *_list_weight_hashes(stage))
        views.append(ProvenanceView(stage, tuple(_list_provenance(stage)), hashes))
    return views


def _list_provenance(stage: StageData) -> list[tuple[str, str]]:
    plan = stage.plan
    machine = plan.machine
    cores = format_count(machine.cores, "core")
    memory = format_bytes(machine.memory_bytes)
    return [
        ("run folder", str(stage.path)),
        ("model", _describe_model(plan)),
        ("machine", f"{machine.device} {machine.device_name}, {cores}, {memory}"),
        *machine.versions.items(),
        ("seed", str(plan.config.seed)),
        ("now", str(plan.config.now)),
    ]


def _describe_model(plan: Plan) -> str:
    size = f"{plan.model.name} ({plan.model.parameters / 1e6:,.1f}M parameters)"
    return f"{size}: {plan.model.origin}" if plan.model.origin else size


def _list_input_hashes(inputs: InputHashes) -> list[tuple[str, str]]:
    """Return name and sha256 of everything that the run depends on."""
    parts = {"tokenizer": inputs.tokenizer, "renderer": inputs.renderer}
    hashes = [(f"base {name}", digest) for name, digest in inputs.base_sha256.items()]
    hashes += [(name, digest) for name, digest in parts.items() if digest]
    hashes += [(f"chat template {name}", digest) for name, digest in inputs.templates.items()]
    return hashes + [(f"rows of {role}", digest) for role, digest in inputs.data.items()]


def _list_weight_hashes(stage: StageData) -> list[tuple[str, str]]:
    weights = find_weights_file(stage.record) if stage.record else None
    if weights is None or not (weights.parent / MANIFEST).is_file():
        return []
    files = read_sealed_files(weights.parent)
    return [(f"{weights.parent.name}/{name}", file.sha256) for name, file in files.items()]
