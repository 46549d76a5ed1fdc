"""What the verbs show to people: facts, decisions and results as tables for the terminal.

In: the frozen objects of types.py. Out: things that `rich` can print. Programs read the JSON
instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.cli.progress import format_interval, format_single_line
from tunesmith.cli.views.forgetting import format_kl_scores, render_scales
from tunesmith.core.atomic import format_bytes
from tunesmith.core.errors import InputError
from tunesmith.core.events import Score
from tunesmith.core.formatting import format_duration, format_rows, format_value
from tunesmith.core.types import Comparison, DataReport, Plan, RunRecord
from tunesmith.evaluate.scale_choice import build_commands
from tunesmith.evaluate.significance import describe_evidence, judge_comparison, judge_comparisons
from tunesmith.plan.hardware_presets import match_preset
from tunesmith.plan.memory_budget import USUAL_MULTIPLES, compute_multiple
from tunesmith.plan.stages import StagedPlan
from tunesmith.session.doctor import Diagnosis

if TYPE_CHECKING:
    from tunesmith.data.group_split import SplitResult
    from tunesmith.evaluate.model_ref import ModelComparison
    from tunesmith.evaluate.regression_gate import Gate
    from tunesmith.export.export import ExportResult
    from tunesmith.plan.method_comparison import MethodEstimate

SOURCE_STYLES = {"you": "bold", "rule": "cyan", "checkpoint": "magenta"}
NO_RESULTS_NOTE = (
    "[yellow]no before and after[/]: the recipe names neither test_data nor retention_data"
)
MAX_STRATA = 20
SCALE_COMMAND_LABELS = ("what is offered, on test_data", "to have it")
LEVEL_STYLES = {"info": "dim", "warn": "yellow", "error": "bold red"}
MAX_ROUNDING_SHARE = 0.1  # of what training changed
ROUNDING_WARNING = (
    "[yellow]warning[/] much of what training changed is lost in this format's rounding: --to peft keeps it, and "
    "--to gguf --type f32"
)


def render_plan(plan: Plan | StagedPlan) -> RenderableType:
    """Every choice with its reason, then what the run will take; of several stages one after the
    other."""
    if isinstance(plan, StagedPlan):
        num_stages = len(plan.plans)
        heads = [
            f"stage {number} of {num_stages}: {stage_plan.config.stage}"
            for number, stage_plan in enumerate(plan.plans, start=1)
        ]
        tables = [render_plan(stage_plan) for stage_plan in plan.plans]
        return Group(*(part for pair in zip(heads, tables, strict=True) for part in pair))
    table = _make_table("Plan", "key", "value", "by", "why")
    for key, plan_value in plan.choices.items():
        source = f" ({plan_value.source})" if plan_value.source else ""
        table.add_row(
            key,
            format_single_line(format_value(plan_value.value)),
            Text(plan_value.decided_by, SOURCE_STYLES[plan_value.decided_by]),
            escape(plan_value.reason + source),
        )
    rows = sum(report.rows for role, report in plan.data.items() if role == "data")
    lines = [f"{plan.steps} steps over {rows:,} rows, {plan.tokens_per_epoch:,} tokens an epoch"]
    if plan.disk_bytes:
        lines[0] += f"; the run folder takes up to {format_bytes(plan.disk_bytes)}"
    if plan.seconds:
        total_text = (
            f" ({format_duration(plan.total_seconds)} with proof and measures)"
            if plan.total_seconds
            else ""
        )
        time_text = (
            f"about {' to '.join(map(format_duration, plan.seconds))} of training{total_text}"
        )
        lines.append(f"{time_text}, {escape(plan.seconds_source)}")
    if "peak" in plan.memory_bytes:
        lines += format_memory(plan)
    lines += [f"[yellow]warning[/] {escape(warning)}" for warning in plan.warnings]
    return Group(table, *lines)


def format_memory(plan: Plan) -> list[str]:
    """What a run takes at its peak and in its parts, beside the usual multiple, and where it would
    fit."""
    peak, method = (
        plan.memory_bytes["peak"],
        plan.config.method if plan.config.method is not None else "lora",
    )
    device_text = "" if match_preset(plan.machine) is None else f" on {plan.machine.device_name}"
    parts = ", ".join(
        f"{name} {format_bytes(num_bytes)}" for name, num_bytes in plan.phase_bytes.items()
    )
    lines = [
        f"memory {format_bytes(peak)} of {format_bytes(plan.machine.available_bytes)} free{device_text}"
        + (f": {parts}" if parts else "")
    ]
    if parts:
        lines.append(
            f"x{compute_multiple(plan.model, peak):.1f} of the weights in 16 bits; as a rule of thumb {method} takes "
            f"{USUAL_MULTIPLES[method]}"
        )
    if plan.fits_on:
        lines.append(
            f"[bold red]does not fit[/]: the smallest machine that would do is {plan.fits_on}"
        )
    return lines


def render_setting(plan: Plan | StagedPlan, key: str) -> RenderableType:
    """All that stands behind one value, in each stage. Raises InputError for a key that the plan
    does not have."""
    if isinstance(plan, StagedPlan):
        return Group(*(render_setting(stage_plan, key) for stage_plan in plan.plans))
    plan_value = plan.choices.get(key.replace("-", "_"))
    if plan_value is None:
        raise InputError(
            f"the plan decides no {key!r:.80}",
            where="--why",
            fix=f"use one of {', '.join(plan.choices)}",
        )
    source_texts = {"you": "you", "rule": "a rule", "checkpoint": "the model's files"}
    confidence_texts = {"": "not claimed: your word, a fact or a convention"}
    table = _make_table(f"{key.replace('-', '_')}: {format_value(plan_value.value)}", numbers=())
    for name, text in (
        ("decided by", source_texts[plan_value.decided_by]),
        ("because", plan_value.reason),
        ("source", plan_value.source or "-"),
        ("usual advice", plan_value.common_advice or "says nothing"),
        ("confidence", confidence_texts.get(plan_value.confidence, plan_value.confidence)),
    ):
        table.add_row(Text(name, "dim"), escape(text))
    return table


def render_method_estimates(estimates: Sequence[MethodEstimate]) -> RenderableType:
    """A column a method, the usual advice in brackets."""
    table = _make_table(
        "Methods; what is usually said in brackets",
        "",
        *(estimate.method for estimate in estimates),
    )
    for name, format_cell in ESTIMATE_ROWS.items():
        table.add_row(Text(name, "dim"), *(escape(format_cell(estimate)) for estimate in estimates))
    return table


def _format_fit(estimate: MethodEstimate) -> str:
    return (
        "fits"
        if estimate.has_enough_memory
        else f"does not fit; the smallest that would do: {estimate.fits_on}"
    )


def _format_seconds(estimate: MethodEstimate) -> str:
    if not (estimate.seconds and estimate.has_enough_memory):
        return "-"
    low, high = (format_duration(seconds) for seconds in estimate.seconds)
    return f"{low} to {high}"


ESTIMATE_ROWS: dict[str, Callable[[Any], str]] = {
    "memory": lambda one: f"{format_bytes(one.peak_bytes)} of {format_bytes(one.free_bytes)} free",
    "": _format_fit,
    "x weights": lambda one: f"x{one.multiple:.2g} ({one.usual_multiple})",
    "learning rate": lambda one: f"{one.learning_rate:g}",
    "trained": lambda one: f"{one.trained_parameters / 1e6:,.1f}M parameters",
    "work": lambda one: f"{one.flops / 1e12:,.0f} TFLOP",
    "time": _format_seconds,
    "speed": lambda one: f"{one.speed} ({one.usual_speed})",
    "forgetting": lambda one: f"{one.risk} ({one.usual_risk})",
    "deployment": lambda one: f"{one.deployment} ({one.usual_deployment})",
    "leaves": lambda one: format_bytes(one.result_bytes),
    "run folder": lambda one: f"up to {format_bytes(one.disk_bytes)}",
}


def render_comparisons(
    comparisons: Sequence[Comparison], names: tuple[str, str] = ("before", "after")
) -> RenderableType:
    """Two models on the same items, with 95% intervals; the last column says what may be
    concluded."""
    columns = ("measure", "n", *names, "change", "")
    table = _make_table(
        f"{names[0].capitalize()} and {names[1]}, 95% intervals", *columns, numbers=columns[1:5]
    )
    for comparison, verdict_text in zip(comparisons, judge_comparisons(comparisons), strict=True):
        before, after = comparison.before, comparison.after
        table.add_row(
            escape(f"{comparison.task} {comparison.metric}")
            + ("" if comparison.higher_is_better else " (lower is better)"),
            str(after.n),
            format_interval(before.value, before.low, before.high),
            format_interval(after.value, after.low, after.high),
            format_interval(comparison.difference, comparison.low, comparison.high),
            format_verdict(comparison, verdict_text),
        )
    return table


def render_scores(scores: Sequence[Score]) -> RenderableType:
    """What was measured of one model."""
    table = _make_table("Scores, 95% intervals", "measure", "n", "value", numbers=("n", "value"))
    for score in scores:
        table.add_row(
            escape(f"{score.task} {score.metric}"),
            str(score.n),
            format_interval(score.value, score.low, score.high),
        )
    return table


def render_model_comparison(comparison: ModelComparison) -> RenderableType:
    """Two models side by side, and what could not be compared."""
    table = render_comparisons(comparison.comparisons, names=("A", "B"))
    heads = [escape(f"A: {comparison.first}"), escape(f"B: {comparison.second}")]
    return Group(*heads, table, *(f"[yellow]{escape(note)}[/]" for note in comparison.notes))


def render_gates(gates: Sequence[Gate]) -> RenderableType:
    """Each gate with its numbers."""
    table = _make_table("Gates", "", "gate", "change")
    for gate in gates:
        mark = Text("passed", "green") if gate.passed else Text("failed", "bold red")
        table.add_row(mark, escape(gate.name), escape(gate.message))
    return table


def render_baselines(baselines: Mapping[str, Sequence[Comparison]]) -> RenderableType:
    """What costs no training, measure by measure, and how the trained model differs from it."""
    columns = ("measure", "n", "model", "value", "trained minus it", "")
    table = _make_table(
        "Beside what costs no training, 95% intervals",
        *columns,
        numbers=("n", "value", "trained minus it"),
    )
    for rows in zip(*baselines.values(), strict=True):
        first, after = rows[0], rows[0].after
        for name, row in zip(baselines, rows, strict=True):
            value = format_interval(row.before.value, row.before.low, row.before.high)
            change = format_interval(row.difference, row.low, row.high)
            labels = (
                (escape(f"{first.task}, {first.metric}"), str(after.n))
                if row is first
                else ("", "")
            )
            table.add_row(*labels, name, value, change, format_verdict(row))
        table.add_row(
            "", "", "trained", format_interval(after.value, after.low, after.high), "", ""
        )
    return table


def format_verdict(comparison: Comparison, verdict_text: str = "") -> Text:
    """What may be concluded, coloured, and what stands behind it. `told`: the verdict as one of
    several."""
    verdict_text = verdict_text or judge_comparison(comparison)
    style = {"better": "bold green", "worse": "bold red"}.get(verdict_text, "dim")
    evidence_text = describe_evidence(comparison)
    return Text.assemble((verdict_text, style), f" ({evidence_text})" if evidence_text else "")


def render_run_record(record: RunRecord) -> RenderableType:
    """What a run came to: the table, answers side by side, and where the adapter is."""
    parts: list[RenderableType] = [
        NO_RESULTS_NOTE if not record.comparisons else render_comparisons(record.comparisons)
    ]
    parts += format_kl_scores(record.kl_scores)
    if record.scales:
        parts.append(render_scales(record.scales))
    for before, after in record.samples:
        answer_table = _make_table(format_single_line(before.id))
        for name, text in (
            ("expected", after.expected),
            ("before", before.answer),
            ("after", after.answer),
        ):
            if name == "expected" and not text:
                continue
            answer_table.add_row(Text(name, "dim"), format_single_line(text, 400))
        parts.append(answer_table)
    speed = record.tokens / max(record.train_seconds, 1e-9)
    if "rehearsal" in record.task_tokens or record.plan.config.rehearsal_ratio is not None:
        parts.append(format_rehearsal(record))
    if record.plan.data["data"].task_rows:
        parts.append(format_tasks(record))
    if record.shared_tokens:
        parts.append(format_shared_prefixes(record))
    predicted = record.plan.memory_bytes["peak"] / 1e9
    memory_text = f"peak {format_bytes(record.peak_bytes)} ({predicted:.1f} predicted)"
    parts.append(f"{record.steps} steps, {speed:,.0f} tokens/s, {memory_text}")
    parts.append(f"adapter: {escape(record.adapter)}")
    for label, command in zip(
        SCALE_COMMAND_LABELS,
        build_commands(record.scales, str(Path(record.adapter).parent)),
        strict=False,
    ):
        parts.append(f"{label}: {escape(command)}")
    return Group(*parts)


def format_rehearsal(record: RunRecord) -> str:
    """How much was rehearsed, beside what was planned."""
    tokens = record.task_tokens.get("rehearsal", 0)
    text = (
        f"rehearsal: {tokens:,} of {record.tokens:,} tokens, {tokens / max(1, record.tokens):.1%}"
    )
    if record.plan.config.rehearsal_ratio is None:  # of an earlier stage
        return text
    plan_text = "adaptive, began with" if record.plan.config.rehearsal_margin is not None else "planned"
    return f"{text} ({plan_text} {record.plan.config.rehearsal_ratio:.1%})"


def format_tasks(record: RunRecord) -> str:
    """What was trained of each task, rehearsal aside."""
    tokens = {task: record.task_tokens.get(task, 0) for task in record.plan.data["data"].task_rows}
    total = max(1, sum(tokens.values()))
    return "tasks: " + ", ".join(
        f"{task} {count:,} tokens ({count / total:.0%})" for task, count in tokens.items()
    )


def format_shared_prefixes(record: RunRecord) -> str:
    """What sharing prefixes saved."""
    share = record.shared_tokens / record.tokens
    return f"shared prefixes: {record.shared_tokens:,} of {record.tokens:,} tokens were not computed again, {share:.1%}"


def render_export(export: ExportResult) -> RenderableType:
    """The files, and how near they are to the run."""
    parity = export.parity
    table = _make_table(
        f"{export.target} {export.type}".strip(), "file", "size", "sha256", numbers=("size",)
    )
    for file in export.files:
        table.add_row(escape(file.name), format_bytes(file.bytes), Text(file.sha256[:12], "dim"))
    bases_text = ", ".join(f"{base} {kl:.1e}" for base, kl in export.base.mean_kl.items())
    return Group(
        table,
        *([f"the adapter times {export.scale:g}"] if export.scale != 1 else []),
        *(
            [
                f"merged into the {export.base.base} weights; mean KL to the run with each: {bases_text}"
            ]
            if bases_text
            else []
        ),
        f"{parity.same_prompts} of {parity.rendered_prompts} prompts render to the same tokens, "
        f"{parity.same_answers} of {parity.prompts} greedy answers are the same",
        f"KL to the run {parity.mean_kl:.1e}, at most {parity.max_kl:.1e} at one place"
        + ("" if parity.trained_kl is None else f" (training moved it by {parity.trained_kl:.1e})"),
        *(
            [ROUNDING_WARNING]
            if parity.trained_kl and parity.mean_kl > MAX_ROUNDING_SHARE * parity.trained_kl
            else []
        ),
        f"likeliest token the same at {parity.top1_agreement:.1%} of {parity.positions} places, logits differ by at most "
        f"{parity.max_logit_difference:.2g}",
        escape(export.path),
    )


def render_data(reports: Mapping[str, DataReport]) -> RenderableType:
    """One line of numbers a role, then what was found in it."""
    columns = (
        "role",
        "format",
        "rows",
        "documents",
        "tokens",
        "trained",
        "dropped",
        "truncated",
        "median",
        "longest",
    )
    table = _make_table("Data", *columns, numbers=columns[2:])
    for role, report in reports.items():
        lengths = report.length_percentiles
        numbers = (report.rows, report.documents, report.tokens, report.supervised_tokens)
        counts = (
            *numbers,
            sum(report.dropped.values()),
            report.truncated,
            lengths.get("p50", 0),
            lengths.get("max", 0),
        )
        table.add_row(role, report.format, *(f"{count:,}" for count in counts))
    findings = [
        f"[{LEVEL_STYLES[finding.level]}]{finding.level}[/] {role} {finding.check}: {escape(finding.message)}"
        + (f" [dim]{escape(format_rows(finding))}[/]" if finding.rows else "")
        + (f"\n     {escape(finding.fix)}" if finding.fix else "")
        for role, report in reports.items()
        for finding in report.findings
    ]
    tasks = [
        f"{role} {task}: {rows:,} rows, {report.task_tokens.get(task, 0):,} tokens"
        for role, report in reports.items()
        for task, rows in report.task_rows.items()
    ]
    reasons = dict.fromkeys(
        f"[dim]{report.format}: {escape(report.format_reason)}[/]" for report in reports.values()
    )
    return Group(table, *tasks, *reasons, *findings)


def render_split(split: SplitResult) -> RenderableType:
    """How many rows each file has, and of each stratum."""
    table = _make_table("Rows", "file", "rows", "groups", numbers=("rows", "groups"))
    for side, rows in split.rows.items():
        table.add_row(f"{side}.jsonl", f"{rows:,}", f"{split.groups[side]:,}")
    strata = _make_table("", "stratum", *split.rows, numbers=tuple(split.rows))
    for name, counts in list(split.strata.items())[:MAX_STRATA]:
        strata.add_row(format_single_line(name, 40), *(f"{counts[side]:,}" for side in split.rows))
    parts: list[RenderableType] = [table, *([strata] if split.strata else [])]
    if split.skipped_rows:
        parts.append(
            f"[yellow]{split.skipped_rows:,} rows are in none of them[/]: `tunesmith data check` says why"
        )
    if not split.has_near_check:
        parts.append(
            "[yellow]near duplicates were not looked for[/]: pip install 'tunesmith\\[audit]'"
        )
    return Group(*parts, escape(split.path))


def render_diagnosis(diagnosis: Diagnosis) -> RenderableType:
    """The machine, what was checked on it, and what fits."""
    machine = diagnosis.machine
    head = (
        f"{machine.device} {machine.device_name}: {machine.cores} cores, {format_bytes(machine.available_bytes)} of "
        f"{format_bytes(machine.memory_bytes)} memory free, {format_bytes(machine.disk_free_bytes)} disk free"
    )
    table = _make_table("")
    for check in diagnosis.checks:
        mark = (
            Text("ok", "green")
            if check.is_ok
            else Text("missing", "bold red" if check.is_required else "yellow")
        )
        table.add_row(
            mark, check.name, escape(check.value), "" if check.is_ok else escape(check.fix)
        )
    parts: list[RenderableType] = [escape(head), table]
    if model := diagnosis.model:
        parts.append(
            escape(f"model {model.name}: {model.parameters / 1e6:.0f}M parameters in {model.path}")
        )
    for fit in diagnosis.memory_fits:
        fit_text = "[green]fits[/]" if fit.has_enough_memory else "[red]does not fit[/]"
        parts.append(f"{fit.method}: about {format_bytes(fit.needed_bytes)}, {fit_text}")
    return Group(*parts)


def _make_table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, show_header=bool(columns)
    )
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table
