"""What stands behind a run: its data, its plan, its cost beside the prediction, how to do it again,
and its provenance.

In: a Story. Out: sections. Several stages stand one after the other.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from tunesmith.core.atomic import MANIFEST, format_bytes
from tunesmith.core.formatting import format_duration, format_rows, format_value
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import RECIPE_FILE
from tunesmith.core.types import DataReport, Json, Plan
from tunesmith.report.html import (
    Content,
    Html,
    escape_plain,
    join_html,
    make_details,
    make_section,
    make_table,
    make_tag,
    quote_text,
)
from tunesmith.report.run_data import ReportData, StageData
from tunesmith.report.summary import find_weights_file

SOURCE_LABELS = {"you": "you", "rule": "a rule", "checkpoint": "the model"}


def _render_stages(story: ReportData, render_stage: Any) -> list[Content]:
    """Of every stage, under its name where there are several."""
    return [
        [make_tag("h3", "Stage ", quote_text(part.name)) if part.name else None, render_stage(part)]
        for part in story.stages
    ]


# ---------------------------------------------------------------- data


def render_data(story: ReportData) -> Html:
    return make_section("data", "Data", _render_stages(story, _render_stage_data))


def _render_stage_data(part: StageData) -> Html:
    head = [
        "Role",
        "Format",
        "Rows",
        "Documents",
        "Tokens",
        "Trained",
        "Left out",
        "Cut",
        "Median",
        "Longest",
    ]
    reports = part.plan.data
    counts = make_table(
        head,
        [_format_counts(*item) for item in reports.items()],
        numbers=range(2, 10),
        label="Rows of each role",
    )
    role_findings = [
        (role, finding) for role, report in reports.items() for finding in report.findings
    ]
    findings = [
        make_tag(
            "li",
            *(
                make_tag("b", finding.level, class_=f"level {finding.level}"),
                f" {role}, ",
                quote_text(finding.check),
                ": ",
            ),
            quote_text(finding.message),
            make_tag("span", " ", quote_text(format_rows(finding)), class_="soft")
            if finding.rows
            else None,
            make_tag("div", quote_text(finding.fix), class_="soft") if finding.fix else None,
        )
        for role, finding in role_findings
    ]
    summary = (
        make_tag("ul", findings, class_="findings")
        if role_findings
        else make_tag("p", "The check of the rows found nothing to say.")
    )
    return join_html(counts, summary, _render_reasons(reports), _render_tasks(reports))


def _format_counts(role: str, report: DataReport) -> list[Content]:
    lengths, num_dropped = (
        report.length_percentiles,
        sum(report.dropped.values()) + sum(report.rejected.values()),
    )
    numbers = (
        report.rows,
        report.documents,
        report.tokens,
        report.supervised_tokens,
        num_dropped,
        report.truncated,
    )
    more = (lengths.get("p50", 0), lengths.get("max", 0))
    where = make_tag("span", quote_text(report.path.rpartition("/")[2]), class_="under")
    return [[role, where], quote_text(report.format), *(f"{number:,}" for number in numbers + more)]


def _render_reasons(reports: Mapping[str, DataReport]) -> Html | None:
    rows = [
        [role, word, quote_text(reason), f"{count:,}"]
        for role, report in reports.items()
        for word, counts in (
            ("no document", report.dropped),
            ("not used", report.rejected),
            ("breaks a constraint, left out", report.filtered),
            ("breaks a constraint, trained away from", report.banned),
        )
        for reason, count in counts.items()
    ]
    head = ["Role", "Rows that are", "Why", "Rows"]
    return (
        make_details(
            "Rows that are not trained as they are",
            make_table(head, rows, numbers=(3,), label="Why"),
        )
        if rows
        else None
    )


def _render_tasks(reports: Mapping[str, DataReport]) -> Html | None:
    rows = [
        [quote_text(task), role, f"{count:,}", f"{report.task_tokens.get(task, 0):,}"]
        for role, report in reports.items()
        for task, count in report.task_rows.items()
    ]
    head = ["Task", "Role", "Rows", "Tokens"]
    return (
        make_details("Tasks", make_table(head, rows, numbers=(2, 3), label="Rows of each task"))
        if rows
        else None
    )


# ---------------------------------------------------------------- plan


def render_plan(story: ReportData) -> Html:
    note = make_tag("p", "Every value that the run obeyed, who decided it, and why.", class_="note")
    return make_section(
        "plan", "Plan", note, _render_stages(story, lambda part: _build_plan_table(part.plan))
    )


def _build_plan_table(plan: Plan) -> Html:
    rows = [
        [
            quote_text(key),
            quote_text(format_value(choice.value), "code"),
            make_tag("span", SOURCE_LABELS[choice.decided_by], class_=f"by {choice.decided_by}"),
            [
                quote_text(choice.reason),
                make_tag("div", "usual advice: ", quote_text(choice.common_advice), class_="soft")
                if choice.common_advice
                else None,
            ],
            [
                quote_text(choice.source),
                make_tag("div", choice.confidence, class_="soft") if choice.confidence else None,
            ],
        ]
        for key, choice in plan.choices.items()
    ]
    return make_table(["Key", "Value", "By", "Why", "Source"], rows, label="The plan")


# ---------------------------------------------------------------- cost


def render_cost(story: ReportData) -> Html | None:
    """Memory and speed beside what was predicted before the run."""
    rows = [row for part in story.stages for row in _build_cost_rows(part)]
    if not rows:
        return None
    head = ["What", "Predicted", "Measured", "Measured / predicted"]
    parts = _render_stages(story, _render_memory)
    return make_section(
        "cost",
        "Memory and speed",
        make_table(head, rows, numbers=(1, 2, 3), label="Memory and speed"),
        parts,
    )


def _build_cost_rows(part: StageData) -> list[list[Content]]:
    steps, plan = part.select_events("step"), part.plan
    if not steps:
        return []
    name: list[Content] = [" of ", quote_text(part.name)] if part.name else []
    seconds, tokens = sum(step["seconds"] for step in steps), sum(step["tokens"] for step in steps)
    peak, predicted = max(step["peak_bytes"] for step in steps), plan.memory_bytes.get("peak")
    rows: list[list[Content]] = [
        [
            ["Memory at the peak", *name],
            format_bytes(predicted) if predicted else "-",
            format_bytes(peak),
            f"{peak / predicted:.2f}" if predicted else "-",
        ]
    ]
    is_complete = len(steps) >= plan.steps and plan.seconds
    middle = (min(plan.seconds) + max(plan.seconds)) / 2 if is_complete else 0
    rows.append(
        [
            ["Time of training", *name],
            " to ".join(map(format_duration, plan.seconds)) or "-",
            format_duration(seconds),
            f"{seconds / middle:.2f}" if middle else "-",
        ]
    )
    rows.append([["Tokens a second", *name], "-", f"{tokens / max(seconds, 1e-9):,.0f}", "-"])
    return rows


def _render_memory(part: StageData) -> Html | None:
    predicted_bytes = {
        **part.plan.phase_bytes,
        **{k: v for k, v in part.plan.memory_bytes.items() if k != "peak"},
    }
    rows = [
        [quote_text(name), format_bytes(size_bytes)]
        for name, size_bytes in predicted_bytes.items()
        if size_bytes
    ]
    inner = make_table(["Part", "Predicted"], rows, numbers=(1,), label="Predicted memory")
    note = (
        make_tag("p", "Time: ", quote_text(part.plan.seconds_source), class_="note")
        if part.plan.seconds_source
        else None
    )
    return make_details("What the prediction is made of", inner, note) if rows else None


# ---------------------------------------------------------------- again


def render_reproduction(story: ReportData) -> Html:
    """A stage goes on with the adapter of the one before."""
    lines: list[str] = []
    for number, part in enumerate(story.stages):
        if part.recipe:
            output_dir = f"runs/again/{part.name}".rstrip("/")
            start = f" --adapter-from runs/again/{story.stages[number - 1].name}" if number else ""
            lines.append(
                f"tunesmith train {shlex.quote(str(part.path / RECIPE_FILE))}{start} --output-dir {output_dir}"
            )
    if story.record is not None:
        lines.append(f"tunesmith eval {shlex.quote(str(story.path))}")
    exact = (
        "From the same files and libraries, with as many threads of the same processor, the weights come out the same "
        "to the bit. Other processors and threads round differently, and nothing else changes."
    )
    recipes = _render_stages(
        story,
        lambda part: (
            make_details("recipe.yaml", quote_text(part.recipe, "pre")) if part.recipe else None
        ),
    )
    commands = make_tag("pre", "\n".join(escape_plain(line) for line in lines))
    return make_section(
        "again", "How to reproduce", commands, make_tag("p", exact, class_="note"), recipes
    )


# ---------------------------------------------------------------- provenance


def render_provenance(story: ReportData) -> Html:
    parts = _render_stages(story, _build_provenance_table)
    return make_section("provenance", "Provenance", parts, _render_preflight(story))


def _build_provenance_table(part: StageData) -> Html:
    machine = part.plan.machine
    rows: list[tuple[str, Content]] = [
        ("run folder", str(part.path)),
        ("model", _describe_model(part.plan)),
    ]
    rows += [(name, value) for name, value in _collect_hashes(part.identity)]
    if part.record is not None and (weights := find_weights_file(part.record)) is not None:
        files = (
            read_json(weights.parent / MANIFEST).get("files", {})
            if (weights.parent / MANIFEST).is_file()
            else {}
        )
        rows += [
            (f"{weights.parent.name}/{name}", entry["sha256"]) for name, entry in files.items()
        ]
    rows.append(
        (
            "machine",
            f"{machine.device} {machine.device_name}, {machine.cores} cores, {format_bytes(machine.memory_bytes)}",
        )
    )
    rows += [(name, version) for name, version in machine.versions.items()]
    rows += [
        (name, format_value(part.plan[name]))
        for name in ("seed", "now")
        if name in part.plan.choices
    ]
    cells = [[quote_text(name), make_tag("code", value, dir="auto")] for name, value in rows]
    return make_table(["What", "Which"], cells, label="Provenance")


def _describe_model(plan: Plan) -> str:
    return f"{plan.model.name} ({plan.model.parameters / 1e6:,.1f}M parameters)" + (
        f": {plan.model.origin}" if plan.model.origin else ""
    )


def _collect_hashes(identity: Json) -> list[tuple[str, str]]:
    """sha256 of what the run stands on."""
    hashes = [(f"base {name}", value) for name, value in identity.get("base_sha256", {}).items()]
    hashes += [(name, identity[name]) for name in ("tokenizer", "renderer") if name in identity]
    hashes += [
        (f"chat template {name}", value) for name, value in identity.get("templates", {}).items()
    ]
    return hashes + [(f"rows of {role}", value) for role, value in identity.get("data", {}).items()]


def _render_preflight(story: ReportData) -> Html | None:
    proof = story.record.preflight if story.record else ()
    rows = [
        [
            quote_text(check.kind),
            make_tag("b", check.level, class_=f"level {check.level}"),
            quote_text(check.evidence),
        ]
        for check in proof
    ]
    return (
        make_details(
            "Proven before training",
            make_table(["Check", "Level", "Evidence"], rows, label="Proof"),
        )
        if rows
        else None
    )
