"""HTML made of functions: whatever is not made by `tag` is escaped on its way in.

    tag("td", "a < b", class_="number") -> <td class="number">a &lt; b</td>

Characters that are not seen but change what is seen (direction marks, zero widths, control
characters, lone surrogates) are shown by their code, since rows and answers are written by
strangers."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

VOID_TAGS = {"meta", "br", "input"}
# C0 and C1 without tab and line feed, marks of direction, zero widths without joiners, lone
# surrogates, invisible tags
HIDDEN_CHARS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | int | float | None | Iterable[Any]


def make_tag(name: str, *content: Content, **attributes: str | float | bool | None) -> Html:
    """An element. Attributes: class_ is class, aria_label is aria-label; True is an attribute
    without a value, None and False are none."""
    words = "".join(_format_attribute(key, value) for key, value in attributes.items())
    return Html(
        f"<{name}{words}>"
        if name in VOID_TAGS
        else f"<{name}{words}>{join_html(*content)}</{name}>"
    )


def join_html(*content: Content) -> Html:
    """One after the other; lists are opened, None is nothing."""
    parts: list[str] = []
    for item in content:
        if isinstance(item, Html):
            parts.append(item)
        elif isinstance(item, (str, int, float)):
            parts.append(escape_text(str(item)))
        elif item is not None:
            parts.append(join_html(*item))
    return Html("".join(parts))


def escape_text(text: str) -> Html:
    """Text as HTML, with what would be hidden made visible."""
    pieces, end = [], 0
    for match in HIDDEN_CHARS.finditer(text):
        pieces += [
            html.escape(text[end : match.start()]),
            f'<b class="hidden">{format_codepoint(match[0])}</b>',
        ]
        end = match.end()
    return Html("".join([*pieces, html.escape(text[end:])]))


def escape_plain(text: str) -> str:
    """The same for where no element can stand: attributes and titles."""
    return HIDDEN_CHARS.sub(lambda match: f"[{format_codepoint(match[0])}]", text)


def format_codepoint(letter: str) -> str:
    return f"U+{ord(letter):04X}"


def quote_text(text: str, name: str = "bdi") -> Html:
    """Words of others: their direction does not reach what stands around them."""
    return make_tag(name, text, dir="auto")


def _format_attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(escape_plain(str(value)))}"'


# ---------------------------------------------------------------- what pages are made of


def make_table(
    head: Iterable[Content],
    rows: Iterable[Iterable[Content]],
    *,
    numbers: Iterable[int] = (),
    label: str,
) -> Html:
    """A table that scrolls by itself where it is too wide. The first cell of a row is its head;
    `numbers` are the places of columns that stand to the right."""
    right = set(numbers)

    def make_cell(name: str, index: int, content: Content, **more: str) -> Html:
        return make_tag(name, content, class_="number" if index in right else None, **more)

    heads = [make_cell("th", index, item, scope="col") for index, item in enumerate(head)]
    body = [
        make_tag(
            "tr",
            [
                make_cell("th", 0, item, scope="row")
                if index == 0
                else make_cell("td", index, item)
                for index, item in line
            ],
        )
        for line in (enumerate(row) for row in rows)
    ]
    inner = make_tag("table", make_tag("thead", make_tag("tr", heads)), make_tag("tbody", body))
    return make_tag("div", inner, class_="scroll", tabindex="0", role="group", aria_label=label)


def make_details(summary: Content, *content: Content, is_open: bool = False) -> Html:
    return make_tag("details", make_tag("summary", summary), *content, open=is_open)


def make_section(name: str, title: str, *content: Content) -> Html:
    return make_tag(
        "section",
        make_tag("h2", title, id=f"{name}-title"),
        *content,
        id=name,
        aria_labelledby=f"{name}-title",
    )
