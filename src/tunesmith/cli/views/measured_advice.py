"""View of `advise --measure`: a line per arm on stderr as it ends, then table and verdict."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.advise.measured.experiment import ExperimentStart, MeasuredAdvice
from tunesmith.advise.measured.run_arm import ArmResult
from tunesmith.advise.measured.verdict import Decision
from tunesmith.cli.output import escape_markup, write_stderr
from tunesmith.cli.progress import format_interval
from tunesmith.cli.views import make_table

HEADLINES = {
    "prompt": "Don't fine-tune: prompting is enough",
    "constrained decoding": "Don't fine-tune: constrained decoding is enough",
    "retrieval": "Don't fine-tune: retrieval",
    "another base": "Don't fine-tune: another base model is enough",
    "sft": "Fine-tune",
    "nothing": "Neither: nothing that was tried solves the task",
}
APPROACH_NAMES = {
    "prompt": "prompt",
    "constrained decoding": "constrained decoding",
    "retrieval": "retrieval",
    "another base": "another base",
    "sft": "LoRA",
}
UNTRIED_NAMES = {"prompt": "prompts", "constrained decoding": "the schema", "sft": "training"}


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
        _format_split(decision),
        _render_options(advice),
        _render_arms(advice),
    ]
    parts += [Text(line) for line in _iter_notes(advice)]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for number, line in enumerate(decision.caveats):
        table.add_row(Text("note" if number == 0 else "", "bold"), Text(line))
    return Group(*parts, table)


def _format_headline(advice: MeasuredAdvice) -> str:
    decision = advice.decision
    if decision.conclusion != "undecided":
        return HEADLINES[decision.conclusion]
    if decision.untried:
        names = [UNTRIED_NAMES.get(name, name) for name in decision.untried]
        return f"Undecided: no time for {' and '.join(names)}"
    if decision.needed_items is None:
        return "Undecided: too close to the margin or the target"
    return f"Undecided: {decision.needed_items:,} items to judge on would decide"


def _format_split(decision: Decision) -> Text:
    return Text(
        f"{decision.choosing_items} items chose the arm of each approach, "
        f"{decision.judging_items} others judge it"
    )


def _render_options(advice: MeasuredAdvice) -> Table:
    decision = advice.decision
    rule = f"margin {decision.margin:g}" if advice.target is None else f"target {advice.target:g}"
    looks = f" over up to {decision.looks} looks" if decision.looks > 1 else ""
    title = f"{advice.metric} on {decision.judging_items} items (95% CI{looks}), {rule}"
    columns = ("approach", "arm", "chosen from", advice.metric)
    names = [APPROACH_NAMES[option.approach] for option in decision.options]
    table = make_table(title, *columns, *(f"{name} adds" for name in names[1:]), numbers=())
    for name, option in zip(names, decision.options, strict=True):
        is_chosen = option.approach == decision.chosen.approach
        gains = [
            escape_markup(f"{gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
            for gain in option.gains
        ]
        padding = [""] * (len(names) - 1 - len(gains))
        table.add_row(
            Text(name, "bold green" if is_chosen else ""),
            option.arm.label,
            str(option.candidates),
            format_interval(option.score.value, option.score.low, option.score.high),
            *padding,
            *gains,
        )
    return table


def _render_arms(advice: MeasuredAdvice) -> Table:
    title = f"All arms: {advice.metric}, mean over wordings or seeds (95% CI)"
    numbers = ("of", "items", "prompt tokens", "s/request", "training")
    table = make_table(title, "arm", advice.metric, *numbers, numbers=numbers)
    for row in advice.rows:
        table.add_row(
            row.name,
            format_interval(row.score.value, row.score.low, row.score.high),
            str(row.variants),
            str(row.score.n),
            f"{row.prompt_tokens:,.0f}",
            f"{row.request_seconds:.2f}",
            f"{row.train_minutes:.1f} min" if row.arm.examples else "",
        )
    return table


def _iter_notes(advice: MeasuredAdvice) -> Iterator[str]:
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
