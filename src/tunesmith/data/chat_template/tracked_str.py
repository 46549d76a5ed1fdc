"""Text that knows who wrote each of its characters.

`Tracked` is a `str` that carries runs: `(length, origin, length, origin, ...)`. A template that joins, cuts, trims or
replaces tracked text gives tracked text. An operation that is not known here gives a plain `str`, and plain text is
refused as soon as it meets tracked text or the output: a lost origin is never taken for the template's.

An origin is a small number: TEMPLATE, VALUE (written from a number, or mixed), TOOLS, or `origin_of(message, field)`.
Which origin may become a control token is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

from jinja2 import TemplateError, Undefined

TEMPLATE, VALUE, TOOLS = 0, 1, 2
FIELDS = ("content", "reasoning", "tool_calls", "other")
MAX_CHARS = 10_000_000  # of any text that a template makes
MAX_ITEMS = 1_000_000  # of any list or structure that a template makes

Runs = tuple[int, ...]


class LostOrigin(TemplateError):
    """A construct of the template after which nobody knows who wrote the text."""

    def __init__(self, construct: str) -> None:
        super().__init__(f"{construct} is not supported: it hides which message a text comes from")


class TooLarge(TemplateError):
    """The template makes more than any chat needs."""


def origin_of(message: int, field: str) -> int:
    return 4 * (message + 1) + FIELDS.index(field)


def message_of(origin: int) -> int:
    """Index of the message that wrote it; -1 for the template, values and tools."""
    return (origin >> 2) - 1


class Tracked(str):
    __slots__ = ("_runs",)
    _runs: Runs  # the underscore keeps it out of reach of sandboxed templates, which see only what `str` has

    def __new__(cls, text: str, runs: Runs) -> Tracked:
        self = str.__new__(cls, text)
        self._runs = runs
        return self

    def __str__(self) -> Tracked:
        return self

    # ---- joining

    def __add__(self, other: str) -> Tracked:
        if type(other) is Tracked:
            return concat((self, other))
        return self if _is_empty(other) else NotImplemented

    def __radd__(self, other: str) -> Tracked:
        return self if _is_empty(other) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Tracked:
        times = max(0, times.__index__())
        if len(self) * times > MAX_CHARS:
            raise TooLarge(f"a text repeated {times} times")
        runs = self._runs
        return Tracked(str.__mul__(self, times), (runs[0] * times, runs[1]) if len(runs) == 2 else runs * times)

    def __rmul__(self, times: SupportsIndex) -> Tracked:
        return self * times

    def join(self, parts: Iterable[str], /) -> Tracked:
        pieces: list[str] = []
        for part in parts:
            pieces += [self, part] if pieces else [part]
        return concat(pieces)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Tracked:
        if not old:
            raise LostOrigin("replace of an empty text")
        return origin_kept(new).join(self.split(old, count)) if str.__contains__(self, old) else self

    # ---- cutting

    def _cut(self, start: int, end: int) -> Tracked:
        text = str.__getitem__(self, slice(start, end))
        if not text:
            return EMPTY
        if len(self._runs) == 2:
            return Tracked(text, (len(text), self._runs[1]))
        return Tracked(text, _cut_runs(self._runs, start, end))

    def __getitem__(self, key: SupportsIndex | slice) -> Tracked:
        if not isinstance(key, slice):
            index = range(len(self))[key]
            return self._cut(index, index + 1)
        start, end, step = key.indices(len(self))
        if step == 1:
            return self._cut(start, max(start, end))
        return concat([self._cut(index, index + 1) for index in range(start, end, step)])

    def __iter__(self) -> Iterator[Tracked]:
        if len(self) > MAX_ITEMS:
            raise TooLarge(f"a loop over {len(self)} characters")
        return (self._cut(index, index + 1) for index in range(len(self)))

    def lstrip(self, chars: str | None = None, /) -> Tracked:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> Tracked:
        return self._cut(0, len(str.rstrip(self, chars)))

    def strip(self, chars: str | None = None, /) -> Tracked:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> Tracked:
        return self._cut(len(prefix), len(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> Tracked:
        return self._cut(0, len(self) - len(suffix)) if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Tracked]:  # pyright: ignore
        return self._pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Tracked]:  # pyright: ignore
        return self._pieces(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[Tracked]:  # pyright: ignore
        lines = self._pieces(str.splitlines(self, True), "")
        if keepends:
            return lines
        return [line._cut(0, len(bare)) for line, bare in zip(lines, str.splitlines(self), strict=True)]

    def _pieces(self, texts: list[str], separator: str | None) -> list[Tracked]:
        if len(texts) > MAX_ITEMS:
            raise TooLarge(f"a text split into {len(texts)} parts")
        pieces: list[Tracked] = []
        at = 0
        for text in texts:
            at = str.index(self, text, at) if separator is None else at
            pieces.append(self._cut(at, at + len(text)))
            at += len(text) + len(separator or "")
        return pieces

    def partition(self, sep: str, /) -> tuple[Tracked, Tracked, Tracked]:
        at = len(str.partition(self, sep)[0])
        return self._cut(0, at), self._cut(at, at + len(sep)), self._cut(at + len(sep), len(self))

    def rpartition(self, sep: str, /) -> tuple[Tracked, Tracked, Tracked]:
        at = len(self) - len(str.rpartition(self, sep)[2])
        begin = at - len(sep) if at else 0
        return self._cut(0, begin), self._cut(begin, at), self._cut(at, len(self))

    # ---- letter by letter

    def upper(self) -> Tracked:
        return changed(self, str.upper(self), "upper")

    def lower(self) -> Tracked:
        return changed(self, str.lower(self), "lower")

    def casefold(self) -> Tracked:
        return changed(self, str.casefold(self), "casefold")

    def swapcase(self) -> Tracked:
        return changed(self, str.swapcase(self), "swapcase")

    def title(self) -> Tracked:
        return changed(self, str.title(self), "title")

    def capitalize(self) -> Tracked:
        return changed(self, str.capitalize(self), "capitalize")


EMPTY = Tracked("", ())


def literal(text: str, origin: int = TEMPLATE) -> Tracked:
    return Tracked(text, (len(text), origin)) if text else EMPTY


def concat(pieces: Sequence[str]) -> Tracked:
    """Tracked texts, one after the other."""
    runs: list[int] = []
    size = 0
    for piece in pieces:
        if type(piece) is Tracked:
            size += len(piece)
            if size > MAX_CHARS:
                raise TooLarge(f"a text of more than {MAX_CHARS} characters")
            more = piece._runs
            if runs and more and runs[-1] == more[1]:
                runs[-2] += more[0]
                more = more[2:]
            runs += more
        elif not _is_empty(piece):
            raise TypeError(f"expected a text, got {type(piece).__name__}")
    return Tracked("".join(pieces), tuple(runs))


def changed(text: Tracked, new: str, construct: str) -> Tracked:
    """`new` is `text` changed letter by letter, or of its single origin whatever happened to it."""
    if len(new) == len(text):
        return Tracked(new, text._runs)
    if len(set(text._runs[1::2])) == 1:
        return literal(new, text._runs[1])
    raise LostOrigin(f"{construct} that changes the length")


def written(value: Any) -> Tracked:
    """What a template prints for a value; numbers and the like have no writer (VALUE)."""
    if type(value) is Tracked:
        return value
    if isinstance(value, str):
        return origin_kept(value)
    origin = shared_origin(value)  # first, since it bounds the size
    return literal(str(value), origin)


def shared_origin(value: Any) -> int:
    """The origin of all texts inside a structure: the template's only if nobody else wrote in it; VALUE if mixed."""
    origins: set[int] = set()
    stack, items, chars = [value], 0, 0
    while stack:
        item = stack.pop()
        items += 1
        if isinstance(item, str):
            origins.update(origin_kept(item)._runs[1::2])
            chars += len(item)
        elif isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, (list, tuple)):
            stack += item
        elif not isinstance(item, (int, float, type(None), Undefined)):
            raise LostOrigin(f"a {type(item).__name__} as text")
        if items + len(stack) > MAX_ITEMS or chars > MAX_CHARS:
            raise TooLarge(f"a structure of more than {MAX_ITEMS} parts or {MAX_CHARS} characters")
    owners = origins - {TEMPLATE}
    if not origins or len(owners) > 1:
        return VALUE
    return owners.pop() if owners else TEMPLATE


def origin_kept(text: str) -> Tracked:
    """Plain text has lost its origin and is refused, but for the empty one."""
    if type(text) is Tracked:
        return text
    if text:
        raise LostOrigin(f"text of unknown origin ({text[:40]!r})")
    return EMPTY


def plain(text: Tracked) -> str:
    return str.__str__(text)


def stretches(text: Tracked) -> Iterator[tuple[int, int, int]]:
    """(start, end, origin) of the longest stretches of one origin, in order."""
    start, end, writer = 0, 0, -1
    for length, origin in zip(text._runs[::2], text._runs[1::2], strict=True):
        if origin != writer:
            if end > start:
                yield start, end, writer
            start, writer = end, origin
        end += length
    if end > start:
        yield start, end, writer


def _cut_runs(runs: Runs, start: int, end: int) -> Runs:
    kept: list[int] = []
    at = 0
    for length, origin in zip(runs[::2], runs[1::2], strict=True):
        inside = min(at + length, end) - max(at, start)
        if inside > 0:
            kept += (inside, origin)
        at += length
        if at >= end:
            break
    return tuple(kept)


def _is_empty(value: object) -> bool:
    return isinstance(value, str) and not origin_kept(value)
