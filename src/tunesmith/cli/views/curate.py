"""Views of `data curate`: the subsets, and why rows were not selected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from tunesmith.cli.output import escape_markup
from tunesmith.cli.views import make_table

if TYPE_CHECKING:
    from tunesmith.advise.curate import CurationResult


def render_curation(curation: CurationResult) -> RenderableType:
    """Show the selected subset with the baselines it has to beat, and why rows were rejected."""
    numbers = ("rows", "answer tokens", "perplexity", "difficulty", "shared rows")
    table = make_table("Subsets, with median scores", "file", *numbers, numbers=numbers)
    for subset in curation.subsets:
        table.add_row(
            f"{subset.name}.jsonl",
            f"{subset.rows:,}",
            f"{subset.answer_tokens:,.0f}",
            f"{subset.perplexity:.2f}",
            f"{subset.difficulty:.3f}",
            f"{subset.shared_rows:,}",
        )
    reasons = make_table("", "not selected", "rows", numbers=("rows",))
    for reason, rows in curation.reasons.items():
        reasons.add_row(escape_markup(reason), f"{rows:,}")
    return Group(table, reasons, escape_markup(curation.path))
