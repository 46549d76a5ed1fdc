"""Templates of strangers, in both environments: tests 17 and 18 of the list of faults."""

import resource
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from tunesmith.core.errors import InputError
from tunesmith.data.chat_template.conversation import track_value
from tunesmith.data.chat_template.template import ChatTemplate
from tunesmith.data.chat_template.tracked_str import make_origin

NOW = datetime(2026, 3, 4, 5, 6, 7)
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "yes"},
]
TWICE = (
    "{% set ns = namespace(x=[], y=[]) %}"
    "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
)
TUPLE = (
    "{% set ns = namespace(x=(1,)) %}"
    "{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
)
BIG = "{% set big = 'a' * 19999 %}"


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """No render may need a gigabyte more than there was before."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True, params=["a fiftieth", pytest.param("real", marks=pytest.mark.slow)])
def _budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits work at any size; at a fiftieth they are tested in seconds."""
    if request.param != "real":
        for name in (
            "sandbox_limits.MAX_WORK",
            "sandbox_checks.MAX_ITEMS",
            "tracked_str.MAX_ITEMS",
        ):
            monkeypatch.setattr(f"tunesmith.data.chat_template.{name}", 20_000)
        for name in (
            "sandbox_limits.MAX_CHARS",
            "sandbox_checks.MAX_CHARS",
            "tracked_str.MAX_CHARS",
        ):
            monkeypatch.setattr(f"tunesmith.data.chat_template.{name}", 200_000)


def outcomes(source: str) -> list[str]:
    """What tracked and plain render print; the words of the InputError where they do not."""
    template = ChatTemplate(source, now=NOW)
    tracked = [
        track_value(message, make_origin(i, "content")) for i, message in enumerate(MESSAGES)
    ]
    texts: list[str] = []
    for render, messages in ((template.render, tracked), (template.render_plain, MESSAGES)):
        started = time.thread_time()
        try:
            texts.append(
                render({"messages": messages, "tools": None, "add_generation_prompt": False})
            )
        except InputError as error:
            texts.append(f"refused: {error.message}")
        seconds = time.thread_time() - started  # ten, and what a collection of garbage takes
        assert seconds < 30, render
    return texts


def refused(source: str) -> bool:
    return all(text.startswith("refused: ") for text in outcomes(source))


@pytest.mark.parametrize(
    "source",
    [
        "{{ lipsum.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ joiner.__init__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__class__ }}",
        "{{ dict.fromkeys }}",
        "{{ range.__self__ }}",
        "{{ raise_exception.__code__ }}",
        "{{ strftime_now.__closure__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages[0].__init_subclass__ }}",
        "{{ messages[0].content._runs }}",
        "{{ self.__init__ }}",
        "{{ self._TemplateReference__context }}",
        "{% for m in messages %}{{ loop.__class__ }}{% endfor %}",
        "{% macro f() %}{% endmacro %}{{ f.__globals__ }}",
        "{% macro f() %}{% endmacro %}{{ f._environment }}",
        "{{ 'x' | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ 'x'['__class__'] }}",
        "{{ '{0.__class__}'.format('x') }}",
        "{{ '{0.__class__}'.format_map({}) }}",
        "{{ x.__class__ }}{% set x = 1 %}{{ x.__class__ }}",
        "{{ (1).real.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].clear() }}",
        "{{ messages.sort() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends 'x' %}",
        "{{ get_flashed_messages() }}",
        "{{ self.x() }}",
    ],
)  # fmt: skip
def test_fault_17_no_template_reaches_python(source: str) -> None:
    assert all(
        text == "" or text.startswith("refused: chat template, line 1: ")
        for text in outcomes(source)
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [0] * 10**9 }}",
        "{{ [[0] * 99999] * 99999 * 99 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 10 ** 10000000000 }}",
        "{{ 'a' ~ 'b' * 999999 * 999 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}",
        "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x.join([ns.x] * 9) %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = '%s%s'|format(ns.x, ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x * 2 }}"
        "{% endset %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = [ns.x, ns.x] | tojson %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = [ns.x, ns.x] | string %}{% endfor %}",
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='a') %}"
        "{% for i in range(60) %}{% set ns.x = f(ns.x) %}{% endfor %}",
        BIG + "{{ big.replace('a', big) }}",
        BIG + "{{ big | replace('a', big) }}",
        BIG + "{{ big.replace('', big) }}",
        BIG + "{{ big.join([big] * 19999) }}",
        BIG + "{{ ([big] * 19999) | join(big) }}",
        BIG + "{{ ([big] * 19999) | tojson }}",
        BIG + "{{ [big] * 19999 }}",
        BIG + "{{ ([big] * 19999) | string }}",
        BIG + "{{ ([big] * 19999) ~ '' }}",
        BIG + "{{ '%s' % [[big] * 19999] }}",
        BIG + "{% for i in range(999) %}{{ big }}{% endfor %}",
        BIG + "{% for i in range(99999) %}{% set x = big.split('a') %}{% endfor %}",
        BIG + "{% for i in range(99999) %}{% set x = big | list %}{% endfor %}",
        BIG + "{% for i in range(99999) %}{% set x = big | upper %}{% endfor %}",
        BIG + "{% for i in range(99999) %}{% set x = big[::-1] %}{% endfor %}",
        BIG + "{{ big | indent(64) | indent(64) }}"
        "{% for i in range(99999) %}{{ big | trim }}{% endfor %}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ 'a\nb' | indent(1000000000) }}",
        "{{ 'a\nb' | indent('a' * 999999) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000s' | format('a') }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ 'a'.ljust(1000000000) }}{{ 'a'.zfill(1000000000) }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ ('\t' * 999999).expandtabs(1000000) }}",
        "{{ (5).to_bytes(1000000000, 'big') }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ strftime_now('%A' * 999) }}",
        "{{ range(1000000000) | list }}",
        "{{ ([range(99999) | list] * 99999) | sum(start=[]) }}",
        "{{ ([range(99999) | list] * 99999) | map('list') | list | length }}",
        "{{ ([range(99999) | list] * 9999) | map('sum') | list | length }}",
        "{% set l = range(99999) | list %}{% for i in range(99999) %}{% set x = l[:] %}"
        "{% endfor %}",
        "{% set l = range(99999) | list %}{% for i in range(99999) %}{% set x = l + l %}"
        "{% endfor %}",
        "{% set l = range(99999) | list %}{% for i in range(99999) %}{% set x = l | sort %}"
        "{% endfor %}",
        "{% set l = range(99999) | list %}{% for i in range(99999) %}{% set x = i in l %}"
        "{% endfor %}",
        "{% set l = range(99999) | list %}{% for i in range(99999) %}"
        "{% set x = l.index(99998) %}{% endfor %}",
        "{% set l = range(99999) | list %}{% for i in range(99999) %}{% set x = i is in l %}"
        "{% endfor %}",
        "{% set l = range(99999) | list %}{{ l | select('in', l) | list }}",
        "{{ 'a' | wordwrap(1) }}",
        "{{ ('a' * 999999) | batch(1) | list }}",
        "{{ 'a' | center(1000000000) }}",
    ],
)  # fmt: skip
def test_fault_18_nothing_fills_the_memory(source: str) -> None:
    assert refused(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}{% call f() %}{{ f() }}"
        "{% endcall %}{% endcall %}",
        "{% set ns = namespace(f=none) %}{% macro f() %}{{ ns.f() }}{% endmacro %}"
        "{% set ns.f = f %}{{ f() }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        TWICE + "{{ ns.x == ns.y }}",
        TWICE + "{{ ns.x != ns.y }}",
        TWICE + "{{ ns.x < ns.y }}",
        TWICE + "{{ ns.x in [ns.y] }}",
        TWICE + "{{ 1 == 1 == ns.x == ns.y }}",
        TWICE + "{{ ns.x is eq(ns.y) }}",
        TWICE + "{{ ns.x is in([ns.y]) }}",
        TWICE + "{{ ns.x is lower }}",
        TWICE + "{{ [ns.x] | select('eq', ns.y) | list }}",
        TWICE + "{{ [ns.x, ns.y] | sort }}",
        TWICE + "{{ [ns.x, ns.y] | max }}",
        TWICE + "{{ [ns.x, ns.y] | map('max') | list }}",
        TWICE + "{{ [{'a': ns.x}, {'a': ns.y}] | groupby('a') }}",
        TWICE + "{{ [{'a': ns.x}, {'a': ns.y}] | sort(attribute='a') }}",
        TWICE + "{{ [{'a': ns.x}, {'a': ns.y}] | selectattr('a', 'eq', ns.y) | list }}",
        TWICE + "{{ {'a': ns.x, 'b': ns.y} | dictsort(by='value') }}",
        TWICE + "{{ [ns.x].index(ns.y) }}",
        TWICE + "{{ [ns.x].count(ns.y) }}",
        TWICE + "{{ [ns.x] | unique | list }}",
        TWICE + "{{ ns.x }}",
        TWICE + "{{ ns.x | string }}",
        TWICE + "{{ ns.x | tojson }}",
        TWICE + "{{ ns.x | trim }}",
        TWICE + "{{ ns.x | upper }}",
        TWICE + "{{ ns.x | wordcount }}",
        TWICE + "{{ ns.x ~ 'a' }}",
        TWICE + "{{ [ns.x] | join }}",
        TWICE + "{{ '%s' % [ns.x] }}",
        TWICE + "{{ '%s' | format(ns.x) }}",
        TWICE + "{% for m in messages %}"
        "{{ loop.changed(ns.x) }}{{ loop.changed(ns.y) }}{% endfor %}",
        TWICE + "{{ raise_exception(ns.x) }}",
        TWICE + "{{ ns.x | replace('a', 'b') }}",
        TWICE + "{{ ns.x | int }}",
        TWICE + "{{ cycler(ns.x, ns.y).next() == cycler(ns.y).next() }}",
        TUPLE + "{{ {ns.x: 1} }}",
        TUPLE + "{{ {}[ns.x] }}",
        TUPLE + "{{ {}.get(ns.x) }}",
        TUPLE + "{{ dict([(ns.x, 1)]) }}",
        TUPLE + "{{ dict.fromkeys([ns.x]) }}",
        TUPLE + "{{ [ns.x] | unique | list }}",
        TUPLE + "{{ ns.x in {} }}",
        TUPLE + "{{ [ns.x] | map('default', 1) | unique | list }}",
        "{{ raise_exception('not this row') }}",
        "{{ 1 / 0 }}",
        "{{ 1 // 0 }}",
        "{{ 1e308 * 10 ** 400 }}",
    ],
)  # fmt: skip
def test_fault_18_nothing_takes_long(source: str) -> None:
    assert refused(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% if (messages[0].content | trim) is sameas messages[0].content %}BOMB{% endif %}",
        "{% if 'tick' is not filter %}BOMB{% endif %}",
        "{% if dict.items is defined %}BOMB{% endif %}",
        "{% if ''.center is defined %}BOMB{% endif %}",
        "{% if lipsum is callable and ('a' | e) is string %}BOMB{% endif %}",
        "{% if add_generation_prompt is false and messages[0].content.format is defined %}"
        "BOMB{% endif %}",
        "{% if messages[0].content is escaped or (messages[0].content | safe) is escaped %}"
        "BOMB{% endif %}",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "bomb",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        TWICE + "{{ ns.x == ns.y }}",
    ],
)
def test_fault_18_telling_the_two_environments_apart_is_of_no_use(source: str, bomb: str) -> None:
    """A bomb that goes off in the plain render only is paid for there as well."""
    assert all(len(text) < 200 for text in outcomes(source.replace("BOMB", bomb)))


def test_fault_18_hostile_syntax_ends_soon() -> None:
    started = time.thread_time()
    for source in (
        "{{ " + "(" * 3000 + " }}",
        "{{ " + "[" * 90_000 + " }}",
        "{% if a %}" * 3000,
        "{{ " + "not " * 50_000 + "a }}",
        "{{ " + "-" * 100_000 + "1 }}",
        "{{ a" + ".a" * 90_000 + " }}",
        "{{ a" + "|trim" * 30_000 + " }}",
        "{{ 1" + " + 1" * 45_000 + " }}",
        "{{ 1" + " * 1" * 45_000 + " }}",
        "{{ 'a'" + " ~ 'a'" * 30_000 + " }}",
        "{{ a" + " and a" * 30_000 + " }}",
        "{{ a" + " if a else a" * 15_000 + " }}",
        "{% for i in a %}" * 2000 + "{% endfor %}" * 2000,
        "{% set " + ",".join(["a"] * 60_000) + " = b %}",
        "{{ 9" + "9" * 150_000 + " }}",
        "{{ '\ud800' }}",
        "\ud800",
        "{% raw %}" * 10_000,
        "{#" * 90_000,
        "{{ '" + "\\x" * 90_000 + "' }}",
        "{% set __class__ = 1 %}{{ __class__ }}",
    ):
        try:
            ChatTemplate(source, now=NOW).render({"messages": [], "a": "a", "b": []})
        except InputError:
            continue
    assert time.thread_time() - started < 60
