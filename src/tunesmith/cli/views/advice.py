"""View of `advise`: the verdict, each step with its reasons, what was ruled out, and what would
change it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.advise.rules.advice import Advice, Counterfactual
from tunesmith.advise.rules.rubric import TRAINING_APPROACHES, RuleResult

APPROACH_NAMES = {
    "cpt": "continued pretraining",
    "sft": "SFT",
    "preference": "preference training",
    "another base": "another base model",
}
ASSUMED_VALUES = {
    "prompt": "untried",
    "facts_change": "often",
    "requests_month": "enough",
    "private": "no",
    "base_language": "yes",
    "base_at_chance": "no",
    "context": "short",
    **dict.fromkeys(("base_context", "device_memory"), "enough"),
    "params": "few",
}


def render_advice(advice: Advice) -> RenderableType:
    """Show the verdict in a line, then a table of steps, objections and assumptions."""
    verdict = advice.verdict.capitalize()
    headline = Text(f"{verdict}: {_format_approaches(advice.approaches)}", "bold")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    _add_recommendations(table, advice)
    _add_objections(table, advice)
    for number, counterfactual in enumerate(advice.counterfactuals):
        label = Text("would change if" if number == 0 else "", "bold")
        table.add_row(label, _format_counterfactual(counterfactual))
    if advice.assumed:
        table.add_row(Text("assumed", "bold"), _format_assumed(advice.assumed))
    return Group(headline, table)


def _add_recommendations(table: Table, advice: Advice) -> None:
    noted_rules: set[str] = set()
    for number, recommendation in enumerate(advice.recommendations, start=1):
        name = _format_approaches((recommendation.approach,))
        needs = ", ".join(recommendation.needs)
        table.add_row(Text(f"{number}. {name}", "bold green"), f"for {needs}")
        for reason in recommendation.reasons:
            if recommendation.approach in reason.recommended:
                _add_reason(table, "   why", reason)
            elif reason.rule not in noted_rules:
                noted_rules.add(reason.rule)
                _add_reason(table, "   note", reason)
        table.add_row("   next", Text(recommendation.next_step))
        if recommendation.command:
            table.add_row("", Text(f"$ {recommendation.command}", "cyan"))


def _add_objections(table: Table, advice: Advice) -> None:
    shown_reasons = [reason for step in advice.recommendations for reason in step.reasons]
    for reason in advice.objections:
        needs = [need for need in advice.requirements.need if need in reason.needs]
        ruled_out = f"{_format_ruled_out(reason)}, for {', '.join(needs)}"
        table.add_row(Text("ruled out", "bold yellow"), ruled_out)
        if reason in shown_reasons:
            table.add_row("   why", "as above")
        else:
            _add_reason(table, "   why", reason)


def _add_reason(table: Table, label: str, reason: RuleResult) -> None:
    evidence = f"{reason.source}; {reason.confidence}" if reason.source else reason.confidence
    table.add_row(label, Text(f"{reason.explanation} ({evidence})"))
    if reason.common_advice:
        table.add_row("   common advice", Text(reason.common_advice))


def _format_approaches(approaches: tuple[str, ...]) -> str:
    names = [APPROACH_NAMES.get(approach, approach) for approach in approaches]
    return ", ".join(names) or "nothing helps yet"


def _format_ruled_out(reason: RuleResult) -> str:
    others = tuple(approach for approach in reason.ruled_out if approach not in TRAINING_APPROACHES)
    if len(reason.ruled_out) - len(others) < len(TRAINING_APPROACHES):
        return _format_approaches(reason.ruled_out)
    return ", ".join(["training of any kind", *others])


def _format_counterfactual(counterfactual: Counterfactual) -> Text:
    approaches = _format_approaches(counterfactual.approaches)
    return Text(f"{counterfactual.condition} -> {counterfactual.verdict}: {approaches}")


def _format_assumed(names: tuple[str, ...]) -> Text:
    texts = [f"{name.replace('_', ' ')} = {ASSUMED_VALUES.get(name, '0')}" for name in names]
    return Text(", ".join(texts))
