"""Tracked renders against plain Jinja, and where templates come from."""

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import InputError, Interrupted
from tunesmith.data.chat_template.compiled_template import CompiledTemplate, track_value
from tunesmith.data.chat_template.template import MAX_SOURCE, ChatTemplate, find_templates
from tunesmith.data.chat_template.tracked_str import (
    TEMPLATE,
    TOOLS,
    VALUE,
    TrackedStr,
    get_plain_text,
    iter_spans,
    make_origin,
)

NOW = datetime(2026, 3, 4, 5, 6, 7)
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "  Ünïcode <b> & 'quotes' \"twice\"\nline two\t", "n": 3},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nßtraße",
        "calls": [{"name": "f", "arguments": {"x": 1.5}}],
    },
]


def rendered(source: str, **variables: Any) -> TrackedStr:
    template = CompiledTemplate(source, now=NOW)
    tracked = [
        track_value(message, make_origin(i, "content")) for i, message in enumerate(MESSAGES)
    ]
    extra = {"tools": [{"name": "f"}], "flag": True, **variables}
    text = template.render(
        {"messages": tracked, **{key: track_value(value, TOOLS) for key, value in extra.items()}}
    )
    assert get_plain_text(text) == template.render_plain({"messages": MESSAGES, **extra})
    return text


def writers(text: TrackedStr) -> dict[str, int]:
    return {get_plain_text(text)[start:end]: origin for start, end, origin in iter_spans(text)}


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ '\\n' }}{% endfor %}",
        "{{ messages[0].content + 'x' + messages[1].content }}"
        "{{ 'a' ~ messages[0].n ~ none ~ true ~ undefined_name }}",
        "{{ messages[1].content.split('</think>')[-1].lstrip('\\n') }}"
        "{{ 'b' in messages[0].content }}",
        "{{ messages[1].content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] }}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ messages | tojson(ensure_ascii=true) }}{{ messages[1].calls }}{{ messages[0] }}",
        "{% for k, v in messages[1].calls[0].arguments.items() %}{{ k }}={{ v }}{% endfor %}",
        "{% for k, v in messages[1] | dictsort %}{{ k }}:{{ v | string }};{% endfor %}",
        "{{ messages | map(attribute='role') | join(', ') }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list "
        "| first | upper }}",
        "{{ messages[0].content | title }}{{ messages[0].content | capitalize }}"
        "{{ messages[0].content.lower() }}",
        "{{ messages[0].content | replace('<b>', '**') | replace('line', 'LINE', 1) | indent(3, "
        "true) }}",
        "{{ messages[1].content | indent(2, blank=true) }}",
        "{{ '%s and %s: 100%%' % (messages[0].role, messages[0].n) }}"
        "{{ '[%s]' | format(messages[1].role) }}",
        "{{ '=' * 5 }}{{ 2 ** 3 * 4 % 5 - 1 }}{{ [1] * 2 + [3] }}",
        "{{ messages[::-1][0].role }}{{ messages[0].content[2:9:2] }}",
        "{% macro f(m, sep='|') %}{{ sep }}{{ m.content }}{{ caller() if caller }}{% endmacro %}"
        "{{ f(messages[0]) }}"
        "{% call f(messages[1]) %}inner{% endcall %}",
        "{% set ns = namespace(text='', n=0) %}{% for m in messages %}"
        "{% set ns.text = ns.text + m.content %}"
        "{% set ns.n = ns.n + 1 %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
        "{{ ns.text }}{{ ns.n }}",
        "{% set x %}block {{ messages[0].role }}{% endset %}{{ x | trim }}{% filter upper %}"
        "{{ x }}{% endfilter %}",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}",
        "{{ strftime_now('%d %b %Y') }}{{ x | default('none') }}",
        "  {% if flag %}\n  kept  \n  {%- endif %}\n{# comment #}\n  tail",
        "{{ {'k': messages[0].role, 'n': [1, 2.5, none]} | tojson }}{{ 1.50 }}{{ [] }}",
        "{{ messages[0].content.partition('b')[2] }}"
        "{{ messages[0].content.splitlines() | join('/') }}"
        "{{ messages[0].content.removeprefix('  ') }}{{ cycler('x', 'y').next() }}",
        "{{ messages | length }}{{ messages[0].content | length }}{{ '12' | int + 1 }}"
        "{{ loop is defined }}",
        "{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ loop.previtem }}"
        "{% else %}none{% endfor %}",
    ],
)  # fmt: skip
def test_text_equals_plain_jinja(source: str) -> None:
    assert rendered(source)


def test_each_character_has_its_writer() -> None:
    text = rendered(
        "<s>{% for m in messages[1:] %}{{ '[' + m.content | trim + ']' }}{% endfor %}"
        "{{ tools[0].name }}{{ 7 }}"
    )
    assert writers(text) == {
        "<s>[": TEMPLATE,
        "<think>\nhm\n</think>\n\nßtraße": make_origin(1, "content"),
        "]": TEMPLATE,
        "f": TOOLS,
        "7": TEMPLATE,
    }
    assert writers(rendered("{{ messages[0].n }}")) == {"3": VALUE}


def test_json_text_belongs_to_the_message_inside() -> None:
    text = rendered("{{ '<' }}{{ {'call': messages[1].calls} | tojson }}{{ '>' }}")
    assert [origin for _, _, origin in iter_spans(text)] == [
        TEMPLATE,
        make_origin(1, "content"),
        TEMPLATE,
    ]
    mixed = rendered("{{ [messages[0].role, messages[1].role] | tojson }}")
    assert set(writers(mixed).values()) == {VALUE}


@pytest.mark.parametrize(
    ("source", "construct"),
    [
        ("\n{{ messages[0].content | escape }}", "line 2: text of unknown origin"),
        ("{{ messages[0].content.center(30) }}", "unknown origin"),
        ("{{ '{}'.format(messages[0].role) }}", "str.format"),
        ("{{ '%05d' % 3 }}", "%0 in a % format"),
        ("{% for k in dict(a=1) %}{{ k }}{% endfor %}", "unknown origin ('a')"),
        ("{{ messages[0].content.encode() }}", "a bytes as text"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ namespace }}", "a type as text"),
        ("{{ messages[0].content | replace('', '-') }}", "replace of an empty text"),
        ("{{ (messages[0].role + 'ß') | upper }}", "upper that changes the length"),
    ],
)
def test_constructs_that_lose_origins_are_refused_by_name(source: str, construct: str) -> None:
    template = CompiledTemplate(source, now=NOW, name="model.jinja")
    with pytest.raises(InputError) as caught:
        template.render({"messages": [track_value(message, 4) for message in MESSAGES]})
    assert construct in str(caught.value)
    assert "model.jinja, line" in str(caught.value)
    assert caught.value.fix


def test_a_broken_template_is_named_with_its_line() -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplate("{% if a %}\n\n{{ b ", now=NOW, name="broken.jinja")
    assert caught.value.where.startswith("broken.jinja:3")
    for source in (
        "{{ " + "(" * 3000 + " }}",
        "x" * (MAX_SOURCE + 1),
        "{{ messages | random }}",
    ):
        with pytest.raises(InputError, match="chat template"):
            ChatTemplate(source, now=NOW)


def test_templates_are_found_where_models_keep_them(tmp_path: Path) -> None:
    assert find_templates(tmp_path, None, NOW) == {}
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "from config"}')
    assert find_templates(tmp_path, None, NOW)["default"].source == "from config"
    config.write_text(
        '{"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", '
        '"template": "b"}]}'
    )
    assert {name: t.source for name, t in find_templates(tmp_path, None, NOW).items()} == {
        "default": "a",
        "tool_use": "b",
    }
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert [t.source for t in find_templates(tmp_path, None, NOW).values()] == ["from file"]
    template_file = tmp_path / "mine.jinja"
    template_file.write_text("mine")
    assert find_templates(tmp_path, template_file, NOW)["default"].source == "mine"
    with pytest.raises(InputError, match="no such file"):
        find_templates(tmp_path, tmp_path / "missing.jinja", NOW)
    template_file.write_bytes(b"mine\r\n")
    assert find_templates(tmp_path, template_file, NOW)["default"].source == "mine\n"
    with template_file.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(InputError, match="more than 400,000 bytes"):
        find_templates(tmp_path, template_file, NOW)


@pytest.mark.parametrize(
    "source",
    [
        "{% break %}",
        "{% continue %}",
        "{% if true %}{% break %}{% endif %}",
        "{{ dict(a=1, a=2) }}",
        "{{ messages | tojson(indent=1, indent=2) }}",
        "{% macro m(a, a) %}{% endmacro %}{{ m(1, 2) }}",
        "{{ dict(__debug__=1) }}",
        "{% set __debug__ = 1 %}{{ __debug__ }}",
        "{% macro m(None) %}{% endmacro %}",
        "{% for x in [1] %}" * 21 + "{% endfor %}" * 21,
        "{% if true %}" * 101 + "{% endif %}" * 101,
        "{% if true %}" * 3000 + "{% endif %}" * 3000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "not " * 5000 + "1 }}",
        "{{ " + "[" * 300 + "]" * 300 + " }}",
        "{{ 1" + "0" * 5000 + " }}",
        "{{ " + "-" * 3000 + "1 }}",
        "{{ a" + ".b" * 3000 + " }}",
        "{{ a" + "|trim" * 3000 + " }}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{% import 'x' as y %}{{ y.z }}",
        "{% block a %}{% endblock %}{% block a %}{% endblock %}",
        "{% trans %}x{% endtrans %}",
        "{{ caller() }}",
        "{{ super() }}",
        "{{ self.x() }}",
        "{{ '\ud800' }}",
        "{{ 1e999 | int }}",
        "{{ messages | sort }}",
    ],
)
def test_fault_11_no_template_is_taken_for_a_fault_of_the_program(source: str) -> None:
    with suppress(InputError):
        template = CompiledTemplate(source, now=NOW)
        template.render({"messages": []})
        template.render_plain({"messages": []})


@pytest.mark.parametrize(
    "entry",
    [
        7, 1.5, True, {"a": 1}, ["text"], [7], [None], [[]], [{}], [{"name": "default"}],
        [{"template": "x"}], [{"name": "default", "template": 7}], [{"name": [], "template": "x"}],
        [{"name": "default", "template": None}], {"name": "default"},
    ],
)  # fmt: skip
def test_fault_11_a_malformed_chat_template_is_named(entry: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(InputError, match="chat_template is not a text") as error:
        find_templates(tmp_path, None, NOW)
    assert "tokenizer_config.json" in error.value.where


@pytest.mark.parametrize(
    "error", [Interrupted("stopped by SIGINT"), MemoryError(), KeyboardInterrupt()]
)
@pytest.mark.parametrize("method", ["render", "render_plain"])
def test_signals_and_memory_errors_are_no_fault_of_a_template(
    error: BaseException, method: str
) -> None:
    class Raising(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            raise error

    template = CompiledTemplate("{{ messages[0]['content'] }}", now=NOW)
    with pytest.raises(type(error)) as caught:
        getattr(template, method)({"messages": [Raising(role="user")]})
    assert caught.value is error
