"""Templates of strangers: no way to Python, and nothing that hangs or fills the memory."""

import json
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from tunesmith.core.errors import InputError, Interrupted
from tunesmith.data.chat_template import template as module
from tunesmith.data.chat_template.compiled_template import (
    CompiledTemplate,
    TemplateInput,
    TemplateVariables,
)
from tunesmith.data.chat_template.template import ChatTemplate, is_popular

NOW = datetime(2026, 3, 4, 5, 6, 7)
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "yes"},
]
CHAT = TemplateInput(MESSAGES, None, TemplateVariables({}))
TWICE = (
    "{% set ns = namespace(x=[]) %}"
    "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
)
DOUBLE = (
    "{% set ns = namespace(s=messages[0].content ~ 'x') %}"
    "{% for i in range(15) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
)
GROWS = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = GROW %}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ lipsum.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ joiner.__init__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__class__ }}",
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
        "{{ messages | map(attribute='__class__') | first }}",
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
    """In the sandbox itself: the process around it is no part of that promise."""
    texts: list[str] = []
    for is_tracked in (True, False):
        try:
            template = CompiledTemplate(source, now=NOW)
            if is_tracked:
                texts.append(template.render(CHAT.build_tracked_context(2, has_prompt=False)))
            else:
                texts.append(template.render_plain(CHAT.build_context(2, has_prompt=False)))
        except InputError as error:
            texts.append(error.message)
    assert all(text == "" or text.startswith("chat template, line 1: ") for text in texts)


HOSTILE = [
    "{{ 'a' * 10**10 }}",
    "{{ [[0] * 99999] * 99999 * 99 }}",
    "{{ 9 ** (9 ** 9) }}",
    GROWS.replace("GROW", "ns.x + ns.x"),
    GROWS.replace("GROW", "ns.x ~ ns.x"),
    GROWS.replace("GROW", "ns.x | replace('a', 'aa')"),
    GROWS.replace("GROW", "'%s%s' % (ns.x, ns.x)"),
    GROWS.replace("GROW", "[ns.x, ns.x] | tojson"),
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + GROWS.replace("GROW", "f(ns.x)"),
    "{{ 'a' * 20_000_000 }}",
    "{{ messages | tojson(indent=10000000000) }}",
    "{{ ([range(99999) | list] * 99999) | sum(start=[]) }}",
    LOOPS,
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    TWICE + "{{ ns.x }}",
    TWICE + "{{ ns.x == [ns.x] }}{{ ns.x | tojson }}",
    TWICE + "{{ [ns.x, [ns.x]] | sort }}{{ ns.x | join }}",
    DOUBLE + "{% for i in range(99999) %}{% set x = ns.s[::-1].split('x') %}{% endfor %}",
    "{% set s = 'a' * 9000000 %}{{ s.rfind('a' * 4000000 ~ 'b' ~ 'a' * 400000) }}" + LOOPS,
    "{% if (messages[0].content | trim) is sameas messages[0].content %}" + LOOPS + "{% endif %}",
    "{% if ''.center is defined %}{{ 'a' * 10**10 }}{% endif %}",
    "{{ " + "(" * 3000 + " }}",
    "{{ " + "not " * 20_000 + "a }}",
    "{{ a" + ".a" * 30_000 + " }}",
    "{{ 1" + " + 1" * 24_000 + " }}",
    "{% for i in a %}" * 2000 + "{% endfor %}" * 2000,
    "{% set " + ",".join(["a"] * 40_000) + " = b %}",
    "{{ 9" + "9" * 90_000 + " }}",
    "\ud800{% break %}",
    "{{ dict(a=1, a=2) }}",
    "{% autoescape true %}{{ messages[0].content }}{% endautoescape %}",
]


def render_both(source: str) -> None:
    template = ChatTemplate(source, now=NOW)
    template.render(CHAT, 2)
    template.render_plain(CHAT, 2)


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_fault_18_a_hostile_template_is_refused_soon(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some have a way to tell the tracked render from the plain one, and wait for the latter."""
    monkeypatch.setattr(module, "MAX_SECONDS", 0.4)
    started = time.thread_time()
    with pytest.raises(InputError) as refusal:
        render_both(source)
    assert len(refusal.value.message) < 2_500
    assert time.thread_time() - started < 1


# ---------------------------------------------------------------- the process


def test_a_template_over_its_limit_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.5)
    template = ChatTemplate("{{ messages | length }}" + LOOPS, now=NOW, name="theirs.jinja")
    with pytest.raises(
        InputError, match=r"theirs\.jinja: a render takes over 0\.5 seconds"
    ) as first:
        template.render(CHAT, 2)
    started = time.monotonic()
    with pytest.raises(InputError) as second:
        template.render_plain(CHAT, 1)
    assert time.monotonic() - started < 0.1
    assert second.value is first.value
    assert first.value.fix
    assert ChatTemplate("{{ messages[1].role }}!", now=NOW).render(CHAT, 2) == "assistant!"


def test_a_render_that_fails_leaves_the_next_one_alone() -> None:
    template = ChatTemplate(
        "{% for i in range(20) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        "{{ 1 // (messages | length - 1) }}",
        now=NOW,
    )
    seconds = CHAT.seconds
    with pytest.raises(InputError, match="line 1: ZeroDivisionError"):
        template.render(CHAT, 1)
    assert template.render(CHAT, 2) == "1"
    assert CHAT.seconds > seconds, "the row pays for its time in the process"


def find_child() -> psutil.Process:
    """The process of the templates that this one has started."""
    children = psutil.Process().children()
    return next(child for child in children if any("start_templates" in a for a in child.cmdline()))


def test_a_killed_process_refuses_one_template_only() -> None:
    template = ChatTemplate("{{ messages[0].role }}?", now=NOW)
    find_child().kill()
    with pytest.raises(InputError, match="too much memory"):
        template.render(CHAT, 2)
    assert ChatTemplate("{{ messages[0].role }}?", now=NOW).render(CHAT, 2) == "user?"


def test_an_interrupt_during_a_render_ends_the_process() -> None:
    def stop(_number: int, _frame: object) -> None:
        raise Interrupted("stopped by SIGALRM")

    template = ChatTemplate(LOOPS + "{{ messages[0].role }}", now=NOW)
    child = find_child()
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Interrupted):
            template.render(CHAT, 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert ChatTemplate("{{ messages[0].role }}.", now=NOW).render(CHAT, 2) == "user."


def test_only_popular_templates_render_here() -> None:
    source = Path(__file__).parents[3] / "golden" / "chat_qwen3.json"
    template = json.loads(source.read_text())["template"]
    assert is_popular(template)
    assert is_popular(template + "\n")
    assert not is_popular(template + "{{ 1 }}")
    assert not is_popular("")
