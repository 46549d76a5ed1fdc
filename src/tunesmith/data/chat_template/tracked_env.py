"""The Jinja environment of a tracked render: tracked versions of all that makes or prints text.

    TrackedEnvironment(now): its templates write tracked text

What has no tracked version is refused by name when a render reaches it. What all of it may cost is
in budget.py."""

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
from tunesmith.data.chat_template.sandbox_limits import ALLOWED_FILTERS, LimitedEnvironment
from tunesmith.data.chat_template.tracked_str import (
    TrackedStr,
    UntrackedTextError,
    concat,
    find_shared_origin,
    remap,
    stringify,
    track_str,
)


class TrackedEnvironment(LimitedEnvironment):
    def __init__(self, now: datetime) -> None:
        functions = get_jinja_globals() | {
            "strftime_now": lambda date_format: track_str(format_date(now, date_format))
        }
        super().__init__(_FILTERS, functions, finalize=stringify, **get_jinja_settings())
        self.concat = self._concat

    def concat_output(self, pieces: Iterable[str]) -> TrackedStr:
        """Plain pieces are the template's own text, what expressions print is tracked."""
        return concat(
            [
                piece if type(piece) is TrackedStr else track_str(piece)
                for piece in self.limit_output(pieces)
            ]
        )

    def _concat(self, pieces: Iterable[str]) -> TrackedStr:
        return self.charge(self.concat_output(pieces))

    def apply_binop(self, operator: str, first: Any, second: Any) -> Any:
        """`*`, `%` and `**`; `+` and `~` are filters, which take a whole chain at once."""
        if operator == "%" and isinstance(first, str):
            return _format_percent(stringify(first), second)
        return super().apply_binop(operator, first, second)


# ---------------------------------------------------------------- operators


def _format_percent(pattern: TrackedStr, values: Any) -> TrackedStr:
    """For %s and %% only."""
    check_directives(pattern)
    arguments = list(values) if isinstance(values, tuple) else [values]
    pieces: list[str] = []
    position = 0
    for match in DIRECTIVE.finditer(pattern):
        pieces += [
            pattern[position : match.start()],
            stringify(arguments.pop(0)) if match[1] == "s" else pattern[match.end() - 1],
        ]
        position = match.end()
    if arguments and not isinstance(values, dict):
        raise TypeError("not all arguments converted during string formatting")
    return concat([*pieces, pattern[position:]])


def _add_tracked(values: list[Any]) -> Any:
    return (
        concat(values) if all(type(value) is TrackedStr for value in values) else add_terms(values)
    )


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
    margin, newline = track_str(" " * width), track_str("\n")
    lines = (stringify(text) + newline).splitlines()
    indent_flags = [first if i == 0 else bool(line) or blank for i, line in enumerate(lines)]
    return newline.join(
        [
            margin + line if should_indent else line
            for line, should_indent in zip(lines, indent_flags, strict=True)
        ]
    )


def _dump_tracked_json(value: Any, *args: Any, **settings: Any) -> TrackedStr:
    """JSON text, all of it of the one origin that the texts inside have."""
    return track_str(dump_plain_json(value, *args, **settings), find_shared_origin(value))


# These make text; the rest of those that templates may use give back what they were given, numbers,
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
