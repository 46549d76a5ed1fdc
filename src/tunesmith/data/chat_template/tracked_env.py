"""The Jinja environment of tracked renders: tracked versions of all that makes or prints text.

What has no tracked version is refused by name when a render reaches it. `sandbox_limits.py` bounds
the cost of everything here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2.filters import FILTERS, do_title

from tunesmith.data.chat_template.jinja_env import (
    dump_plain_json,
    format_date,
    get_jinja_globals,
    get_jinja_settings,
)
from tunesmith.data.chat_template.sandbox_checks import DIRECTIVE, add_terms, check_directives
from tunesmith.data.chat_template.sandbox_limits import (
    ALLOWED_FILTERS,
    CHARS_PER_TICK,
    LimitedEnvironment,
)
from tunesmith.data.chat_template.tracked_str import (
    TrackedStr,
    UntrackedTextError,
    concat,
    count_runs,
    find_shared_origin,
    remap,
    stringify,
    track_str,
)

_MISSING = object()


class TrackedEnvironment(LimitedEnvironment):
    def __init__(self, now: datetime) -> None:
        functions = get_jinja_globals()
        functions["strftime_now"] = lambda date_format: track_str(format_date(now, date_format))
        super().__init__(_FILTERS, functions, finalize=stringify, **get_jinja_settings())
        self.concat = self._concat

    def charge(self, value: Any) -> Any:
        if type(value) is TrackedStr:
            self.work += count_runs(value) // CHARS_PER_TICK
        return super().charge(value)

    def concat_output(self, pieces: Iterable[str]) -> TrackedStr:
        """Join output: expressions print tracked text, plain pieces are the template's text."""
        tracked: list[TrackedStr] = []
        for piece in self.limit_output(pieces):
            tracked.append(piece if type(piece) is TrackedStr else track_str(piece))
        return concat(tracked)

    def _concat(self, pieces: Iterable[str]) -> TrackedStr:
        return self.charge(self.concat_output(pieces))

    def apply_binop(self, operator: str, first: Any, second: Any) -> Any:
        """Apply `*`, `%` or `**`; `+` and `~` are filters, which take a whole chain at once."""
        if operator == "%" and isinstance(first, str):
            return _format_percent(stringify(first), second)
        return super().apply_binop(operator, first, second)


# ---------------------------------------------------------------- operators


def _format_percent(pattern: TrackedStr, values: Any) -> TrackedStr:
    """Format %s and %%; other directives are refused."""
    check_directives(pattern)
    arguments = iter(values if isinstance(values, tuple) else (values,))
    pieces: list[str] = []
    position = 0
    for match in DIRECTIVE.finditer(pattern):
        pieces.append(pattern[position : match.start()])
        position = match.end()
        if match[1] == "%":
            pieces.append(pattern[position - 1])
            continue
        argument = next(arguments, _MISSING)
        if argument is _MISSING:
            raise TypeError("not enough arguments for format string")
        pieces.append(stringify(argument))
    if next(arguments, _MISSING) is not _MISSING and not isinstance(values, dict):
        raise TypeError("not all arguments converted during string formatting")
    return concat([*pieces, pattern[position:]])


def _add_tracked(values: list[Any]) -> Any:
    if all(type(value) is TrackedStr for value in values):
        return concat(values)
    return add_terms(values)


# ---------------------------------------------------------------- filters


def _join_tracked(values: Any, d: str = "", attribute: str | int | None = None) -> TrackedStr:
    if attribute is not None:
        raise UntrackedTextError("join with an attribute")
    return stringify(d).join([stringify(value) for value in values])


def _replace_tracked(text: Any, old: str, new: str, count: int | None = None) -> TrackedStr:
    return stringify(text).replace(old, new, -1 if count is None else count)


def _indent_tracked(
    text: Any, width: int = 4, first: bool = False, blank: bool = False
) -> TrackedStr:
    margin = track_str(" " * width)
    newline = track_str("\n")
    lines: list[TrackedStr] = []
    for i, line in enumerate((stringify(text) + newline).splitlines()):
        should_indent = first if i == 0 else bool(line) or blank
        lines.append(margin + line if should_indent else line)
    return newline.join(lines)


def _dump_tracked_json(value: Any, *args: Any, **settings: Any) -> TrackedStr:
    """Dump JSON; all of it has the one origin of the strings inside."""
    return track_str(dump_plain_json(value, *args, **settings), find_shared_origin(value))


# Filters that make text are replaced. The other allowed ones return what they were given, a number
# or an iterator.
_FILTERS: dict[str, Callable[..., Any]] = {name: FILTERS[name] for name in ALLOWED_FILTERS} | {
    "+": _add_tracked,
    "~": lambda values: concat([stringify(value) for value in values]),
    "list": list,
    "string": stringify,
    "safe": stringify,
    "trim": lambda text, chars=None: stringify(text).strip(chars),
    "upper": lambda text: stringify(text).upper(),
    "lower": lambda text: stringify(text).lower(),
    "capitalize": lambda text: stringify(text).capitalize(),
    "title": lambda text: remap(stringify(text), do_title(text), "title"),
    "replace": _replace_tracked,
    "join": _join_tracked,
    "indent": _indent_tracked,
    "format": lambda pattern, *values: _format_percent(stringify(pattern), values),
    "tojson": _dump_tracked_json,
}
