"""Values as people read them, in the terminal and on pages. In: a value. Out: a few words."""

from __future__ import annotations

from typing import Any, cast

from tunesmith.core.types import Finding, Json

MAX_ROW_IDS = 5


def format_duration(seconds: float) -> str:
    """4 s, 3:20 min, 5:07 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    large, small = divmod(round(seconds), 60) if seconds < 3600 else divmod(round(seconds / 60), 60)
    return f"{large}:{small:02d} {'min' if seconds < 3600 else 'h'}"


def format_value(value: Any) -> str:
    """A chosen value as a recipe would hold it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {format_value(item)}" for name, item in cast("Json", value).items()
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(item) for item in value) or "-"
    return str(value)


def format_rows(finding: Finding) -> str:
    """The first rows of a finding; --json names the others."""
    remaining = len(finding.rows) - MAX_ROW_IDS
    return ", ".join(finding.rows[:MAX_ROW_IDS]) + (
        f" and {remaining:,} more" if remaining > 0 else ""
    )
