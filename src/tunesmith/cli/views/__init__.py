"""Tables and views of the terminal: frozen results in, things that `rich` can print out.

Programs read the JSON instead. Left out: computing anything that a view shows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def make_table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    """Make a borderless table; columns named in `numbers` are right-aligned."""
    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, show_header=bool(columns)
    )
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table
