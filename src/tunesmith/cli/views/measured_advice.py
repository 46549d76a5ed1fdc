"""View of `advise --measure`: a line per arm on stderr as it ends, then table and verdict."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.advise.measured.experiment import ExperimentStart, MeasuredAdvice
from tunesmith.advise.measured.run_arm import ArmResult
from tunesmith.advise.measured.verdict import ArmRow, Decision
from tunesmith.cli.output import escape_markup, write_stderr
from tunesmith.cli.progress import format_interval
from tunesmith.cli.views import make_table

HEADLINES = {
    "prompt": "Don't fine-tune: prompting is enough",
    "constrained decoding": "Don't fine-tune: constrained decoding is enough",
    "retrieval": "Don't fine-tune: retrieval",
    "sft": "Fine-tune",
    "nothing": "Neither: nothing that was tried solves the task",
}


def report_experiment(event: ExperimentStart | ArmResult | MeasuredAdvice) -> RenderableType | None:
    """Print progress on stderr; return the view of the final advice."""
    if isinstance(event, ExperimentStart):
        write_stderr(f"{_format_start(event)}\n")
    elif isinstance(event, ArmResult):
        write_stderr(f"{_format_arm_result(event)}\n")
    else:
        return render_measured_advice(event)
    return None


def _format_start(start: ExperimentStart) -> str:
    test = f" ({start.test_rows} rows held out as test_data)" if start.test_rows else ""
    return (
        f"{start.model}: {start.items} of {start.available_items} items{test}, "
        f"up to {len(start.arms)} arms in {start.minutes:g} minutes"
    )


def _format_arm_result(result: ArmResult) -> str:
    arm = result.arm
    name = f"{arm.name} ({arm.variant})" if arm.shots or arm.examples else arm.name
    return f"{name}: {result.total_seconds:.1f} s"


def render_measured_advice(advice: MeasuredAdvice) -> RenderableType:
    decision = advice.decision
    parts: list[RenderableType] = [
        Text(_format_headline(advice), "bold"),
        _format_reason(decision),
        _render_arms(advice),
    ]
    parts += [Text(line) for line in _iter_notes(advice)]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    sections = (("note", decision.caveats), ("would change if", decision.counterfactuals))
    for label, lines in sections:
        for number, line in enumerate(lines):
            table.add_row(Text(label if number == 0 else "", "bold"), Text(line))
    return Group(*parts, table)


def _format_headline(advice: MeasuredAdvice) -> str:
    if advice.decision.conclusion == "undecided":
        untried = " and ".join(advice.decision.untried_kinds)
        return f"Not decided yet: no time for {untried}"
    return HEADLINES[advice.decision.conclusion]


def _format_reason(decision: Decision) -> Text:
    row = decision.chosen
    best = decision.best
    interval = f"[{row.score.low:.3f}, {row.score.high:.3f}]"
    score = f"{row.name}: {row.score.metric} {row.score.value:.3f} {interval}"
    if row is best or not row.difference:
        return Text(f"{score}, the best, on {decision.items} items")
    difference, low, high = row.difference
    gap = f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    return Text(
        f"{score}; the best, {best.name}, has {best.score.value:.3f}: {gap}, "
        f"not significantly worse on {decision.items} items"
    )


def _render_arms(advice: MeasuredAdvice) -> Table:
    title = f"{advice.metric} on {advice.items} held-out items (95% CI), cheapest first"
    numbers = ("mean", "prompt tokens", "s/request", "training")
    columns = ("arm", advice.metric, "mean", "vs best", "prompt tokens", "s/request", "training")
    table = make_table(title, *columns, numbers=numbers)
    for row in advice.rows:
        is_chosen = row.arm == advice.decision.chosen.arm
        table.add_row(
            Text(row.name, "bold green" if is_chosen else ""),
            format_interval(row.score.value, row.score.low, row.score.high),
            f"{row.mean_score:.3f} of {row.variants}" if row.variants > 1 else "",
            _format_difference(row),
            f"{row.prompt_tokens:,.0f}",
            f"{row.request_seconds:.2f}",
            f"{row.train_minutes:.1f} min" if row.arm.examples else "",
        )
    return table


def _format_difference(row: ArmRow) -> str:
    if not row.difference:
        return "best"
    difference, low, high = row.difference
    return escape_markup(f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]")


def _iter_notes(advice: MeasuredAdvice) -> Iterator[str]:
    if advice.recall:
        recalls = [f"{score.value:.2f} of top {cutoff}" for cutoff, score in advice.recall.items()]
        yield f"retrieval recall of the answer: {', '.join(recalls)}"
    for warning in advice.unenforced:
        yield f"not enforced by the grammar: {warning}"
    if advice.skipped:
        yield _format_skipped(advice)
    yield f"{advice.minutes:.1f} minutes; saved in {advice.folder}; a longer --minutes continues"


def _format_skipped(advice: MeasuredAdvice) -> str:
    """Format the kinds without a row, with a reason, and the number of other skipped variants."""
    tried_keys = {row.arm.row_key for row in advice.rows}
    reasons: dict[str, str] = {}
    num_variants = 0
    for skipped in advice.skipped:
        if skipped.arm.row_key in tried_keys:
            num_variants += 1
        else:
            reasons.setdefault(skipped.arm.name, skipped.reason)
    parts = [f"{name} ({reason})" for name, reason in reasons.items()]
    if num_variants:
        parts.append(f"{num_variants} other prompt wordings and row samples")
    return f"skipped: {'; '.join(parts)}"
