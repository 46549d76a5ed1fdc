"""Values as people read them, in the terminal and on pages."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, cast

from tunesmith.core.types import Finding, Json

MAX_ROW_IDS = 5
HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate, separators
# line breaks and tabs, and the joiners that emoji and several scripts need
HARMLESS = "\n\t\u200c\u200d"


def escape_controls(text: str, *, keep: str = HARMLESS, json: bool = False) -> str:
    """Return the text with control characters made visible: terminal escapes, C0 and C1 controls,
    bidirectional overrides and invisible characters. With `json`, as escapes of JSON strings."""
    if text.isprintable():
        return text
    escape = _escape_for_json if json else _escape_hidden
    return "".join(
        escape(character)
        if character not in keep and unicodedata.category(character) in HIDDEN_CATEGORIES
        else character
        for character in text
    )


def _escape_hidden(character: str) -> str:
    return f"\\u{{{ord(character):x}}}"


def _escape_for_json(character: str) -> str:
    units = character.encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def format_bytes(num_bytes: float) -> str:
    """Format bytes in powers of 1000: 1.9 GB."""
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def format_count(count: int, noun: str) -> str:
    """Format a number with its noun: 1 row, 2,000 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Format a time: 4 s, 3:20 min, 5:07 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}:{minutes:02d} h"


def suggest_name(name: str, names: Iterable[str], default: str = "", *, quote: str = "") -> str:
    """Return "did you mean ...?" with the closest of `names`, or `default` if none is close."""
    matches = get_close_matches(name, list(names), n=1)
    return f"did you mean {quote}{matches[0]}{quote}?" if matches else default


def format_value(value: Any) -> str:
    """Format a setting as a recipe would hold it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        items = cast("Json", value).items()
        return ", ".join(f"{name} {format_value(item)}" for name, item in items)
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(item) for item in value) or "-"
    return str(value)


def format_rows(finding: Finding) -> str:
    """Format the first row ids of a finding; --json has all of them."""
    remaining = len(finding.rows) - MAX_ROW_IDS
    more = f" and {remaining:,} more" if remaining > 0 else ""
    return ", ".join(finding.rows[:MAX_ROW_IDS]) + more
