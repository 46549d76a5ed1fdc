"""Jinja as chat templates know it: the settings and names that transformers gives them.

    StockEnvironment(now): renders plain strings, as inference engines do, under a budget

The rules are those of transformers' chat templates; nothing of it is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.utils import Namespace

from tunesmith.data.chat_template.sandbox_checks import added, check_join
from tunesmith.data.chat_template.sandbox_limits import USABLE, Budgeted
from tunesmith.data.chat_template.tracked_str import TooLarge


class Generation(Extension):
    """`{% generation %}` marks answers for other tools; the mask here does not need it."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Macro) -> str:
        return caller()


def settings() -> dict[str, Any]:
    """Those of transformers: what a chat template may count on."""
    return {"trim_blocks": True, "lstrip_blocks": True, "optimized": False, "extensions": [Generation, loopcontrols]}


def names() -> dict[str, Any]:
    return {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace}


class StockEnvironment(Budgeted):
    """Plain text, by Jinja's own filters."""

    def __init__(self, now: datetime) -> None:
        filters = {name: FILTERS[name] for name in USABLE} | {"tojson": stock_json, "+": added, "~": _joined}
        functions = names() | {"strftime_now": lambda form: formatted(now, form)}
        super().__init__(filters, functions, finalize=_printed, **settings())
        self.concat = self._concat  # pyright: ignore[reportAttributeAccessIssue]

    def _concat(self, pieces: Iterable[str]) -> str:
        return self.charge("".join(self.bounded(pieces)))


@pass_environment
def _printed(environment: StockEnvironment, value: Any) -> Any:
    return environment.walked(value)


def _joined(values: list[Any]) -> str:
    """Terms of a `~`."""
    texts = [str(value) for value in values]
    check_join("", texts)
    return "".join(texts)


def formatted(now: datetime, form: str) -> str:
    if len(form) > 200 or re.search(r"%\W*\d", form):
        raise TooLarge("strftime_now with a width")
    return now.strftime(form)


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
