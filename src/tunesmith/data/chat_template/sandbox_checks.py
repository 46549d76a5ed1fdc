"""What a step of a chat template may make at most, known before it is made.

Each check takes what its operator, method or filter is given, and raises TooLarge, or LostOrigin for what is not
supported. For everything else the price is paid afterwards (budget.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tunesmith.data.chat_template.tracked_str import MAX_CHARS, MAX_ITEMS, LostOrigin, TooLarge

MAX_INTEGER_BITS = 4096
MAX_INDENT = 64
DIRECTIVE = re.compile(r"%(.)?", re.DOTALL)


def check_size(operator: str, left: Any, right: Any) -> None:
    """Of `*`, `%` and `**`."""
    if operator == "%" and isinstance(left, str):
        check_directives(left)
        return
    for many, times in ((left, right), (right, left)):
        if isinstance(many, (list, tuple, str)) and isinstance(times, int) and len(many) * times > MAX_ITEMS:
            raise TooLarge(f"something repeated {times} times")
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise TooLarge("a very large number")


def added(values: list[Any]) -> Any:
    """Terms of a `+`, from left to right."""
    total = values[0]
    for value in values[1:]:
        most = MAX_CHARS if isinstance(total, str) else MAX_ITEMS
        if isinstance(total, (str, list, tuple)) and len(total) + len(value) > most:
            raise TooLarge(f"a sum of more than {most} characters or items")
        total = total + value
    return total


def check_directives(pattern: str) -> None:
    """%s and %% only: others have widths."""
    odd = next((match[0] for match in DIRECTIVE.finditer(str(pattern)) if match[1] not in ("s", "%")), None)
    if odd is not None:
        raise LostOrigin(f"{odd} in a % format")


def check_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    if name == "replace" and len(args) > 1:
        check_replace(text, args[0], args[1])
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        check_join(text, args[0])


def check_replace(text: Any, old: Any, new: Any, count: Any = None) -> None:
    del count
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        times = str.count(text, old) if old else len(text) + 1
        if len(text) + times * len(new) > MAX_CHARS:
            raise TooLarge(f"a text of more than {MAX_CHARS} characters")


def check_join(separator: Any, parts: Any) -> None:
    if sum(len(part) for part in parts if isinstance(part, str)) + len(str(separator)) * len(parts) > MAX_CHARS:
        raise TooLarge(f"a text of more than {MAX_CHARS} characters")


def check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    del text
    if not isinstance(width, int) or not 0 <= width <= MAX_INDENT:
        raise LostOrigin(f"indent by a text or by more than {MAX_INDENT}")


def check_json(value: Any, *_: Any, indent: Any = None, **__: Any) -> None:
    del value
    if (len(indent) if isinstance(indent, str) else indent or 0) > MAX_INDENT:
        raise TooLarge(f"tojson with an indent above {MAX_INDENT}")


def check_list(value: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_ITEMS:
        raise TooLarge(f"a list of {len(value)} characters")


def _join_filter(parts: Any, d: Any = "", attribute: Any = None) -> None:
    del attribute
    check_join(d, parts)


CHECKS: dict[str, Callable[..., None]] = {
    "replace": check_replace,
    "join": _join_filter,
    "indent": check_indent,
    "format": lambda pattern, *_: check_directives(pattern),
    "tojson": check_json,
    "list": check_list,
}
