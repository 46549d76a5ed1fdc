"""The Jinja environment of a tracked render: tracked versions of all that makes or prints text.

    TrackedEnvironment(now): its templates write tracked text

What has no tracked version is refused by name when a render reaches it. What all of it may cost is in budget.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2.filters import FILTERS, do_title

from tunesmith.data.chat_template.jinja_env import formatted, names, settings, stock_json
from tunesmith.data.chat_template.sandbox_checks import DIRECTIVE, added, check_directives
from tunesmith.data.chat_template.sandbox_limits import USABLE, Budgeted
from tunesmith.data.chat_template.tracked_str import (
    LostOrigin,
    Tracked,
    changed,
    concat,
    literal,
    shared_origin,
    written,
)


class TrackedEnvironment(Budgeted):
    def __init__(self, now: datetime) -> None:
        functions = names() | {"strftime_now": lambda form: literal(formatted(now, form))}
        super().__init__(_FILTERS, functions, finalize=written, **settings())
        self.concat = self._concat

    def output(self, pieces: Iterable[str]) -> Tracked:
        """Plain pieces are the template's own text, what expressions print is tracked."""
        return concat([piece if type(piece) is Tracked else literal(piece) for piece in self.bounded(pieces)])

    def _concat(self, pieces: Iterable[str]) -> Tracked:
        return self.charge(self.output(pieces))

    def binop(self, operator: str, left: Any, right: Any) -> Any:
        """`*`, `%` and `**`; `+` and `~` are filters, which take a whole chain at once."""
        if operator == "%" and isinstance(left, str):
            return _percent(written(left), right)
        return super().binop(operator, left, right)


# ---------------------------------------------------------------- operators


def _percent(pattern: Tracked, values: Any) -> Tracked:
    """For %s and %% only."""
    check_directives(pattern)
    rest = list(values) if isinstance(values, tuple) else [values]
    pieces: list[str] = []
    at = 0
    for match in DIRECTIVE.finditer(pattern):
        pieces += [pattern[at : match.start()], written(rest.pop(0)) if match[1] == "s" else pattern[match.end() - 1]]
        at = match.end()
    if rest and not isinstance(values, dict):
        raise TypeError("not all arguments converted during string formatting")
    return concat([*pieces, pattern[at:]])


def _add(values: list[Any]) -> Any:
    return concat(values) if all(type(value) is Tracked for value in values) else added(values)


# ---------------------------------------------------------------- filters


def _join(values: Any, d: str = "", attribute: str | int | None = None) -> Tracked:
    if attribute is not None:
        raise LostOrigin("join with an attribute")
    return written(d).join([written(value) for value in values])


def _replace(text: Any, old: str, new: str, count: int | None = None) -> Tracked:
    return written(text).replace(old, new, -1 if count is None else count)


def _indent(text: Any, width: int = 4, first: bool = False, blank: bool = False) -> Tracked:
    margin, newline = literal(" " * width), literal("\n")
    lines = (written(text) + newline).splitlines()
    wanted = [first if i == 0 else bool(line) or blank for i, line in enumerate(lines)]
    return newline.join([margin + line if wants else line for line, wants in zip(lines, wanted, strict=True)])


def _json(value: Any, *given: Any, **settings: Any) -> Tracked:
    """JSON text, all of it of the one origin that the texts inside have."""
    return literal(stock_json(value, *given, **settings), shared_origin(value))


# These make text; the rest of those that templates may use give back what they were given, numbers, or an iterator.
_FILTERS: dict[str, Callable[..., Any]] = {name: FILTERS[name] for name in USABLE} | {
    "+": _add,
    "~": lambda values: concat([written(value) for value in values]),
    "list": list,
    "string": written,
    "safe": written,
    "trim": lambda text, chars=None: written(text).strip(chars),
    "upper": lambda text: written(text).upper(),
    "lower": lambda text: written(text).lower(),
    "capitalize": lambda text: written(text).capitalize(),
    "title": lambda text: changed(written(text), do_title(text), "title"),
    "replace": _replace,
    "join": _join,
    "indent": _indent,
    "format": lambda pattern, *values: _percent(written(pattern), values),
    "tojson": _json,
}
