"""What `advise --measure` shows: a line an arm as it ends on stderr, then the table, the curve and
the verdict.

In: the objects of advise/measured.py. Out: things that `rich` can print. Programs read the JSON
instead."""

from __future__ import annotations

import sys

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.advise.measured.experiment import ExperimentStart, MeasuredAdvice
from tunesmith.advise.measured.knowledge_check import LEVELS, KnowledgeResult
from tunesmith.advise.measured.learning_curve import LearningCurve
from tunesmith.advise.measured.run_arm import ArmResult
from tunesmith.advise.measured.verdict import ArmRow, Decision
from tunesmith.cli.progress import format_duration, format_interval

NEW_FACTS_WARNING = "most of what would be taught is new to the model: learning it teaches it to make things up (Gekhman 2024)"
HEADLINES = {
    "prompt": "Don't fine-tune: prompting is enough",
    "constrained decoding": "Don't fine-tune: constrained decoding is enough",
    "retrieval": "Don't fine-tune: retrieval",
    "sft": "Fine-tune",
    "nothing": "Neither: nothing that was tried does the task",
}


def report_experiment(event: ExperimentStart | ArmResult | MeasuredAdvice) -> RenderableType | None:
    """What is going on is told on stderr, and the advice returned."""
    if isinstance(event, ExperimentStart):
        sys.stderr.write(f"{_format_start(event)}\n")
    elif isinstance(event, ArmResult):
        sys.stderr.write(f"{_format_arm_result(event)}\n")
    else:
        return render_measured_advice(event)
    return None


def _format_start(start: ExperimentStart) -> str:
    skipped_text = f"; {len(start.skipped)} have no room in the time" if start.skipped else ""
    arms_text = f"{len(start.arms)} ways to ask or train, about {format_duration(start.seconds)} in all{skipped_text}"
    test_text = f" ({start.test_rows} rows are kept as test_data)" if start.test_rows else ""
    return f"{start.model}: {start.items} of {start.available_items} items{test_text}, {arms_text}"


def _format_arm_result(result: ArmResult) -> str:
    arm = result.arm
    arm_text = f"{arm.name} ({arm.variant})" if arm.shots or arm.examples else arm.name
    return f"{arm_text}: {result.total_seconds:.1f} s"


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
    for label, lines in (("note", decision.caveats), ("otherwise if", decision.counterfactuals)):
        for number, line in enumerate(lines):
            table.add_row(Text(label if number == 0 else "", "bold"), Text(line))
    return Group(*parts, table)


def _format_headline(advice: MeasuredAdvice) -> str:
    if advice.decision.conclusion == "undecided":
        return f"Not decided yet: {' and '.join(advice.decision.untried_kinds)} had no room in the time"
    return HEADLINES[advice.decision.conclusion]


def _format_reason(decision: Decision) -> Text:
    row, best = decision.chosen, decision.best
    score_text = f"{row.name}: {row.score.metric} {_format_interval(row)}"
    if row is best or not row.difference:
        return Text(f"{score_text}, the best of all, on {decision.items} items")
    difference, low, high = row.difference
    best_text = f"the best, {best.name}, has {best.score.value:.3f}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    return Text(f"{score_text}; {best_text}, not shown to be worse on {decision.items} items")


def _format_interval(row: ArmRow) -> str:
    return f"{row.score.value:.3f} [{row.score.low:.3f}, {row.score.high:.3f}]"


def _render_arms(advice: MeasuredAdvice) -> Table:
    title = f"{advice.metric} on {advice.items} held-out items, 95% intervals; cheapest first"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("asked")
    for column in (advice.metric, "mean", "to the best", "prompt tokens", "s/request", "training"):
        table.add_column(
            column, justify="left" if column in (advice.metric, "to the best") else "right"
        )
    for row in advice.rows:
        style = "bold green" if row.arm == advice.decision.chosen.arm else ""
        table.add_row(
            Text(row.name, style),
            format_interval(row.score.value, row.score.low, row.score.high),
            f"{row.mean_score:.3f} of {row.variants}" if row.variants > 1 else "",
            "best"
            if not row.difference
            else escape("{:+.3f} [{:+.3f}, {:+.3f}]".format(*row.difference)),
            f"{row.prompt_tokens:,.0f}",
            f"{row.request_seconds:.2f}",
            f"{row.train_minutes:.1f} min" if row.arm.examples else "",
        )
    return table


def _iter_notes(advice: MeasuredAdvice):
    if advice.recall:
        recall_text = ", ".join(
            f"{score.value:.2f} of the first {cutoff}" for cutoff, score in advice.recall.items()
        )
        yield f"the answer stands in a passage that is found: {recall_text}"
    if advice.learning_curve is not None:
        yield _format_learning_curve(advice.learning_curve, advice.metric)
    if advice.knowledge is not None:
        yield _format_knowledge(advice.knowledge)
        if advice.knowledge.low > 0.5:
            yield NEW_FACTS_WARNING + (
                ": look them up, or stop early" if advice.decision.conclusion == "sft" else ""
            )
    elif advice.recall:
        yield f"what the model knows already was not looked at: {advice.knowledge_skip_reason}"
    for warning in advice.unenforced:
        yield f"the grammar leaves to the model: {warning}"
    if advice.skipped:
        yield _format_skipped(advice)
    yield f"{advice.minutes:.1f} minutes; kept in {advice.folder}, where a longer --minutes goes on"


def _format_skipped(advice: MeasuredAdvice) -> str:
    """Kinds that have no row, each with the reason of its first arm, and how many wordings and
    draws of the others."""
    tried_keys = {row.arm.row_key for row in advice.rows}
    reasons: dict[str, str] = {}
    for skipped_arm in advice.skipped:
        if skipped_arm.arm.row_key not in tried_keys:
            reasons.setdefault(skipped_arm.arm.name, skipped_arm.reason)
    kinds = [f"{name} ({reason})" for name, reason in reasons.items()]
    num_variants = sum(skipped_arm.arm.row_key in tried_keys for skipped_arm in advice.skipped)
    return "left out: " + "; ".join(
        [*kinds, *([f"{num_variants} other wordings and draws of rows"] if num_variants else [])]
    )


def _format_learning_curve(curve: LearningCurve, metric: str) -> str:
    formula = (
        f"1 - {metric} = {curve.c:.3f} + {curve.a:.2f} * n^-{curve.b:.2f}"
        if curve.b > 0
        else "it does not fall"
    )
    text = f"learning curve over {', '.join(map(str, curve.sizes))} examples: {formula}"
    if curve.refusal:
        return f"{text}; nothing is said beyond them: {curve.refusal}"
    text += f", b in [{curve.b_low:.2f}, {curve.b_high:.2f}]"
    if curve.needed_examples is None:
        return text
    upper_bound = (
        "no upper bound"
        if curve.needed_examples_high is None
        else f"{curve.needed_examples_high:,}"
    )
    return f"{text}; {curve.target:g} takes about {curve.needed_examples:,} examples [{curve.needed_examples_low:,}, {upper_bound}]"


def _format_knowledge(knowledge: KnowledgeResult) -> str:
    counts_text = ", ".join(f"{knowledge.counts[level]} {level}" for level in LEVELS)
    share_text = f"{knowledge.unknown_share:.2f} [{knowledge.low:.2f}, {knowledge.high:.2f}]"
    method_text = (
        f"{knowledge.shot_sets} prompts, each greedy and {knowledge.num_samples} times by chance"
    )
    return f"known already, of {knowledge.rows} training answers: {counts_text}; unknown {share_text} ({method_text})"
