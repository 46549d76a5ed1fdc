"""What `advise` shows: the verdict, each step with its reasons, what was ruled out, what would change it.

In: an Advice. Out: things that `rich` can print. Programs read the JSON instead.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.advise.rules.advice import Advice, Change
from tunesmith.advise.rules.reason import TRAINING, Reason

NAMES = {"cpt": "continued pretraining", "sft": "SFT", "preference": "preference training"}
COUNTS_AS = {"prompt": "untried", "facts_change": "often", "requests_month": "enough", "private": "no"}


def advice_view(advice: Advice) -> RenderableType:
    headline = Text(f"{advice.verdict.capitalize()}: {_names(advice.answers)}", "bold")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    noted: set[str] = set()
    for number, step in enumerate(advice.steps, start=1):
        table.add_row(Text(f"{number}. {_names((step.answer,))}", "bold green"), f"for {', '.join(step.needs)}")
        for reason in step.reasons:
            if step.answer in reason.helps:
                _add(table, "   why", reason)
            elif reason.rule not in noted:
                noted.add(reason.rule)
                _add(table, "   note", reason)
        table.add_row("   next", Text(step.next))
        if step.command:
            table.add_row("", Text(f"$ {step.command}", "cyan"))
    for reason in advice.against:
        needs = [need for need in advice.situation.need if need in reason.needs]
        table.add_row(Text("not", "bold yellow"), f"{_ruled_out(reason)}, for {', '.join(needs)}")
        if any(reason in step.reasons for step in advice.steps):
            table.add_row("   why", "as above")
        else:
            _add(table, "   why", reason)
    for number, change in enumerate(advice.changes):
        table.add_row(Text("otherwise if" if number == 0 else "", "bold"), _change(change))
    if advice.not_said:
        table.add_row(Text("not said", "bold"), _assumed(advice.not_said))
    return Group(headline, table)


def _add(table: Table, label: str, reason: Reason) -> None:
    behind = f"{reason.source}; {reason.confidence}" if reason.source else reason.confidence
    table.add_row(label, Text(f"{reason.why} ({behind})"))
    if reason.usual:
        table.add_row("   usual", Text(reason.usual))


def _names(answers: tuple[str, ...]) -> str:
    return ", ".join(NAMES.get(answer, answer) for answer in answers) or "nothing helps yet"


def _ruled_out(reason: Reason) -> str:
    others = tuple(answer for answer in reason.rules_out if answer not in TRAINING)
    if len(reason.rules_out) - len(others) < len(TRAINING):
        return _names(reason.rules_out)
    return ", ".join(["training of any kind", *others])


def _change(change: Change) -> Text:
    return Text(f"{change.fact} -> {change.verdict}: {_names(change.answers)}")


def _assumed(names: tuple[str, ...]) -> Text:
    return Text(", ".join(f"{name.replace('_', ' ')} (taken as {COUNTS_AS.get(name, '0')})" for name in names))
