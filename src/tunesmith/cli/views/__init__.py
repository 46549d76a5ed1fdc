"""Tables and views of the terminal: frozen results in, things that `rich` can print out.

Programs read the JSON instead. Left out: computing anything that a view shows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from tunesmith.core.document import TextTable


def make_table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    """Make a borderless table; columns named in `numbers` are right-aligned."""
    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, show_header=bool(columns)
    )
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def render_table(content: TextTable) -> Table:
    """Show a table of a result."""
    table = make_table(content.title, *content.columns, numbers=content.columns[:-1])
    for row in content.rows:
        table.add_row(*map(Text, row))
    return table
