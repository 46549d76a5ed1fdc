"""Values as people read them, in the terminal and on pages."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

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


def hide_folders(text: str, paths: Iterable[str | Path], *quotes: Callable[[str], str]) -> str:
    """Return the text without the folders above `paths`: absolute ones name the user.

    `quotes` are how the text may write a path besides as it is, such as escaped HTML."""
    writings: list[Callable[[str], str]] = [str, *quotes]
    folders: dict[str, set[str]] = {}  # as written -> patterns of what may follow
    for path in map(Path, paths):
        if not path.is_absolute() and path.parts[:1] != ("~",):
            continue
        for quote in writings:
            if path.parent.name:
                names = folders.setdefault(quote(f"{path.parent}/"), set())
                names.add(re.escape(quote(path.name)))
            # a top folder such as /data is no one's, and too short to look for by itself
            deep_folders = [parent for parent in path.parents if len(parent.parts) > 2]
            folders.update({quote(f"{folder}/"): {""} for folder in deep_folders})
    for folder in sorted(folders, key=len, reverse=True):
        wrapped = re.escape(folder).replace(r"\ ", r"\s+")  # YAML breaks lines at spaces
        text = re.sub(rf"(?<![\w.-]){wrapped}(?={'|'.join(folders[folder])})", "", text)
    return text


def iter_paths(value: Any) -> Iterator[str]:
    """Yield the absolute paths in a value of JSON or YAML."""
    if isinstance(value, str) and value.startswith(("/", "~/")):
        yield value
    elif isinstance(value, dict):
        for item in cast("dict[str, Any]", value).values():
            yield from iter_paths(item)
    elif isinstance(value, (list, tuple)):
        for item in cast("list[Any]", value):
            yield from iter_paths(item)


def format_bytes(num_bytes: float) -> str:
    """Format bytes in powers of 1000: 1.9 GB."""
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def format_count(count: int, noun: str) -> str:
    """Format a number with its noun: 1 row, 2,000 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_ratio(ratio: float) -> str:
    """Format a ratio to a limit so that its side shows: 1.5 times, 0.98 times, just over."""
    if f"{ratio:.2f}" == "1.00":
        return "just over" if ratio > 1 else "just under"
    return f"{ratio:.{2 if abs(ratio - 1) < 0.05 else 1}f} times"


def format_duration(seconds: float) -> str:
    """Format a time: 4 s, 3 min 20 s, 5 h 7 min."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def format_duration_range(seconds: Sequence[float]) -> str:
    """Format a range of times, "4 s to 7 s"; one value if both ends look the same."""
    return " to ".join(dict.fromkeys(map(format_duration, seconds)))


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
        items = cast("dict[str, Any]", value).items()
        return ", ".join(f"{name} {format_value(item)}" for name, item in items)
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(item) for item in value) or "-"
    return str(value)


def format_rows(rows: Sequence[str]) -> str:
    """Format the first row ids of a finding; --json has all of them."""
    remaining = len(rows) - MAX_ROW_IDS
    more = f" and {remaining:,} more" if remaining > 0 else ""
    return ", ".join(rows[:MAX_ROW_IDS]) + more


def count_common(first: str | bytes, second: str | bytes) -> int:
    """Return how many characters or bytes two texts share from the start."""
    shortest = min(len(first), len(second))
    return next((i for i in range(shortest) if first[i] != second[i]), shortest)
