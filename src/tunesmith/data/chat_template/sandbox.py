"""Jinja's sandbox with the settings and globals that transformers gives to chat templates.

    SandboxEnvironment      base of the tracked (tracked_env.py) and the plain environment
    PlainEnvironment(now)   renders plain strings, as inference engines do

A template reaches no Python: jinja2 closes what leads there. How long a template may take is not
decided here: unknown templates run in a guarded process (`template.py`). The rules are those of
transformers; nothing of it is imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

FORMAT_METHODS = ("format", "format_map")
_DICT_ATTRIBUTES = frozenset(dir(dict))
_MISSING = object()


class NoConstantFolding(CodeGenerator):
    """Compile without computing constants, which would print as the template's own text."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible


class GenerationTag(Extension):
    """Accept `{% generation %}`, which marks answers for other tools; it is ignored here."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Macro) -> str:
        return caller()


class SandboxEnvironment(ImmutableSandboxedEnvironment):
    code_generator_class = NoConstantFolding

    def __init__(
        self,
        filters: Mapping[str, Callable[..., Any]],
        strftime: Callable[[str], str],
        **settings: Any,
    ) -> None:
        """`filters` replace jinja's own, `strftime` prints the date."""
        extensions = [GenerationTag, loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions, **settings
        )
        self.filters |= filters
        del self.filters["random"], self.globals["lipsum"]  # a render is the same each time
        self._safe_attributes: set[tuple[type, str]] = set()
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": strftime}

    def getattr(self, obj: Any, attribute: str) -> Any:
        # a field of a message, looked up faster than by jinja
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if (type(obj), attribute) in self._safe_attributes:
            value = getattr(obj, attribute, _MISSING)
            if value is not _MISSING:
                return value
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        is_safe = super().is_safe_attribute(obj, attr, value)
        if is_safe and attr not in FORMAT_METHODS:  # those are wrapped each time
            self._safe_attributes.add((type(obj), attr))  # the slow answer depends on no more
        return is_safe


class PlainEnvironment(SandboxEnvironment):
    """Render plain text with Jinja's own filters."""

    def __init__(self, now: datetime) -> None:
        super().__init__({"tojson": dump_plain_json}, now.strftime)


def dump_plain_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> str:
    raise TemplateError(str(message))
