"""Jinja's sandbox with the settings and globals that transformers gives to chat templates.

    SandboxEnvironment      base of the tracked (tracked_env.py) and the plain environment
    PlainEnvironment(now)   renders plain strings, as inference engines do

A template reaches no Python: attributes are closed as jinja2 closes them, and what hides the origin
of text is refused by name. How long a template may take is not decided here: unknown templates run
in a guarded process (`template.py`). The rules are those of transformers; nothing of it is
imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tunesmith.data.chat_template.tracked_str import UntrackedTextError

ALLOWED_FILTERS = frozenset({
    "length", "count", "first", "last", "list", "items", "map", "select", "selectattr", "reject",
    "rejectattr", "d", "default", "reverse", "attr", "abs", "float", "int", "max", "min", "sum",
    "unique", "wordcount", "sort", "groupby", "dictsort", "string", "safe", "trim", "upper",
    "lower", "capitalize", "title", "replace", "join", "indent", "format", "tojson",
})  # fmt: skip
# Methods of texts whose result has no origin.
CLOSED_STR_ATTRIBUTES = frozenset({
    "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans", "encode",
})  # fmt: skip
FORMAT_METHODS = ("format", "format_map")
MAX_CACHED_ATTRIBUTES = 1_000
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
        """`filters` are those that templates may use, `strftime` prints the date."""
        extensions = [GenerationTag, loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions, **settings
        )
        refusals = {name: _make_refusal(f"the filter {name!r}") for name in FILTERS}
        self.filters = {**refusals, **filters}
        self.globals |= {
            "lipsum": _make_refusal("lipsum()"),
            "raise_exception": _raise_exception,
            "dict": _Dict(),
            "namespace": _Namespace,
            "strftime_now": strftime,
        }
        self.global_values = tuple(self.globals.values())
        self.function_types = {type(value) for value in self.global_values}
        self._safe_attributes: set[tuple[type, str]] = set()

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(self._refuse_function(obj), argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # a field of a message, looked up faster than by jinja
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        # once found safe, nothing but the value is looked up
        if (type(obj), attribute) in self._safe_attributes:
            value = getattr(obj, attribute, _MISSING)
            if value is not _MISSING:
                return value
        return super().getattr(self._refuse_function(obj), attribute)

    def _refuse_function(self, obj: Any) -> Any:
        """Refuse the attributes of global functions, which may only be called, and return other
        objects."""
        if type(obj) in self.function_types and any(obj is value for value in self.global_values):
            raise SecurityError("the attributes of a function are closed")
        return obj

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = type(obj), attr  # the slow answer depends on nothing else
        if key not in self._safe_attributes:
            if len(self._safe_attributes) == MAX_CACHED_ATTRIBUTES:
                self._safe_attributes.clear()
            if not super().is_safe_attribute(obj, attr, value):
                raise SecurityError(f"the attribute {attr!r} of a {type(obj).__name__} is closed")
            if isinstance(obj, str) and attr in CLOSED_STR_ATTRIBUTES:
                raise UntrackedTextError(f"str.{attr}")
            # global functions stay closed, and `format` depends on the value
            if type(obj) not in self.function_types and attr not in FORMAT_METHODS:
                self._safe_attributes.add(key)
        return True

    def wrap_str_format(self, value: Any) -> None:
        if getattr(value, "__name__", "") in FORMAT_METHODS:
            raise UntrackedTextError(f"str.{value.__name__}")


class PlainEnvironment(SandboxEnvironment):
    """Render plain text with Jinja's own filters."""

    def __init__(self, now: datetime) -> None:
        filters = {name: FILTERS[name] for name in ALLOWED_FILTERS}
        super().__init__(filters | {"tojson": dump_plain_json}, now.strftime)


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


def _make_refusal(construct: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UntrackedTextError(construct)

    return refuse


def _raise_exception(message: Any) -> str:
    raise TemplateError(str(message))
