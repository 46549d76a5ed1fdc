"""The view of `verify`: a line per check with its evidence, then a few answers that differ.

In: a LiveVerification. Out: things that `rich` can print. Text of the server is escaped and cut.
Left out: why the command fails, which its error says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.cli.output import escape_markup, format_single_line
from tunesmith.cli.views import make_table
from tunesmith.core.formatting import count_common

if TYPE_CHECKING:
    from tunesmith.evaluate.verify.verification import AnswerPair, LiveVerification

STATUS_STYLES = {
    "ok": "green",
    "warning": "yellow",
    "failed": "bold red",
    "not measured": "dim",
}
MAX_ANSWER_CHARS = 200


def render_verification(result: LiveVerification) -> RenderableType:
    """Show what was compared, the verdict, and a few answers that differ."""
    title = f"{result.run} at {result.url}, model {result.model}"
    table = make_table(escape_markup(title), "check", "", "n", "evidence", numbers=("n",))
    for check in result.checks:
        status = Text(check.status, STATUS_STYLES[check.status], no_wrap=True)
        table.add_row(escape_markup(check.name), status, str(check.n), escape_markup(check.message))
    parts: list[RenderableType] = [table]
    for pair in result.differences:
        parts += _render_difference(pair)
    parts += [f"[yellow]{escape_markup(note)}[/]" for note in result.notes]
    if result.is_run:
        verdict = f"[bold green]the server matches the run[/] ({result.items} items compared)"
        parts.append(verdict)
    return Group(*parts)


def _render_difference(pair: AnswerPair) -> list[RenderableType]:
    """Show an answer twice: as the run recorded it, and as the server gives it, from shortly before
    the place where they part."""
    common = count_common(pair.recorded, pair.served)
    start = max(0, common - MAX_ANSWER_CHARS // 4)
    lines: list[RenderableType] = []
    for label, text in (("recorded", pair.recorded), ("served", pair.served)):
        cut = ("… " if start else "") + text[start : start + MAX_ANSWER_CHARS]
        head = f"[dim]{escape_markup(pair.id)} {label}:[/]"
        lines.append(Text.from_markup(f"{head} {format_single_line(cut)}", emoji=False))
    return lines
