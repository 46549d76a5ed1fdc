"""Refuse an operation of a chat template before it makes something too large.

Each check takes the arguments of its operator, method or filter. It raises RenderLimitError, or
UntrackedTextError for what is not supported. All other operations are charged after they ran
(`sandbox_limits.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from tunesmith.data.chat_template.tracked_str import (
    MAX_CHARS,
    MAX_ITEMS,
    RenderLimitError,
    UntrackedTextError,
)

MAX_INTEGER_BITS = 4096
MAX_INDENT = 64
MAX_DIGITS = 4096  # of a text that becomes a number
STEPS_PER_TICK = 250  # of a search or strip that takes time for each pair of characters
# methods and filters whose time is the product of both texts: a search from the end, and a strip
PRODUCT_METHODS = frozenset({
    "rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim",
})  # fmt: skip
DIRECTIVE = re.compile(r"%(.)?", re.DOTALL)


def check_binop(operator: str, first: Any, second: Any) -> None:
    """Check `*`, `/`, `//`, `%` and `**`."""
    if operator == "%" and isinstance(first, str):
        check_directives(first)
        return
    for sequence, times in ((first, second), (second, first)):
        is_repeat = isinstance(sequence, (list, tuple, str)) and isinstance(times, int)
        if is_repeat and len(sequence) * times > MAX_ITEMS:
            raise RenderLimitError(f"something repeated {times} times")
    if isinstance(first, int) and isinstance(second, int):
        bits = first.bit_length() + second.bit_length()
        if operator == "**":
            bits = first.bit_length() * abs(second)
        if bits > MAX_INTEGER_BITS:
            raise RenderLimitError("a very large number")


def check_number(value: Any) -> None:
    """Raise RenderLimitError for an integer that arithmetic would take long with."""
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise RenderLimitError("a very large number")


def estimate_ticks(name: str, text: Any, args: Iterable[Any]) -> int:
    """Return the work of a method or filter beyond the size of its arguments."""
    if name not in PRODUCT_METHODS or not isinstance(text, str):
        return 0
    num_chars = sum(len(value) for value in args if isinstance(value, str))
    return len(text) * num_chars // STEPS_PER_TICK


def add_terms(values: list[Any]) -> Any:
    """Add the terms of a `+` chain, from left to right."""
    total = values[0]
    for value in values[1:]:
        limit = MAX_CHARS if isinstance(total, str) else MAX_ITEMS
        if isinstance(total, (str, list, tuple)) and len(total) + len(value) > limit:
            raise RenderLimitError(f"a sum of more than {limit} characters or items")
        total = total + value
    return total


def check_directives(pattern: str) -> None:
    """Check a % format: only %s and %%, since other directives have widths."""
    for match in DIRECTIVE.finditer(str(pattern)):
        if match[1] not in ("s", "%"):
            raise UntrackedTextError(f"{match[0]} in a % format")


def check_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    """Check the call of a string method."""
    if name == "replace" and len(args) > 1:
        check_replace(text, args[0], args[1])
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        check_join(text, args[0])


def check_replace(text: Any, old: Any, new: Any, count: Any = None) -> None:
    del count
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        times = str.count(text, old) if old else len(text) + 1
        _check_chars(len(text) + times * len(new))


def check_join(separator: Any, parts: Any) -> None:
    num_chars = sum(len(part) for part in parts if isinstance(part, str))
    _check_chars(num_chars + len(str(separator)) * len(parts))


def _check_chars(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise RenderLimitError(f"a text of more than {MAX_CHARS} characters")


def _check_int(value: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_DIGITS:
        raise RenderLimitError("a very large number")


def _check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    del text
    if not isinstance(width, int) or not 0 <= width <= MAX_INDENT:
        raise UntrackedTextError(f"indent by a text or by more than {MAX_INDENT}")


def _check_json(value: Any, *_: Any, indent: Any = None, **__: Any) -> None:
    del value
    width = len(indent) if isinstance(indent, str) else indent or 0
    if width > MAX_INDENT:
        raise RenderLimitError(f"tojson with an indent above {MAX_INDENT}")


def _check_list(value: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_ITEMS:
        raise RenderLimitError(f"a list of {len(value)} characters")


def _check_join_filter(parts: Any, d: Any = "", attribute: Any = None) -> None:
    del attribute
    check_join(d, parts)


FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "replace": check_replace,
    "join": _check_join_filter,
    "indent": _check_indent,
    "format": lambda pattern, *_: check_directives(pattern),
    "tojson": _check_json,
    "int": _check_int,
    "float": _check_int,
    "list": _check_list,
}
