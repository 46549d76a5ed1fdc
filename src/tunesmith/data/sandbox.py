"""The Jinja environment of a tracked render: budgets, and tracked versions of all that makes or prints text.

    TrackedEnvironment(now): its templates write tracked text

What has no tracked version is refused by name when a render reaches it. Everything that a template makes is paid for
from a budget of work (loop turns, calls, list items, characters) and time, so that no template, however hostile, hangs
or fills the memory.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import pass_environment
from jinja2.filters import FILTERS, do_title
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunesmith.data.jinja import NoFolding, names, settings, stock_json
from tunesmith.data.tracked import (
    MAX_CHARS,
    MAX_ITEMS,
    LostOrigin,
    TooLarge,
    Tracked,
    changed,
    concat,
    literal,
    shared_origin,
    written,
)

MAX_WORK = 1_000_000  # loop turns, calls, list items, and CHARS_PER_TICK characters each
CHARS_PER_TICK = 100
MAX_SECONDS = 10.0
MAX_INTEGER_BITS = 4096
MAX_INDENT = 64
REMEMBERED = 1_000  # attributes known to be safe, or not

# Attributes whose result has no origin, or that build things of any size.
_CLOSED = {
    str: {"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans", "encode"},
    int: set(dir(int)),
    float: set(dir(float)),
}
_DIRECTIVE = re.compile(r"%(.)?", re.DOTALL)


class TrackedEnvironment(ImmutableSandboxedEnvironment):
    code_generator_class = NoFolding
    intercepted_binops = frozenset({"*", "%", "**"})

    def __init__(self, now: datetime) -> None:
        super().__init__(finalize=written, **settings())
        self.concat = self._concat
        self.filters = {name: _refusal(f"the filter {name!r}") for name in FILTERS} | _FILTERS
        self.globals |= names()
        self.globals["strftime_now"] = lambda form: literal(_formatted(now, form))
        self.globals["lipsum"] = _refusal("lipsum()")
        self._safe: dict[tuple[type, str], bool] = {}
        self.start_budget()

    def start_budget(self) -> None:
        self.work, self.deadline = 0, time.monotonic() + MAX_SECONDS

    def tick(self, work: int = 1) -> None:
        self.work += work
        if self.work > MAX_WORK:
            raise TooLarge(f"more than {MAX_WORK} loop turns, calls and list items")
        if time.monotonic() > self.deadline:
            raise TooLarge(f"a render of more than {MAX_SECONDS:.0f} seconds")

    def charge(self, made: Any) -> Any:
        """Give back what was made, after paying for its size: what a render can hold stays bounded."""
        if isinstance(made, str):
            self.tick(1 + len(made) // CHARS_PER_TICK)
        else:
            self.tick(1 + len(made) if isinstance(made, (list, tuple, dict)) else 1)
        return made

    def output(self, pieces: Iterable[str]) -> Tracked:
        """Plain pieces are the template's own text, what expressions print is tracked."""
        kept: list[str] = []
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > MAX_CHARS:
                raise TooLarge(f"an output of more than {MAX_CHARS} characters")
            kept.append(piece if type(piece) is Tracked else literal(piece))
        return concat(kept)

    def _concat(self, pieces: Iterable[str]) -> Tracked:
        return self.charge(self.output(pieces))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002
        return self.charge(_binop(operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        return __self.charge(super().call(__context, __obj, *args, **kwargs))

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:  # once an item of `map`
        self.tick()
        return super().call_filter(*args, **kwargs)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:  # once an item of `select` and `reject`
        self.tick()
        return super().call_test(*args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, closed in _CLOSED.items():
            if isinstance(obj, kind) and attr in closed:
                raise LostOrigin(f"{kind.__name__}.{attr}")
        place = type(obj), attr  # all that jinja's own answer depends on, which it takes long to find
        if place not in self._safe:
            if len(self._safe) == REMEMBERED:
                self._safe.clear()
            self._safe[place] = super().is_safe_attribute(obj, attr, value)
        return self._safe[place]

    def wrap_str_format(self, value: Any) -> None:
        if getattr(value, "__name__", "") in ("format", "format_map"):
            raise LostOrigin(f"str.{value.__name__}")


def _formatted(now: datetime, form: str) -> str:
    if len(form) > 200 or re.search(r"%\W*\d", form):
        raise TooLarge("strftime_now with a width")
    return now.strftime(form)


# ---------------------------------------------------------------- operators


def _binop(operator: str, left: Any, right: Any) -> Any:
    """`*`, `%` and `**`; `+` and `~` are filters, which take a whole chain at once."""
    if operator == "%":
        return _percent(written(left), right) if isinstance(left, str) else left % right
    for many, times in ((left, right), (right, left)):
        if isinstance(many, (list, tuple, str)) and isinstance(times, int) and len(many) * times > MAX_ITEMS:
            raise TooLarge(f"something repeated {times} times")
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise TooLarge("a very large number")
    return left * right if operator == "*" else left**right


def _percent(pattern: Tracked, values: Any) -> Tracked:
    """For %s and %% only."""
    rest = list(values) if isinstance(values, tuple) else [values]
    pieces: list[str] = []
    at = 0
    for match in _DIRECTIVE.finditer(pattern):
        if match[1] not in ("s", "%"):
            raise LostOrigin(f"{match[0]} in a % format")
        pieces += [pattern[at : match.start()], written(rest.pop(0)) if match[1] == "s" else pattern[match.end() - 1]]
        at = match.end()
    if rest and not isinstance(values, dict):
        raise TypeError("not all arguments converted during string formatting")
    return concat([*pieces, pattern[at:]])


def _add(values: list[Any]) -> Any:
    if all(type(value) is Tracked for value in values):
        return concat(values)
    total = values[0]
    for value in values[1:]:
        total = total + value
        if isinstance(total, (list, tuple)) and len(total) > MAX_ITEMS:
            raise TooLarge(f"a list of more than {MAX_ITEMS} items")
    return total


# ---------------------------------------------------------------- filters


def _join(values: Any, d: str = "", attribute: str | int | None = None) -> Tracked:
    if attribute is not None:
        raise LostOrigin("join with an attribute")
    return written(d).join([written(value) for value in values])


def _replace(text: Any, old: str, new: str, count: int | None = None) -> Tracked:
    return written(text).replace(old, new, -1 if count is None else count)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Tracked:
    if isinstance(width, str) or not 0 <= width <= MAX_INDENT:
        raise LostOrigin(f"indent by a text or by more than {MAX_INDENT}")
    margin, newline = literal(" " * width), literal("\n")
    lines = (written(text) + newline).splitlines()
    wanted = [first if i == 0 else bool(line) or blank for i, line in enumerate(lines)]
    return newline.join([margin + line if wants else line for line, wants in zip(lines, wanted, strict=True)])


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Tracked:
    """JSON text, all of it of the one origin that the texts inside have."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > MAX_INDENT:
        raise TooLarge(f"tojson with an indent above {MAX_INDENT}")
    origin = shared_origin(value)
    return literal(stock_json(value, ensure_ascii, indent, separators, sort_keys), origin)


def _refusal(construct: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise LostOrigin(construct)

    return refuse


def _charged(make: Callable[..., Any], *, knows_environment: bool = False) -> Callable[..., Any]:
    @pass_environment
    def charged(environment: TrackedEnvironment, *args: Any, **kwargs: Any) -> Any:
        return environment.charge(make(*((environment,) if knows_environment else ()), *args, **kwargs))

    return charged


# These give back what they were given, numbers, or an iterator over it.
_HARMLESS = re.findall(
    r"\w+",
    "abs attr count d default first float int items last length map max min reject rejectattr reverse select"
    " selectattr sum unique wordcount",
)
_MAKERS: dict[str, Callable[..., Any]] = {
    "tick": lambda value: value,
    "+": _add,
    "~": lambda values: concat([written(value) for value in values]),
    "list": list,
    "dictsort": FILTERS["dictsort"],
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
_FILTERS: dict[str, Callable[..., Any]] = (
    {name: FILTERS[name] for name in _HARMLESS}
    | {name: _charged(make) for name, make in _MAKERS.items()}
    | {name: _charged(FILTERS[name], knows_environment=True) for name in ("sort", "groupby")}
)
