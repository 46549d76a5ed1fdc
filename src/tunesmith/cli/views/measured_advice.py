"""What `advise --measure` shows: a line an arm as it ends on stderr, then the table, the curve and the verdict.

In: the objects of advise/measured.py. Out: things that `rich` can print. Programs read the JSON instead.
"""

from __future__ import annotations

import sys

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.advise.measured.experiment import Begun, MeasuredAdvice
from tunesmith.advise.measured.knowledge_check import LEVELS, Knowledge
from tunesmith.advise.measured.learning_curve import Curve
from tunesmith.advise.measured.run_arm import Outcome
from tunesmith.advise.measured.verdict import Decision, Row
from tunesmith.cli.progress import clock, interval

NEW_FACTS = "most of what would be taught is new to the model: learning it teaches it to make things up (Gekhman 2024)"
HEADLINES = {
    "prompt": "Don't fine-tune: prompting is enough",
    "constrained decoding": "Don't fine-tune: constrained decoding is enough",
    "retrieval": "Don't fine-tune: retrieval",
    "sft": "Fine-tune",
    "nothing": "Neither: nothing that was tried does the task",
}


def measured_view(found: Begun | Outcome | MeasuredAdvice) -> RenderableType | None:
    """What is going on is told on stderr, and the advice returned."""
    if isinstance(found, Begun):
        sys.stderr.write(f"{_begun_line(found)}\n")
    elif isinstance(found, Outcome):
        sys.stderr.write(f"{_outcome_line(found)}\n")
    else:
        return advice_table(found)
    return None


def _begun_line(begun: Begun) -> str:
    left = f"; {len(begun.left_out)} have no room in the time" if begun.left_out else ""
    ways = f"{len(begun.arms)} ways to ask or train, about {clock(begun.seconds)} in all{left}"
    test = f" ({begun.test_rows} rows are kept as test_data)" if begun.test_rows else ""
    return f"{begun.model}: {begun.items} of {begun.of_items} items{test}, {ways}"


def _outcome_line(outcome: Outcome) -> str:
    arm = outcome.arm
    told = f"{arm.name} ({arm.variant})" if arm.shots or arm.examples else arm.name
    return f"{told}: {outcome.took:.1f} s"


def advice_table(advice: MeasuredAdvice) -> RenderableType:
    decision = advice.decision
    parts: list[RenderableType] = [Text(_headline(advice), "bold"), _why(decision), _arms(advice)]
    parts += [Text(line) for line in _notes(advice)]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for label, lines in (("note", decision.doubts), ("otherwise if", decision.would_change)):
        for number, line in enumerate(lines):
            table.add_row(Text(label if number == 0 else "", "bold"), Text(line))
    return Group(*parts, table)


def _headline(advice: MeasuredAdvice) -> str:
    if advice.decision.answer == "undecided":
        return f"Not decided yet: {' and '.join(advice.decision.untried)} had no room in the time"
    return HEADLINES[advice.decision.answer]


def _why(decision: Decision) -> Text:
    row, best = decision.row, decision.best
    told = f"{row.name}: {row.score.metric} {_span(row)}"
    if row is best or not row.change:
        return Text(f"{told}, the best of all, on {decision.items} items")
    difference, low, high = row.change
    against = f"the best, {best.name}, has {best.score.value:.3f}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    return Text(f"{told}; {against}, not shown to be worse on {decision.items} items")


def _span(row: Row) -> str:
    return f"{row.score.value:.3f} [{row.score.low:.3f}, {row.score.high:.3f}]"


def _arms(advice: MeasuredAdvice) -> Table:
    title = f"{advice.metric} on {advice.items} held-out items, 95% intervals; cheapest first"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("asked")
    for column in (advice.metric, "mean", "to the best", "prompt tokens", "s/request", "training"):
        table.add_column(column, justify="left" if column in (advice.metric, "to the best") else "right")
    for row in advice.rows:
        chosen = "bold green" if row.arm == advice.decision.row.arm else ""
        table.add_row(
            Text(row.name, chosen),
            interval(row.score.value, row.score.low, row.score.high),
            f"{row.mean:.3f} of {row.variants}" if row.variants > 1 else "",
            "best" if not row.change else escape("{:+.3f} [{:+.3f}, {:+.3f}]".format(*row.change)),
            f"{row.prompt_tokens:,.0f}",
            f"{row.seconds:.2f}",
            f"{row.train_minutes:.1f} min" if row.arm.examples else "",
        )
    return table


def _notes(advice: MeasuredAdvice):
    if advice.recall:
        found = ", ".join(f"{score.value:.2f} of the first {k}" for k, score in advice.recall.items())
        yield f"the answer stands in a passage that is found: {found}"
    if advice.curve is not None:
        yield _curve_line(advice.curve, advice.metric)
    if advice.knowledge is not None:
        yield _knowledge_line(advice.knowledge)
        if advice.knowledge.low > 0.5:
            yield NEW_FACTS + (": look them up, or stop early" if advice.decision.answer == "sft" else "")
    elif advice.recall:
        yield f"what the model knows already was not looked at: {advice.no_knowledge}"
    for warning in advice.loose:
        yield f"the grammar leaves to the model: {warning}"
    if advice.left_out:
        yield _left_out_line(advice)
    yield f"{advice.minutes:.1f} minutes; kept in {advice.folder}, where a longer --minutes goes on"


def _left_out_line(advice: MeasuredAdvice) -> str:
    """Kinds that have no row, each with the reason of its first arm, and how many wordings and draws of the others."""
    tried = {row.arm.row for row in advice.rows}
    why: dict[str, str] = {}
    for out in advice.left_out:
        if out.arm.row not in tried:
            why.setdefault(out.arm.name, out.why)
    kinds = [f"{name} ({reason})" for name, reason in why.items()]
    more = sum(out.arm.row in tried for out in advice.left_out)
    return "left out: " + "; ".join([*kinds, *([f"{more} other wordings and draws of rows"] if more else [])])


def _curve_line(curve: Curve, metric: str) -> str:
    form = f"1 - {metric} = {curve.c:.3f} + {curve.a:.2f} * n^-{curve.b:.2f}" if curve.b > 0 else "it does not fall"
    told = f"learning curve over {', '.join(map(str, curve.sizes))} examples: {form}"
    if curve.refused:
        return f"{told}; nothing is said beyond them: {curve.refused}"
    told += f", b in [{curve.b_low:.2f}, {curve.b_high:.2f}]"
    if curve.needed is None:
        return told
    most = "no upper bound" if curve.needed_high is None else f"{curve.needed_high:,}"
    return f"{told}; {curve.target:g} takes about {curve.needed:,} examples [{curve.needed_low:,}, {most}]"


def _knowledge_line(knowledge: Knowledge) -> str:
    counts = ", ".join(f"{knowledge.counts[level]} {level}" for level in LEVELS)
    share = f"{knowledge.share:.2f} [{knowledge.low:.2f}, {knowledge.high:.2f}]"
    asked = f"{knowledge.sets} prompts, each greedy and {knowledge.sampled} times by chance"
    return f"known already, of {knowledge.rows} training answers: {counts}; unknown {share} ({asked})"
