"""HTML made of functions: whatever is not made by `tag` is escaped on its way in.

    tag("td", "a < b", class_="number") -> <td class="number">a &lt; b</td>

Characters that are not seen but change what is seen (direction marks, zero widths, control characters, lone surrogates)
are shown by their code, since rows and answers are written by strangers.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

VOID = {"meta", "br", "input"}
# C0 and C1 without tab and line feed, marks of direction, zero widths without joiners, lone surrogates, invisible tags
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | int | float | None | Iterable[Any]


def tag(name: str, *content: Content, **attributes: str | float | bool | None) -> Html:
    """An element. Attributes: class_ is class, aria_label is aria-label; True is an attribute without a value, None and
    False are none."""
    words = "".join(_attribute(key, value) for key, value in attributes.items())
    return Html(f"<{name}{words}>" if name in VOID else f"<{name}{words}>{join(*content)}</{name}>")


def join(*content: Content) -> Html:
    """One after the other; lists are opened, None is nothing."""
    parts: list[str] = []
    for one in content:
        if isinstance(one, Html):
            parts.append(one)
        elif isinstance(one, (str, int, float)):
            parts.append(shown(str(one)))
        elif one is not None:
            parts.append(join(*one))
    return Html("".join(parts))


def shown(text: str) -> Html:
    """Text as HTML, with what would be hidden made visible."""
    found, end = [], 0
    for match in HIDDEN.finditer(text):
        found += [html.escape(text[end : match.start()]), f'<b class="hidden">{code_of(match[0])}</b>']
        end = match.end()
    return Html("".join([*found, html.escape(text[end:])]))


def plain(text: str) -> str:
    """The same for where no element can stand: attributes and titles."""
    return HIDDEN.sub(lambda match: f"[{code_of(match[0])}]", text)


def code_of(letter: str) -> str:
    return f"U+{ord(letter):04X}"


def quoted(text: str, name: str = "bdi") -> Html:
    """Words of others: their direction does not reach what stands around them."""
    return tag(name, text, dir="auto")


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(plain(str(value)))}"'


# ---------------------------------------------------------------- what pages are made of


def table(
    head: Iterable[Content], rows: Iterable[Iterable[Content]], *, numbers: Iterable[int] = (), label: str
) -> Html:
    """A table that scrolls by itself where it is too wide. The first cell of a row is its head; `numbers` are the
    places of columns that stand to the right."""
    right = set(numbers)

    def cell(name: str, place: int, content: Content, **more: str) -> Html:
        return tag(name, content, class_="number" if place in right else None, **more)

    heads = [cell("th", place, one, scope="col") for place, one in enumerate(head)]
    body = [
        tag("tr", [cell("th", 0, one, scope="row") if place == 0 else cell("td", place, one) for place, one in line])
        for line in (enumerate(row) for row in rows)
    ]
    inner = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body))
    return tag("div", inner, class_="scroll", tabindex="0", role="group", aria_label=label)


def details(summary: Content, *content: Content, opened: bool = False) -> Html:
    return tag("details", tag("summary", summary), *content, open=opened)


def section(name: str, title: str, *content: Content) -> Html:
    return tag("section", tag("h2", title, id=f"{name}-title"), *content, id=name, aria_labelledby=f"{name}-title")
