"""A table of a result, as text: the terminal and the page of a run show the same one.

evaluate/scale_choice.py -> TextTable -> cli/views (rich) and report/templates (Jinja)"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextTable:
    """Rows of cells below their columns; the last column is text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
