"""What `advise` shows: the verdict, each step with its reasons, what was ruled out, what would
change it.

In: an Advice. Out: things that `rich` can print. Programs read the JSON instead.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.advise.rules.advice import Advice, Counterfactual
from tunesmith.advise.rules.reason import TRAINING_APPROACHES, RuleResult

APPROACH_NAMES = {"cpt": "continued pretraining", "sft": "SFT", "preference": "preference training"}
ASSUMED_VALUES = {
    "prompt": "untried",
    "facts_change": "often",
    "requests_month": "enough",
    "private": "no",
}


def render_advice(advice: Advice) -> RenderableType:
    headline = Text(
        f"{advice.verdict.capitalize()}: {_format_approaches(advice.approaches)}", "bold"
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    noted_rules: set[str] = set()
    for number, recommendation in enumerate(advice.recommendations, start=1):
        table.add_row(
            Text(f"{number}. {_format_approaches((recommendation.approach,))}", "bold green"),
            f"for {', '.join(recommendation.needs)}",
        )
        for reason in recommendation.reasons:
            if recommendation.approach in reason.recommended:
                _add_reason(table, "   why", reason)
            elif reason.rule not in noted_rules:
                noted_rules.add(reason.rule)
                _add_reason(table, "   note", reason)
        table.add_row("   next", Text(recommendation.next_step))
        if recommendation.command:
            table.add_row("", Text(f"$ {recommendation.command}", "cyan"))
    for reason in advice.objections:
        needs = [need for need in advice.requirements.need if need in reason.needs]
        table.add_row(
            Text("not", "bold yellow"), f"{_format_ruled_out(reason)}, for {', '.join(needs)}"
        )
        if any(reason in recommendation.reasons for recommendation in advice.recommendations):
            table.add_row("   why", "as above")
        else:
            _add_reason(table, "   why", reason)
    for number, counterfactual in enumerate(advice.counterfactuals):
        table.add_row(
            Text("otherwise if" if number == 0 else "", "bold"),
            _format_counterfactual(counterfactual),
        )
    if advice.assumed:
        table.add_row(Text("not said", "bold"), _format_assumed(advice.assumed))
    return Group(headline, table)


def _add_reason(table: Table, label: str, reason: RuleResult) -> None:
    evidence = f"{reason.source}; {reason.confidence}" if reason.source else reason.confidence
    table.add_row(label, Text(f"{reason.explanation} ({evidence})"))
    if reason.common_advice:
        table.add_row("   usual", Text(reason.common_advice))


def _format_approaches(approaches: tuple[str, ...]) -> str:
    return (
        ", ".join(APPROACH_NAMES.get(approach, approach) for approach in approaches)
        or "nothing helps yet"
    )


def _format_ruled_out(reason: RuleResult) -> str:
    others = tuple(approach for approach in reason.ruled_out if approach not in TRAINING_APPROACHES)
    if len(reason.ruled_out) - len(others) < len(TRAINING_APPROACHES):
        return _format_approaches(reason.ruled_out)
    return ", ".join(["training of any kind", *others])


def _format_counterfactual(counterfactual: Counterfactual) -> Text:
    return Text(
        f"{counterfactual.condition} -> {counterfactual.verdict}: {_format_approaches(counterfactual.approaches)}"
    )


def _format_assumed(names: tuple[str, ...]) -> Text:
    return Text(
        ", ".join(
            f"{name.replace('_', ' ')} (taken as {ASSUMED_VALUES.get(name, '0')})" for name in names
        )
    )
