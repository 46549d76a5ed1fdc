"""HTML that what it holds cannot break."""

import pytest

from tunesmith.report.html import (
    Html,
    escape_plain,
    escape_text,
    join_html,
    make_table,
    make_tag,
    quote_text,
)


def test_what_is_not_html_is_escaped() -> None:
    hostile = "</script><script>alert(1)</script>&\"'"
    made = make_tag("td", hostile, class_="number", title=hostile)
    assert "<script" not in made
    assert made.count("<") == 2
    assert made.startswith('<td class="number" title="&lt;/script&gt;')
    assert make_tag("p", make_tag("b", "x"), 1, None, ["a", ("b",)]) == "<p><b>x</b>1ab</p>"


def test_attributes_that_are_off_are_not_there() -> None:
    assert (
        make_tag("details", hidden=True, open=False, id=None, aria_label="x")
        == '<details hidden aria-label="x"></details>'
    )


@pytest.mark.parametrize(
    "letter", ["\x00", "\x1b", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800", "\U000e0041"]
)
def test_what_would_be_hidden_is_shown(letter: str) -> None:
    code = f"U+{ord(letter):04X}"
    assert escape_text(f"a{letter}<") == f'a<b class="hidden">{code}</b>&lt;'
    assert escape_plain(f"a{letter}") == f"a[{code}]"
    assert make_tag("p", f"{letter}", title=letter).encode()  # UTF-8 can hold it now


@pytest.mark.parametrize("text", ["שלום", "a\tb\nc", "👩‍💻", "日本", "\u200cمی‌خواهم"])
def test_letters_of_people_stay_as_they_are(text: str) -> None:
    assert escape_text(text) == text


def test_words_of_others_keep_their_direction_to_themselves() -> None:
    assert quote_text("אב") == '<bdi dir="auto">אב</bdi>'


def test_a_table_has_heads_and_scrolls_by_keyboard() -> None:
    made = make_table(["a", "b"], [["<x>", 1]], numbers=(1,), label="of it")
    assert 'tabindex="0" role="group" aria-label="of it"' in made
    assert '<th scope="row">&lt;x&gt;</th><td class="number">1</td>' in made
    assert isinstance(join_html(made, "<"), Html)
