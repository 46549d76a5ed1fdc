"""Jinja as chat templates know it: the settings and names that transformers gives them.

    stock_environment(now): renders plain strings, as inference engines do

The rules are those of transformers' chat templates; nothing of it is imported.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(Extension):
    """`{% generation %}` marks answers for other tools; the mask here does not need it."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Macro) -> str:
        return caller()


class NoFolding(CodeGenerator):
    """Nothing is computed while a template is compiled: no budget would bound it."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible


def settings() -> dict[str, Any]:
    """Those of transformers: what a chat template may count on."""
    return {"trim_blocks": True, "lstrip_blocks": True, "optimized": False, "extensions": [Generation, loopcontrols]}


def names() -> dict[str, Any]:
    return {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace}


class _StockEnvironment(ImmutableSandboxedEnvironment):
    code_generator_class = NoFolding


def stock_environment(now: datetime) -> ImmutableSandboxedEnvironment:
    environment = _StockEnvironment(**settings())
    environment.filters["tojson"] = stock_json
    environment.globals |= names()
    environment.globals["strftime_now"] = now.strftime
    return environment


def stock_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(Namespace):
    def __init__(*args: Any, **values: Any) -> None:  # so that namespace(self=...) works
        given = dict(*args[1:], **values)
        for name in given:
            _no_underscore(name)
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _no_underscore(name)
        Namespace.__setitem__(self, name, value)


def _no_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _Dict:
    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise(message: Any) -> str:
    raise TemplateError(str(message))
