"""Values as people read them, in the terminal and on pages. In: a value. Out: a few words."""

from __future__ import annotations

from typing import Any, cast

from tunesmith.core.types import Finding, Json

SHOWN_ROWS = 5


def duration(seconds: float) -> str:
    """4 s, 3:20 min, 5:07 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    large, small = divmod(round(seconds), 60) if seconds < 3600 else divmod(round(seconds / 60), 60)
    return f"{large}:{small:02d} {'min' if seconds < 3600 else 'h'}"


def value_text(value: Any) -> str:
    """A chosen value as a recipe would hold it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {value_text(item)}" for name, item in cast("Json", value).items())
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(item) for item in value) or "-"
    return str(value)


def some_rows(finding: Finding) -> str:
    """The first rows of a finding; --json names the others."""
    more = len(finding.rows) - SHOWN_ROWS
    return ", ".join(finding.rows[:SHOWN_ROWS]) + (f" and {more:,} more" if more > 0 else "")
