"""A `str` that knows who wrote each of its characters.

`TrackedStr` carries runs: (length, origin, length, origin, ...). A template that joins, slices,
strips or replaces tracked text makes tracked text. An operation without a tracked version makes a
plain `str`, which is refused as soon as it meets tracked text or the output: text of unknown origin
never passes for the template's.

An origin is a small number: TEMPLATE, VALUE (printed from a number, or of mixed origin), TOOLS, or
`make_origin(message, field)`. `encode.py` decides which origins may make a control token."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, SupportsIndex

from jinja2 import TemplateError, Undefined

TEMPLATE = 0
VALUE = 1
TOOLS = 2
FIELDS = ("content", "reasoning", "tool_calls", "other")

Runs = tuple[int, ...]


class UntrackedTextError(TemplateError):
    """A template construct that loses the origin of text."""

    def __init__(self, construct: str) -> None:
        super().__init__(f"{construct} is not supported: it hides which message a text comes from")


def make_origin(message: int, field: str) -> int:
    """Return the origin of one of the FIELDS of a message."""
    return 4 * (message + 1) + FIELDS.index(field)


def get_message_index(origin: int) -> int:
    """Return the index of the message that an origin belongs to; -1 for the template, values and
    tools."""
    return (origin >> 2) - 1


class TrackedStr(str):
    __slots__ = ("_ends", "_runs")
    # the underscore keeps it out of reach of sandboxed templates, which see only what `str` has
    _runs: Runs
    _ends: list[int] | None  # of each run, as soon as a part of the text is cut out

    def __new__(cls, text: str, runs: Runs) -> TrackedStr:
        self = str.__new__(cls, text)
        self._runs = runs
        self._ends = None
        return self

    def __str__(self) -> TrackedStr:
        return self

    # ---- joining

    def __add__(self, other: str) -> TrackedStr:
        if type(other) is TrackedStr:
            return concat((self, other))
        return self if _is_empty(other) else NotImplemented

    def __radd__(self, other: str) -> TrackedStr:
        return self if _is_empty(other) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> TrackedStr:
        times = max(0, times.__index__())
        runs = self._runs
        runs = (runs[0] * times, runs[1]) if len(runs) == 2 else runs * times
        return TrackedStr(str.__mul__(self, times), runs)

    def __rmul__(self, times: SupportsIndex) -> TrackedStr:
        return self * times

    def join(self, parts: Iterable[str], /) -> TrackedStr:
        pieces: list[str] = []
        for part in parts:
            pieces += [self, part] if pieces else [part]
        return concat(pieces)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> TrackedStr:
        if not old:
            raise UntrackedTextError("replace of an empty text")
        if not str.__contains__(self, old):
            return self
        return require_tracked(new).join(self.split(old, count))

    # ---- cutting

    def _slice(self, start: int, end: int) -> TrackedStr:
        text = str.__getitem__(self, slice(start, end))
        if not text:
            return EMPTY
        if len(self._runs) == 2:
            return TrackedStr(text, (len(text), self._runs[1]))
        return TrackedStr(text, self._cut_runs(start, end))

    def _cut_runs(self, start: int, end: int) -> Runs:
        """Return the runs of the characters start:end, of which there is at least one."""
        if self._ends is None:
            self._ends = list(accumulate(self._runs[::2]))
        first = bisect_right(self._ends, start)
        last = bisect_right(self._ends, end - 1)
        runs = list(self._runs[2 * first : 2 * last + 2])
        runs[0] = self._ends[first] - start
        runs[-2] += end - self._ends[last]
        return tuple(runs)

    def __getitem__(self, key: SupportsIndex | slice) -> TrackedStr:
        if not isinstance(key, slice):
            index = range(len(self))[key]
            return self._slice(index, index + 1)
        start, end, step = key.indices(len(self))
        if step == 1:
            return self._slice(start, max(start, end))
        return self._pick(key)

    def _pick(self, key: slice) -> TrackedStr:
        """Return the characters of a slice with a step."""
        indices = range(len(self))[key]
        ascending = indices if indices.step > 0 else indices[::-1]
        spans: list[Runs] = []
        position = 0
        for length, origin in zip(self._runs[::2], self._runs[1::2], strict=True):
            end = position + length
            count = bisect_left(ascending, end) - bisect_left(ascending, position)
            if count:
                spans.append((count, origin))
            position = end
        if indices.step < 0:
            spans.reverse()
        return TrackedStr(str.__getitem__(self, key), tuple(chain.from_iterable(spans)))

    def __iter__(self) -> Iterator[TrackedStr]:
        return (self._slice(index, index + 1) for index in range(len(self)))

    def lstrip(self, chars: str | None = None, /) -> TrackedStr:
        return self._slice(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> TrackedStr:
        return self._slice(0, len(str.rstrip(self, chars)))

    def strip(self, chars: str | None = None, /) -> TrackedStr:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> TrackedStr:
        return self._slice(len(prefix), len(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> TrackedStr:
        return self._slice(0, len(self) - len(suffix)) if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[TrackedStr]:  # pyright: ignore
        return self._track_parts(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[TrackedStr]:  # pyright: ignore
        return self._track_parts(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[TrackedStr]:  # pyright: ignore
        lines = self._track_parts(str.splitlines(self, True), "")
        if keepends:
            return lines
        bare_lines = zip(lines, str.splitlines(self), strict=True)
        return [line._slice(0, len(bare)) for line, bare in bare_lines]

    def _track_parts(self, texts: list[str], separator: str | None) -> list[TrackedStr]:
        pieces: list[TrackedStr] = []
        position = 0
        for text in texts:
            if separator is None:
                position = str.index(self, text, position)
            pieces.append(self._slice(position, position + len(text)))
            position += len(text) + len(separator or "")
        return pieces

    def partition(self, sep: str, /) -> tuple[TrackedStr, TrackedStr, TrackedStr]:
        start = len(str.partition(self, sep)[0])
        end = start + len(sep)
        return self._slice(0, start), self._slice(start, end), self._slice(end, len(self))

    def rpartition(self, sep: str, /) -> tuple[TrackedStr, TrackedStr, TrackedStr]:
        end = len(self) - len(str.rpartition(self, sep)[2])
        start = end - len(sep) if end else 0
        return self._slice(0, start), self._slice(start, end), self._slice(end, len(self))

    # ---- letter by letter

    def upper(self) -> TrackedStr:
        return remap(self, str.upper(self), "upper")

    def lower(self) -> TrackedStr:
        return remap(self, str.lower(self), "lower")

    def casefold(self) -> TrackedStr:
        return remap(self, str.casefold(self), "casefold")

    def swapcase(self) -> TrackedStr:
        return remap(self, str.swapcase(self), "swapcase")

    def title(self) -> TrackedStr:
        return remap(self, str.title(self), "title")

    def capitalize(self) -> TrackedStr:
        return remap(self, str.capitalize(self), "capitalize")


EMPTY = TrackedStr("", ())


def track_str(text: str, origin: int = TEMPLATE) -> TrackedStr:
    """Return a text of one origin."""
    return TrackedStr(text, (len(text), origin)) if text else EMPTY


def concat(pieces: Sequence[str]) -> TrackedStr:
    """Join tracked texts without a separator."""
    runs: list[int] = []
    for piece in pieces:
        if type(piece) is TrackedStr:
            piece_runs = piece._runs
            if runs and piece_runs and runs[-1] == piece_runs[1]:
                runs[-2] += piece_runs[0]
                piece_runs = piece_runs[2:]
            runs += piece_runs
        elif not _is_empty(piece):
            raise TypeError(f"expected a text, got {type(piece).__name__}")
    return TrackedStr("".join(pieces), tuple(runs))


def remap(text: TrackedStr, new: str, construct: str) -> TrackedStr:
    """Return `new` with the origins of `text`, of which it is a letter-by-letter change. If the
    length changed, `text` must have a single origin."""
    if len(new) == len(text):
        return TrackedStr(new, text._runs)
    if len(set(text._runs[1::2])) == 1:
        return track_str(new, text._runs[1])
    raise UntrackedTextError(f"{construct} that changes the length")


def stringify(value: Any) -> TrackedStr:
    """Return what a template prints for a value; numbers and the like have origin VALUE."""
    if type(value) is TrackedStr:
        return value
    if isinstance(value, str):
        return require_tracked(value)
    return track_str(str(value), find_shared_origin(value))


def find_shared_origin(value: Any) -> int:
    """Return the origin of all texts inside a structure, template text aside; VALUE if there are
    several."""
    origins: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            origins.update(require_tracked(item)._runs[1::2])
        elif isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, (list, tuple)):
            stack += item
        elif not isinstance(item, (int, float, type(None), Undefined)):
            raise UntrackedTextError(f"a {type(item).__name__} as text")
    writers = origins - {TEMPLATE}
    if not origins or len(writers) > 1:
        return VALUE
    return writers.pop() if writers else TEMPLATE


def require_tracked(text: str) -> TrackedStr:
    """Return tracked text. Raises UntrackedTextError for plain text, unless it is empty."""
    if type(text) is TrackedStr:
        return text
    if text:
        raise UntrackedTextError(f"text of unknown origin ({text[:40]!r})")
    return EMPTY


def get_plain_text(text: TrackedStr) -> str:
    """Return the text as a plain `str`, without origins."""
    return str.__str__(text)


def iter_spans(text: TrackedStr) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, origin) of each maximal span of one origin, in order."""
    start = end = 0
    current = -1
    for length, origin in zip(text._runs[::2], text._runs[1::2], strict=True):
        if origin != current:
            if end > start:
                yield start, end, current
            start = end
            current = origin
        end += length
    if end > start:
        yield start, end, current


def get_runs(text: TrackedStr) -> Runs:
    """Return (length, origin, ...), from which `TrackedStr(text, runs)` makes the text again."""
    return text._runs


def _is_empty(value: object) -> bool:
    return isinstance(value, str) and not require_tracked(value)
