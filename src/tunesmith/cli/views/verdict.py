"""Views of what a run's answers show: its verdict, and what is still wrong.

In: a RunVerdict, an ErrorAnalysis. Out: what `rich` can print, at most MAX_ROWS rows a table;
`--json` has all. Names and values are strangers' texts: they are put on one line and escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunesmith.cli.output import flatten_text
from tunesmith.cli.views import make_table
from tunesmith.core.evidence import Confusion, ErrorAnalysis, ErrorTable, Rate, RunVerdict
from tunesmith.core.formatting import escape_controls

MAX_ROWS = 8
MAX_ROW_IDS = 2
MAX_LABEL_ROWS = 5  # of labels, and of pairs of them
MAX_NAME_CHARS = 40
MAX_LINE_CHARS = 400
COMMAND_WIDTH = 72
STYLES = {
    "ready": "bold green",
    "useful, not ready": "bold yellow",
    "no effect": "bold",
    "harmful": "bold red",
    "not measured": "bold",
}
TITLES = {
    "format": "Errors of format",
    "field": "Errors by field",
    "label": "Lowest F1 by label (95% CI)",
    "expected_value": "Errors by expected value",
    "task": "Errors by task",
}


def render_verdict(verdict: RunVerdict) -> RenderableType:
    """Show the verdict, the level, the change, the cost, and what to do next."""
    head = Text.assemble("Verdict: ", (verdict.name, STYLES[verdict.name]))
    lines: list[RenderableType] = [head]
    for line in filter(None, (verdict.level, verdict.change, verdict.cost)):
        lines.append(_pad_line(line, 2))
    lines += [_render_item("-", reason, "yellow") for reason in verdict.reasons]
    if verdict.next_steps:
        lines.append(Text("Next steps"))
    for number, step in enumerate(verdict.next_steps, 1):
        lines.append(_render_item(f"{number}.", step.reason))
        if step.forecast:
            lines.append(_pad_line(step.forecast, 5, "dim"))
        lines.append(Text(_break_command(step.command), "cyan", overflow="fold"))
    return Group(*lines)


def _break_command(command: str) -> str:
    """Return a command broken before options by backslashes, so that it can be copied."""
    lines = [""]
    for part in re.split(r" (?=--)", escape_controls(command, keep="")):
        if lines[-1] and len(lines[-1]) + len(part) >= COMMAND_WIDTH:
            lines.append(part)
        else:
            lines[-1] = f"{lines[-1]} {part}".strip()
    return "     " + " \\\n       ".join(lines)


def _render_item(marker: str, text: str, style: str = "") -> RenderableType:
    """Show an item of a list; its further lines begin below its first word."""
    item = Table.grid(padding=(0, 1, 0, 0))
    item.add_row(marker, Text(flatten_text(text, MAX_LINE_CHARS)), style=style)
    return Padding.indent(item, 2)


def _pad_line(text: str, columns: int, style: str = "") -> RenderableType:
    line = Text(flatten_text(text, MAX_LINE_CHARS), style=style)
    return Padding.indent(line, columns)


def render_errors(
    errors: ErrorAnalysis, names: tuple[str, str] = ("before", "after")
) -> RenderableType:
    """Show what is wrong with the answers, table by table, and shortcuts first."""
    parts: list[RenderableType] = [Text(_describe_counts(errors, names))]
    for shortcut in errors.shortcuts:
        line = f"constant: {shortcut.description} ({', '.join(shortcut.rows[:MAX_ROW_IDS])})"
        parts.append(_pad_line(line, 0, "bold yellow"))
    parts += _render_floors(errors)
    if labels := errors.get_table("label"):
        return Group(*parts, render_labels(errors, labels))
    parts += [_render_table(table, names) for table in errors.tables if _has_errors(table)]
    if errors.confusions:
        parts.append(_render_confusions(errors.confusions))
    return Group(*parts)


def render_labels(errors: ErrorAnalysis, table: ErrorTable) -> RenderableType:
    """Show the labels with the lowest F1, the pairs most often confused, and what is no label."""
    columns = ("precision", "recall", "F1")
    shown = make_table(TITLES["label"], "", *columns, numbers=columns)
    for group in table.groups[:MAX_LABEL_ROWS]:
        right = group.n - group.wrong
        counts = (f"{right} of {group.answered}", f"{right} of {group.n}")
        shown.add_row(Text(cut_middle(group.name)), *counts, _format_rate(group.f1))
    parts: list[RenderableType] = [shown]
    if (hidden := len(table.groups) + table.omitted - MAX_LABEL_ROWS) > 0:
        parts.append(f"... and {hidden} more: --json")
    if errors.confusions:
        parts.append(_render_confusions(errors.confusions[:MAX_LABEL_ROWS]))
    if errors.other_answers:
        texts = [f"{cut_middle(text)!r} {n}" for text, n in errors.other_answers.items()]
        count = sum(confusion.n for confusion in errors.confusions if confusion.answered is None)
        line = f"no label: {count} of {errors.n} answers, most often {', '.join(texts)}"
        parts.append(_pad_line(line, 0))
    return Group(*parts)


def _format_rate(rate: Rate | None) -> str:
    if rate is None:
        return "too few"
    value, low, high = rate
    return f"{value:.2f} ({low:.2f}-{high:.2f})"


def _describe_counts(errors: ErrorAnalysis, names: tuple[str, str]) -> str:
    text = f"By {errors.metric}: {errors.n - errors.right} of {errors.n} answers are below 1"
    if errors.is_binary:
        text = f"By {errors.metric}: {errors.n - errors.right} of {errors.n} answers are wrong"
    if errors.right_before is None:
        return text
    before = f"{names[0]} {errors.n - errors.right_before}"
    return f"{text} ({before}; {errors.fixed} fixed, {errors.broken} broken)"


def _render_floors(errors: ErrorAnalysis) -> list[RenderableType]:
    """Show what rules without a model have, the highest first."""
    lines: list[RenderableType] = []
    answers = sorted(errors.floors, key=lambda floor: -floor.value)
    if answers:
        names = [f"{each.name} {each.value:.3f}" + "?" * (not each.is_beaten) for each in answers]
        hint = " (?: not shown to be beaten)" if not all(each.is_beaten for each in answers) else ""
        lines.append(_pad_line(f"Floors, n = {answers[0].n}: {', '.join(names)}{hint}", 0))
    if errors.floors_note:
        lines.append(_pad_line(errors.floors_note, 0))
    return lines


def _has_errors(table: ErrorTable) -> bool:
    return any(group.wrong for group in table.groups)


def _render_table(table: ErrorTable, names: tuple[str, str]) -> RenderableType:
    """Show the groups of a table that have errors."""
    groups = [group for group in table.groups if group.wrong]
    columns = ["", "wrong", "of", "error", "95% CI"]
    has_before = any(group.wrong_before is not None for group in groups)
    has_only_here = any(group.only_here for group in groups)
    has_training = any(group.training_rows is not None for group in groups)
    columns += [names[0]] * has_before + ["only here"] * has_only_here
    columns += ["trained"] * has_training
    numbers = tuple(columns[1:])
    columns.append("first row")
    result = make_table(TITLES.get(table.by, table.by), *columns, numbers=numbers)
    for group in groups[:MAX_ROWS]:
        cells: list[Text | str] = [
            Text(cut_middle(group.name)),
            str(group.wrong),
            str(group.n),
            f"{group.error:.0%}",
            f"{100 * group.low:.0f}-{group.high:.0%}",
        ]
        cells += [_format_count(group.wrong_before)] * has_before
        cells += [str(group.only_here)] * has_only_here
        cells += [_format_count(group.training_rows)] * has_training
        result.add_row(*cells, Text(flatten_text(next(iter(group.rows), ""), MAX_NAME_CHARS)))
    hidden = len(groups) - MAX_ROWS + table.omitted
    return Group(result, f"... and {hidden} more: --json") if hidden > 0 else result


def cut_middle(name: str) -> str:
    """Return a name on one line; a long one keeps its end, which may be the value of a field."""
    line = flatten_text(name, MAX_LINE_CHARS)
    end_chars = MAX_NAME_CHARS // 3
    if len(line) <= MAX_NAME_CHARS:
        return line
    return f"{line[: MAX_NAME_CHARS - end_chars - 1]}…{line[-end_chars:]}"


def _format_count(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _render_confusions(confusions: Sequence[Confusion]) -> RenderableType:
    columns = ("field", "expected", "answered", "times")
    has_fields = any(confusion.field for confusion in confusions)
    shown = columns if has_fields else columns[1:]
    table = make_table("Confusions", *shown, numbers=("times",))
    for confusion in confusions[:MAX_ROWS]:
        cells = (confusion.field, confusion.expected, confusion.answered)
        texts = [
            Text("no label", "dim")
            if cell is None
            else Text(flatten_text(cell, MAX_NAME_CHARS) or "(empty)")
            for cell in cells
        ]
        table.add_row(*texts[0 if has_fields else 1 :], str(confusion.n))
    return table
