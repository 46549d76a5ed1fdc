"""What the verbs show to people: facts, decisions and results as tables for the terminal.

In: the frozen objects of types.py. Out: things that `rich` can print. Programs read the JSON instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.cli.progress import interval, one_line
from tunesmith.cli.views.forgetting import moved_lines, scale_table
from tunesmith.core.atomic import size
from tunesmith.core.errors import InputError
from tunesmith.core.events import Score
from tunesmith.core.formatting import duration, some_rows, value_text
from tunesmith.core.types import Comparison, DataReport, Plan, RunRecord
from tunesmith.evaluate.scale_choice import commands
from tunesmith.evaluate.significance import evidence, verdict, verdicts
from tunesmith.plan.hardware_presets import target_of
from tunesmith.plan.memory_budget import MULTIPLES, multiple
from tunesmith.plan.stages import StagedPlan
from tunesmith.session.doctor import Diagnosis

if TYPE_CHECKING:
    from tunesmith.data.group_split import Divided
    from tunesmith.evaluate.model_ref import Compared
    from tunesmith.evaluate.regression_gate import Gate
    from tunesmith.export.targets import Exported
    from tunesmith.plan.method_comparison import Outlook

BY_STYLES = {"you": "bold", "rule": "cyan", "checkpoint": "magenta"}
UNMEASURED = "[yellow]no before and after[/]: the recipe names neither test_data nor retention_data"
MOST_STRATA = 20
OFFER = ("what is offered, on test_data", "to have it")
LEVEL_STYLES = {"info": "dim", "warn": "yellow", "error": "bold red"}
MUCH = 0.1  # of what training changed
LOST = (
    "[yellow]warning[/] much of what training changed is lost in this format's rounding: --to peft keeps it, and "
    "--to gguf --type f32"
)


def plan_table(plan: Plan | StagedPlan) -> RenderableType:
    """Every choice with its reason, then what the run will take; of several stages one after the other."""
    if isinstance(plan, StagedPlan):
        of = len(plan.plans)
        heads = [f"stage {n} of {of}: {one['stage']}" for n, one in enumerate(plan.plans, start=1)]
        tables = [plan_table(one) for one in plan.plans]
        return Group(*(part for pair in zip(heads, tables, strict=True) for part in pair))
    table = _table("Plan", "key", "value", "by", "why")
    for key, choice in plan.choices.items():
        source = f" ({choice.source})" if choice.source else ""
        table.add_row(
            key, one_line(value_text(choice.value)), Text(choice.by, BY_STYLES[choice.by]), escape(choice.why + source)
        )
    rows = sum(report.rows for role, report in plan.data.items() if role == "data")
    lines = [f"{plan.steps} steps over {rows:,} rows, {plan.tokens_per_epoch:,} tokens an epoch"]
    if plan.disk_bytes:
        lines[0] += f"; the run folder takes up to {size(plan.disk_bytes)}"
    if plan.seconds:
        whole = f" ({duration(plan.whole_seconds)} with proof and measures)" if plan.whole_seconds else ""
        training = f"about {' to '.join(map(duration, plan.seconds))} of training{whole}"
        lines.append(f"{training}, {escape(plan.seconds_from)}")
    if "peak" in plan.memory_bytes:
        lines += memory_lines(plan)
    lines += [f"[yellow]warning[/] {escape(warning)}" for warning in plan.warnings]
    return Group(table, *lines)


def memory_lines(plan: Plan) -> list[str]:
    """What a run takes at its peak and in its parts, beside the usual multiple, and where it would fit."""
    peak, method = plan.memory_bytes["peak"], plan.choices["method"].value if "method" in plan.choices else "lora"
    where = "" if target_of(plan.machine) is None else f" on {plan.machine.device_name}"
    parts = ", ".join(f"{name} {size(held)}" for name, held in plan.phase_bytes.items())
    lines = [
        f"memory {size(peak)} of {size(plan.machine.available_bytes)} free{where}" + (f": {parts}" if parts else "")
    ]
    if parts:
        lines.append(
            f"x{multiple(plan.model, peak):.1f} of the weights in 16 bits; as a rule of thumb {method} takes "
            f"{MULTIPLES[method]}"
        )
    if plan.fits_on:
        lines.append(f"[bold red]does not fit[/]: the smallest machine that would do is {plan.fits_on}")
    return lines


def choice_view(plan: Plan | StagedPlan, key: str) -> RenderableType:
    """All that stands behind one value, in each stage. Raises InputError for a key that the plan does not have."""
    if isinstance(plan, StagedPlan):
        return Group(*(choice_view(one, key) for one in plan.plans))
    choice = plan.choices.get(key.replace("-", "_"))
    if choice is None:
        raise InputError(f"the plan decides no {key!r:.80}", where="--why", fix=f"use one of {', '.join(plan.choices)}")
    deciders = {"you": "you", "rule": "a rule", "checkpoint": "the model's files"}
    sure = {"": "not claimed: your word, a fact or a convention"}
    table = _table(f"{key.replace('-', '_')}: {value_text(choice.value)}", numbers=())
    for name, text in (
        ("decided by", deciders[choice.by]),
        ("because", choice.why),
        ("source", choice.source or "-"),
        ("usual advice", choice.advice or "says nothing"),
        ("confidence", sure.get(choice.confidence, choice.confidence)),
    ):
        table.add_row(Text(name, "dim"), escape(text))
    return table


def outlook_table(methods: Sequence[Outlook]) -> RenderableType:
    """A column a method, the usual advice in brackets."""
    table = _table("Methods; what is usually said in brackets", "", *(one.method for one in methods))
    for name, cell in OUTLOOK_ROWS.items():
        table.add_row(Text(name, "dim"), *(escape(cell(one)) for one in methods))
    return table


def _room(one: Outlook) -> str:
    return "fits" if one.fits else f"does not fit; the smallest that would do: {one.fits_on}"


def _seconds(one: Outlook) -> str:
    if not (one.seconds and one.fits):
        return "-"
    low, high = (duration(seconds) for seconds in one.seconds)
    return f"{low} to {high}"


OUTLOOK_ROWS: dict[str, Callable[[Any], str]] = {
    "memory": lambda one: f"{size(one.peak_bytes)} of {size(one.free_bytes)} free",
    "": _room,
    "x weights": lambda one: f"x{one.multiple:.2g} ({one.usual_multiple})",
    "learning rate": lambda one: f"{one.learning_rate:g}",
    "trained": lambda one: f"{one.trained_parameters / 1e6:,.1f}M parameters",
    "work": lambda one: f"{one.flops / 1e12:,.0f} TFLOP",
    "time": _seconds,
    "speed": lambda one: f"{one.speed} ({one.usual_speed})",
    "forgetting": lambda one: f"{one.risk} ({one.usual_risk})",
    "deployment": lambda one: f"{one.deployment} ({one.usual_deployment})",
    "leaves": lambda one: size(one.result_bytes),
    "run folder": lambda one: f"up to {size(one.disk_bytes)}",
}


def comparison_table(comparisons: Sequence[Comparison], names: tuple[str, str] = ("before", "after")) -> RenderableType:
    """Two models on the same items, with 95% intervals; the last column says what may be concluded."""
    columns = ("measure", "n", *names, "change", "")
    table = _table(f"{names[0].capitalize()} and {names[1]}, 95% intervals", *columns, numbers=columns[1:5])
    for one, told in zip(comparisons, verdicts(comparisons), strict=True):
        before, after = one.before, one.after
        table.add_row(
            escape(f"{one.task} {one.metric}") + ("" if one.higher_is_better else " (lower is better)"),
            str(after.n),
            interval(before.value, before.low, before.high),
            interval(after.value, after.low, after.high),
            interval(one.difference, one.low, one.high),
            outcome(one, told),
        )
    return table


def score_table(scores: Sequence[Score]) -> RenderableType:
    """What was measured of one model."""
    table = _table("Scores, 95% intervals", "measure", "n", "value", numbers=("n", "value"))
    for one in scores:
        table.add_row(escape(f"{one.task} {one.metric}"), str(one.n), interval(one.value, one.low, one.high))
    return table


def compared_view(compared: Compared) -> RenderableType:
    """Two models side by side, and what could not be compared."""
    table = comparison_table(compared.comparisons, names=("A", "B"))
    heads = [escape(f"A: {compared.a}"), escape(f"B: {compared.b}")]
    return Group(*heads, table, *(f"[yellow]{escape(note)}[/]" for note in compared.notes))


def gate_table(gates: Sequence[Gate]) -> RenderableType:
    """Each gate with its numbers."""
    table = _table("Gates", "", "gate", "change")
    for gate in gates:
        mark = Text("passed", "green") if gate.passed else Text("failed", "bold red")
        table.add_row(mark, escape(gate.name), escape(gate.said))
    return table


def baseline_table(baselines: Mapping[str, Sequence[Comparison]]) -> RenderableType:
    """What costs no training, measure by measure, and how the trained model differs from it."""
    columns = ("measure", "n", "model", "value", "trained minus it", "")
    table = _table("Beside what costs no training, 95% intervals", *columns, numbers=("n", "value", "trained minus it"))
    for rows in zip(*baselines.values(), strict=True):
        one, after = rows[0], rows[0].after
        for name, row in zip(baselines, rows, strict=True):
            value = interval(row.before.value, row.before.low, row.before.high)
            change = interval(row.difference, row.low, row.high)
            head = (escape(f"{one.task}, {one.metric}"), str(after.n)) if row is one else ("", "")
            table.add_row(*head, name, value, change, outcome(row))
        table.add_row("", "", "trained", interval(after.value, after.low, after.high), "", "")
    return table


def outcome(comparison: Comparison, told: str = "") -> Text:
    """What may be concluded, coloured, and what stands behind it. `told`: the verdict as one of several."""
    told = told or verdict(comparison)
    style = {"better": "bold green", "worse": "bold red"}.get(told, "dim")
    behind = evidence(comparison)
    return Text.assemble((told, style), f" ({behind})" if behind else "")


def record_view(record: RunRecord) -> RenderableType:
    """What a run came to: the table, answers side by side, and where the adapter is."""
    parts: list[RenderableType] = [UNMEASURED if not record.comparisons else comparison_table(record.comparisons)]
    parts += moved_lines(record.moved)
    if record.scales:
        parts.append(scale_table(record.scales))
    for before, after in record.samples:
        answers = _table(one_line(before.id))
        for name, text in (("expected", after.expected), ("before", before.answer), ("after", after.answer)):
            if name == "expected" and not text:
                continue
            answers.add_row(Text(name, "dim"), one_line(text, 400))
        parts.append(answers)
    speed = record.tokens / max(record.train_seconds, 1e-9)
    if "rehearsal" in record.task_tokens or "rehearsal_ratio" in record.plan.choices:
        parts.append(rehearsal_line(record))
    if record.plan.data["data"].task_rows:
        parts.append(tasks_line(record))
    if record.shared_tokens:
        parts.append(shared_line(record))
    predicted = record.plan.memory_bytes["peak"] / 1e9
    measured = f"peak {size(record.peak_bytes)} ({predicted:.1f} predicted)"
    parts.append(f"{record.steps} steps, {speed:,.0f} tokens/s, {measured}")
    parts.append(f"adapter: {escape(record.adapter)}")
    for does, way in zip(OFFER, commands(record.scales, str(Path(record.adapter).parent)), strict=False):
        parts.append(f"{does}: {escape(way)}")
    return Group(*parts)


def rehearsal_line(record: RunRecord) -> str:
    """How much was rehearsed, beside what was planned."""
    tokens = record.task_tokens.get("rehearsal", 0)
    said = f"rehearsal: {tokens:,} of {record.tokens:,} tokens, {tokens / max(1, record.tokens):.1%}"
    if "rehearsal_ratio" not in record.plan.choices:  # of an earlier stage
        return said
    plan = "adaptive, began with" if "rehearsal_margin" in record.plan.choices else "planned"
    return f"{said} ({plan} {record.plan['rehearsal_ratio']:.1%})"


def tasks_line(record: RunRecord) -> str:
    """What was trained of each task, rehearsal aside."""
    tokens = {task: record.task_tokens.get(task, 0) for task in record.plan.data["data"].task_rows}
    total = max(1, sum(tokens.values()))
    return "tasks: " + ", ".join(f"{task} {count:,} tokens ({count / total:.0%})" for task, count in tokens.items())


def shared_line(record: RunRecord) -> str:
    """What sharing prefixes saved."""
    share = record.shared_tokens / record.tokens
    return f"shared prefixes: {record.shared_tokens:,} of {record.tokens:,} tokens were not computed again, {share:.1%}"


def export_view(made: Exported) -> RenderableType:
    """The files, and how near they are to the run."""
    parity = made.parity
    table = _table(f"{made.target} {made.type}".strip(), "file", "size", "sha256", numbers=("size",))
    for file in made.files:
        table.add_row(escape(file.name), size(file.bytes), Text(file.sha256[:12], "dim"))
    bases = ", ".join(f"{base} {kl:.1e}" for base, kl in made.base.mean_kl.items())
    return Group(
        table,
        *([f"the adapter times {made.scale:g}"] if made.scale != 1 else []),
        *([f"merged into the {made.base.base} weights; mean KL to the run with each: {bases}"] if bases else []),
        f"{parity.same_prompts} of {parity.rendered_prompts} prompts render to the same tokens, "
        f"{parity.same_answers} of {parity.prompts} greedy answers are the same",
        f"KL to the run {parity.mean_kl:.1e}, at most {parity.max_kl:.1e} at one place"
        + ("" if parity.trained_kl is None else f" (training moved it by {parity.trained_kl:.1e})"),
        *([LOST] if parity.trained_kl and parity.mean_kl > MUCH * parity.trained_kl else []),
        f"likeliest token the same at {parity.top1_agreement:.1%} of {parity.places} places, logits differ by at most "
        f"{parity.max_logit_difference:.2g}",
        escape(made.path),
    )


def data_view(reports: Mapping[str, DataReport]) -> RenderableType:
    """One line of numbers a role, then what was found in it."""
    columns = ("role", "format", "rows", "documents", "tokens", "trained", "dropped", "truncated", "median", "longest")
    table = _table("Data", *columns, numbers=columns[2:])
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
        + (f" [dim]{escape(some_rows(finding))}[/]" if finding.rows else "")
        + (f"\n     {escape(finding.fix)}" if finding.fix else "")
        for role, report in reports.items()
        for finding in report.findings
    ]
    tasks = [
        f"{role} {task}: {rows:,} rows, {report.task_tokens.get(task, 0):,} tokens"
        for role, report in reports.items()
        for task, rows in report.task_rows.items()
    ]
    reasons = dict.fromkeys(f"[dim]{report.format}: {escape(report.why_format)}[/]" for report in reports.values())
    return Group(table, *tasks, *reasons, *findings)


def divided_view(divided: Divided) -> RenderableType:
    """How many rows each file has, and of each stratum."""
    table = _table("Rows", "file", "rows", "groups", numbers=("rows", "groups"))
    for side, rows in divided.rows.items():
        table.add_row(f"{side}.jsonl", f"{rows:,}", f"{divided.groups[side]:,}")
    strata = _table("", "stratum", *divided.rows, numbers=tuple(divided.rows))
    for name, counts in list(divided.strata.items())[:MOST_STRATA]:
        strata.add_row(one_line(name, 40), *(f"{counts[side]:,}" for side in divided.rows))
    parts: list[RenderableType] = [table, *([strata] if divided.strata else [])]
    if divided.left_out:
        parts.append(f"[yellow]{divided.left_out:,} rows are in none of them[/]: `tunesmith data check` says why")
    if not divided.near:
        parts.append("[yellow]near duplicates were not looked for[/]: pip install 'tunesmith\\[audit]'")
    return Group(*parts, escape(divided.path))


def diagnosis_view(diagnosis: Diagnosis) -> RenderableType:
    """The machine, what was checked on it, and what fits."""
    machine = diagnosis.machine
    head = (
        f"{machine.device} {machine.device_name}: {machine.cores} cores, {size(machine.available_bytes)} of "
        f"{size(machine.memory_bytes)} memory free, {size(machine.disk_free_bytes)} disk free"
    )
    table = _table("")
    for check in diagnosis.checks:
        mark = Text("ok", "green") if check.ok else Text("missing", "bold red" if check.required else "yellow")
        table.add_row(mark, check.name, escape(check.found), "" if check.ok else escape(check.fix))
    parts: list[RenderableType] = [escape(head), table]
    if model := diagnosis.model:
        parts.append(escape(f"model {model.name}: {model.parameters / 1e6:.0f}M parameters in {model.path}"))
    for fit in diagnosis.fits:
        verdict = "[green]fits[/]" if fit.fits else "[red]does not fit[/]"
        parts.append(f"{fit.method}: about {size(fit.needed_bytes)}, {verdict}")
    return Group(*parts)


def _table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=bool(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table
