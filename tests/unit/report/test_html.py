"""The environment of the templates: nothing in a value becomes markup or stays invisible."""

import pytest
from jinja2 import UndefinedError

from tunesmith.report.html import ENVIRONMENT, mark_hidden, render_template

HOSTILE = "</script><script>alert(1)</script>&\"'"
HIDDEN = ["\x00", "\x1b", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800", "\U000e0041"]


def render_source(source: str, **values: object) -> str:
    return ENVIRONMENT.from_string(source).render(values)


def test_text_and_attributes_are_escaped() -> None:
    html = render_source('<td title="{{ text }}">{{ text }}</td>', text=HOSTILE)
    assert "<script" not in html
    assert html.count("<") == 2
    assert html.startswith('<td title="&lt;/script&gt;')
    assert render_source("{{ 1 }}{{ missing }}{{ text }}", missing=None, text="a") == "1a"


def test_json_cannot_end_its_element() -> None:
    data = {"text": HOSTILE + "\ud800\u2028"}
    html = render_source("{{ data|tojson }}", data=data)
    assert not set("<>&'\ud800\u2028") & set(html)


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render_source("{{ missing }}")
    with pytest.raises(UndefinedError):
        render_template("page.html.jinja")


@pytest.mark.parametrize("char", HIDDEN)
def test_hidden_characters_are_shown(char: str) -> None:
    code = f"U+{ord(char):04X}"
    assert mark_hidden(f"a{char}<") == f'a<b class="hidden">{code}</b>&lt;'
    html = render_source('<p title="{{ text }}">{{ text }}</p>', text=f"a{char}")
    assert html == f'<p title="a[{code}]">a[{code}]</p>'
    assert html.encode()  # UTF-8 can represent it now


@pytest.mark.parametrize("text", ["שלום", "a\tb\nc", "👩‍💻", "日本", "\u200cمی‌خواهم"])
def test_visible_text_is_unchanged(text: str) -> None:
    assert mark_hidden(text) == text
    assert render_source("{{ text }}", text=text) == text


def test_quoted_text_keeps_its_direction_to_itself() -> None:
    source = '{% from "macros.html.jinja" import quoted %}{{ quoted(text) }}'
    assert render_source(source, text="אב<") == '<bdi dir="auto">אב&lt;</bdi>'


def test_a_table_has_heads_and_scrolls_by_keyboard() -> None:
    source = """{% from "macros.html.jinja" import scroll_table %}
{% call scroll_table("label <", ["a", "b"], (1,)) %}<tr>{{ cell }}</tr>{% endcall %}"""
    html = render_source(source, cell="<x>")
    assert 'tabindex="0" role="group" aria-label="label &lt;"' in html
    assert '<th scope="col">a</th><th class="number" scope="col">b</th>' in html
    assert "<tr>&lt;x&gt;</tr>" in html
