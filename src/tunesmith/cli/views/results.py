"""Views of results: scores, comparisons, gates, scales, a run's record, exports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from tunesmith.cli.output import escape_markup, format_single_line
from tunesmith.cli.progress import format_interval
from tunesmith.cli.views import make_table, render_table
from tunesmith.cli.views.verdict import cut_middle, render_errors, render_labels, render_verdict
from tunesmith.core.events import GENERAL_TASK, GenerationSample, Score
from tunesmith.core.formatting import format_bytes, format_count, format_duration
from tunesmith.core.types import Comparison, RunRecord, ScalePoint
from tunesmith.evaluate.results import DISTANCE_METRICS, describe_truncation
from tunesmith.evaluate.scale_choice import (
    build_commands,
    describe_recommendation,
    tabulate_scales,
)
from tunesmith.evaluate.statistics import describe_evidence, judge_comparisons

if TYPE_CHECKING:
    from tunesmith.evaluate.model_ref import ModelComparison
    from tunesmith.evaluate.regression_gate import Gate
    from tunesmith.export.export import ExportResult
    from tunesmith.export.servers import ServerExport

NO_RESULTS_NOTE = "[yellow]no before/after[/]: the recipe has neither test_data nor retention_data"
SCALE_COMMAND_LABELS = ("verify the recommended scale on test_data", "export it")
VERDICT_STYLES = {"better": "bold green", "worse": "bold red"}
DISTANCE_WORDS = {"better": "closer to base", "worse": "further from base"}
LOWER_IS_BETTER = "↓"
DOUBTFUL = "*"
MIN_EVIDENCE_WIDTH = 120  # columns of the terminal
MAX_ANSWER_CHARS = 400
MAX_ROUNDING_SHARE = 0.1  # of the KL that training caused
ROUNDING_WARNING = (
    "[yellow]warning[/] this format's rounding loses much of what training changed; "
    "use --to peft, or --to gguf --type f32"
)


def render_scores(scores: Sequence[Score]) -> RenderableType:
    """Show the scores of one model."""
    table = make_table("Scores (95% CI)", "metric", "n", "value", numbers=("n", "value"))
    for score in scores:
        value = format_interval(score.value, score.low, score.high)
        table.add_row(escape_markup(f"{score.task} {score.metric}"), str(score.n), value)
    counts = {
        f"{score.task}: {score.truncated} of {score.n} answers truncated at the limit": None
        for score in scores
        if score.truncated
    }
    return Group(table, *(f"[yellow]{escape_markup(line)}[/]" for line in counts))


def render_comparisons(
    comparisons: Sequence[Comparison], names: tuple[str, str] = ("before", "after")
) -> RenderableType:
    """Show two models on the same items, then how many answers were truncated."""
    notes = describe_truncation(comparisons, names)
    table = ComparisonTable(tuple(comparisons), names)
    return Group(table, *(f"[yellow]{escape_markup(note)}[/]" for note in notes))


@dataclass(frozen=True)
class ComparisonTable:
    """A line for each metric, whose interval is never broken: a narrow terminal has no column for
    the evidence of the verdict. --json and the report have the intervals of both levels."""

    comparisons: tuple[Comparison, ...]
    names: tuple[str, str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._build_table(has_evidence=options.max_width >= MIN_EVIDENCE_WIDTH)

    def _build_table(self, *, has_evidence: bool) -> Table:
        title = f"{self.names[0].capitalize()} and {self.names[1]} (95% CI)"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("metric", overflow="fold")
        for column in ("n", *self.names, "change"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        if has_evidence:
            table.add_column("", style="dim")
        verdicts = judge_comparisons(self.comparisons)
        notes: dict[str, None] = {}
        for comparison, verdict in zip(self.comparisons, verdicts, strict=True):
            after = comparison.after
            verdict, _, doubt = verdict.partition(", but ")
            rendered = _render_verdict(comparison, verdict)
            if doubt:  # a table has no room for it
                rendered.append(f" {DOUBTFUL}")
                notes[f"{DOUBTFUL} {doubt}"] = None
            cells: list[RenderableType] = [
                Text(_name_metric(comparison)),
                f"{after.n}/{after.groups}" if after.groups else str(after.n),
                f"{comparison.before.value:.3f}",
                f"{comparison.after.value:.3f}",
                format_interval(comparison.difference, *comparison.interval),
                rendered,
            ]
            evidence = [escape_markup(describe_evidence(comparison))] if has_evidence else []
            table.add_row(*cells, *evidence)
        if any(comparison.after.groups for comparison in self.comparisons):
            notes["n: items/groups; the items of a group are not independent"] = None
        if not all(comparison.higher_is_better for comparison in self.comparisons):
            notes[f"{LOWER_IS_BETTER} lower is better"] = None
        table.caption = "\n".join(notes) or None
        table.caption_justify = "left"
        return table


def _name_metric(comparison: Comparison) -> str:
    """Return the task and the metric on one line; of a long name of a task, its ends."""
    arrow = "" if comparison.higher_is_better else f" {LOWER_IS_BETTER}"
    return f"{cut_middle(comparison.task)} {cut_middle(comparison.metric)}{arrow}"


def _render_verdict(comparison: Comparison, verdict: str) -> Text:
    """Name a verdict. To move from the base is what training is for: except on general text, that
    is neither better nor worse."""
    if comparison.metric in DISTANCE_METRICS and comparison.task != GENERAL_TASK:
        return Text(DISTANCE_WORDS.get(verdict, verdict), "dim")
    return Text(verdict, VERDICT_STYLES.get(verdict, "dim"))


def render_model_comparison(comparison: ModelComparison) -> RenderableType:
    """Show two models side by side, and notes on what could not be compared."""
    table = render_comparisons(comparison.comparisons, names=("A", "B"))
    heads = [escape_markup(f"A: {comparison.first}"), escape_markup(f"B: {comparison.second}")]
    notes = [f"[yellow]{escape_markup(note)}[/]" for note in comparison.notes]
    errors = [render_errors(comparison.errors, ("A", "B"))] if comparison.errors else []
    return Group(*heads, table, *notes, *errors)


def render_gates(gates: Sequence[Gate]) -> RenderableType:
    """Show whether each gate passed."""
    table = make_table("Gates", "", "gate", "change")
    for gate in gates:
        mark = Text("passed", "green") if gate.passed else Text("failed", "bold red")
        table.add_row(mark, escape_markup(gate.name), escape_markup(gate.message))
    return table


# ---------------------------------------------------------------- a run


def render_run_record(record: RunRecord) -> RenderableType:
    """Show a run's results, sample answers, token counts, and where the adapter is."""
    parts: list[RenderableType] = [
        render_comparisons(record.comparisons) if record.comparisons else NO_RESULTS_NOTE
    ]
    parts += format_kl_scores(record.kl_scores)
    if record.scales:
        parts.append(render_scales(record.scales))
    if record.errors and (labels := record.errors.get_table("label")):
        parts.append(render_labels(record.errors, labels))
    parts += [_render_sample(before, after) for before, after in record.samples]
    config = record.plan.config
    if "rehearsal" in record.task_tokens or config.rehearsal_ratio is not None:
        parts.append(format_rehearsal(record))
    if record.plan.data["data"].task_rows:
        parts.append(format_tasks(record))
    if record.shared_tokens:
        parts.append(format_shared_prefixes(record))
    speed = record.tokens / max(record.train_seconds, 1e-9)
    steps = format_count(record.steps, "step")
    duration = format_duration(record.train_seconds)
    parts.append(f"{steps}, {speed:,.0f} tokens/s: {duration} of training")
    if record.total_seconds:
        total = format_duration(record.total_seconds)
        parts[-1] = f"{parts[-1]}, {total} with loading, preflight and evaluation"
    parts.append(_format_peak(record))
    label = "model" if record.plan.config.method == "full" else "adapter"
    parts.append(f"{label}: {escape_markup(record.adapter)}")
    commands = build_commands(record.scales, str(Path(record.adapter).parent))
    for label, command in zip(SCALE_COMMAND_LABELS, commands, strict=False):
        parts.append(f"{label}: {escape_markup(command)}")
    if record.verdict is not None:
        parts.append(render_verdict(record.verdict))
    return Group(*parts)


def _format_peak(record: RunRecord) -> str:
    """Format the peak memory of the run and of its steps, next to the plan's prediction."""
    predicted = format_bytes(record.plan.memory_bytes["peak"])
    text = f"peak memory {format_bytes(record.peak_bytes)} ({predicted} predicted)"
    if 0 < record.train_peak_bytes < record.peak_bytes:
        text += f"; {format_bytes(record.train_peak_bytes)} in training, the rest in evaluation"
    return text


def _render_sample(before: GenerationSample, after: GenerationSample) -> RenderableType:
    table = make_table(format_single_line(before.id))
    if after.expected:
        table.add_row(Text("expected", "dim"), _format_answer(after.expected))
    table.add_row(Text("before", "dim"), _format_answer(before.answer))
    table.add_row(Text("after", "dim"), _format_answer(after.answer))
    return table


def _format_answer(text: str) -> str:
    return format_single_line(text, MAX_ANSWER_CHARS)


def format_rehearsal(record: RunRecord) -> str:
    """Format the rehearsed share of all tokens, with the planned share."""
    tokens = record.task_tokens.get("rehearsal", 0)
    share = tokens / max(1, record.tokens)
    text = f"rehearsal: {tokens:,} of {record.tokens:,} tokens, {share:.1%}"
    config = record.plan.config
    if config.rehearsal_ratio is None:  # of an earlier stage
        return text
    label = "planned" if config.rehearsal_margin is None else "adaptive, started at"
    return f"{text} ({label} {config.rehearsal_ratio:.1%})"


def format_tasks(record: RunRecord) -> str:
    """Format the trained tokens of each task, without rehearsal."""
    tokens = {task: record.task_tokens.get(task, 0) for task in record.plan.data["data"].task_rows}
    total = max(1, sum(tokens.values()))
    texts = [f"{task} {count:,} tokens ({count / total:.0%})" for task, count in tokens.items()]
    return f"tasks: {', '.join(texts)}"


def format_shared_prefixes(record: RunRecord) -> str:
    """Format the tokens that prefix sharing saved."""
    counts = f"{record.shared_tokens:,} of {record.tokens:,} tokens"
    return f"prefix sharing saved {counts} ({record.shared_tokens / record.tokens:.1%})"


def format_kl_scores(kl_scores: Sequence[Score]) -> list[str]:
    """Format how far the model moved from its base, one line per score."""
    lines: list[str] = []
    for score in kl_scores:
        name = escape_markup(f"{score.task}: {DISTANCE_METRICS.get(score.metric, score.metric)}")
        lines.append(f"{name} {format_interval(score.value, score.low, score.high)}")
    return lines


def render_scales(points: Sequence[ScalePoint]) -> RenderableType:
    """Show gain and forgetting by adapter scale, and the recommended one."""
    return Group(render_table(tabulate_scales(points)), describe_recommendation(points))


# ---------------------------------------------------------------- exports


def render_export(export: ExportResult) -> RenderableType:
    """Show the files and the parity checks of an export."""
    parity = export.parity
    title = f"{export.target} {export.type}".strip()
    table = make_table(title, "file", "size", "sha256", numbers=("size",))
    for file in export.files:
        table.add_row(
            escape_markup(file.name), format_bytes(file.bytes), Text(file.sha256[:12], "dim")
        )
    parts: list[RenderableType] = [table]
    if export.scale != 1:
        parts.append(f"adapter scale {export.scale:g}")
    parts.append(
        f"{parity.same_prompts} of {parity.rendered_prompts} prompts render to the same tokens, "
        f"{parity.same_answers} of {parity.prompts} greedy answers are identical"
    )
    parts.append(
        f"KL to the run: mean {parity.mean_kl:.1e}, max {parity.max_kl:.1e} nats/token "
        f"(training caused {parity.trained_kl:.1e})"
    )
    if parity.trained_kl and parity.mean_kl > MAX_ROUNDING_SHARE * parity.trained_kl:
        parts.append(ROUNDING_WARNING)
    if parity.unchecked:
        parts.append(
            f"{parity.unchecked} of {parity.changed} trained parameters changed less than the "
            "format rounds: for them only the KL was compared"
        )
    parts.append(
        f"top-1 agreement {parity.top1_agreement:.1%} over {parity.positions} tokens, "
        f"largest logit difference {parity.max_logit_difference:.2g}"
    )
    return Group(*parts, escape_markup(export.path))


def render_server_export(export: ServerExport) -> RenderableType:
    """Show the runs of a server with their parity, and what to do with its files."""
    columns = ("model in requests", "same answers", "KL to the run")
    table = make_table(export.target, columns[0], "run", *columns[1:], numbers=columns[1:])
    for run in export.runs:
        same = f"{run.parity.same_answers} of {run.parity.prompts}"
        table.add_row(
            escape_markup(run.name), escape_markup(run.run), same, f"{run.parity.mean_kl:.1e}"
        )
    texts = [name for name in export.files if "/" not in name and name != "manifest.json"]
    return Group(
        table,
        f"files: {escape_markup(', '.join(texts))}",
        "read LIMITS.md, start the server, then run verify.sh",
        escape_markup(export.path),
    )
