"""Jinja with the settings and globals that transformers gives to chat templates.

    PlainEnvironment(now)   renders plain strings under a budget, as inference engines do

The rules are those of transformers; nothing of it is imported."""

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

from tunesmith.data.chat_template.sandbox_checks import add_terms, check_join
from tunesmith.data.chat_template.sandbox_limits import ALLOWED_FILTERS, LimitedEnvironment
from tunesmith.data.chat_template.tracked_str import RenderLimitError


class GenerationTag(Extension):
    """Accept `{% generation %}`, which marks answers for other tools; it is ignored here."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Macro) -> str:
        return caller()


def get_jinja_settings() -> dict[str, Any]:
    """Return the environment settings of transformers."""
    return {
        "trim_blocks": True,
        "lstrip_blocks": True,
        "optimized": False,
        "extensions": [GenerationTag, loopcontrols],
    }


def get_jinja_globals() -> dict[str, Any]:
    return {"raise_exception": _raise_exception, "dict": _Dict(), "namespace": _Namespace}


class PlainEnvironment(LimitedEnvironment):
    """Render plain text with Jinja's own filters."""

    def __init__(self, now: datetime) -> None:
        filters = {name: FILTERS[name] for name in ALLOWED_FILTERS}
        filters |= {"tojson": dump_plain_json, "+": add_terms, "~": _join_terms}
        functions = get_jinja_globals()
        functions["strftime_now"] = lambda date_format: format_date(now, date_format)
        super().__init__(filters, functions, finalize=_finalize_value, **get_jinja_settings())
        self.concat = self._concat  # pyright: ignore[reportAttributeAccessIssue]

    def _concat(self, pieces: Iterable[str]) -> str:
        return self.charge("".join(self.limit_output(pieces)))


@pass_environment
def _finalize_value(environment: PlainEnvironment, value: Any) -> Any:
    return environment.charge_contents(value)


def _join_terms(values: list[Any]) -> str:
    """Join the terms of a `~` chain."""
    texts = [str(value) for value in values]
    check_join("", texts)
    return "".join(texts)


def format_date(now: datetime, date_format: str) -> str:
    if len(date_format) > 200 or re.search(r"%\W*\d", date_format):
        raise RenderLimitError("strftime_now with a width")
    return now.strftime(date_format)


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


class _Namespace(Namespace):
    def __init__(*args: Any, **values: Any) -> None:  # so that namespace(self=...) works
        attributes = dict(*args[1:], **values)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _Dict:
    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: Any) -> str:
    raise TemplateError(str(message))
