"""Jinja's sandbox with the settings and globals that transformers gives to chat templates.

    PlainEnvironment(now)     renders plain strings, as inference engines do
    TrackedEnvironment(now)   renders tracked strings
    TrackingTransformer(env)  rewrites a syntax tree: literals are tracked, `+` and `~` chains
                              become one filter call each

A template reaches no Python: jinja2 closes what leads there. How long a template may take is not
decided here: unknown templates run in a guarded process (`template.py`). The rules are those of
transformers; nothing of it is imported. In a tracked render, what has no tracked version makes text
of unknown origin, which is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_title
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tunesmith.data.chat_template.tracked_str import (
    TrackedStr,
    UntrackedTextError,
    concat,
    find_shared_origin,
    remap,
    stringify,
    track_str,
)

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


# ---------------------------------------------------------------- tracked renders

MAX_INDENT = 64
DIRECTIVE = re.compile(r"%(.)?", re.DOTALL)


class TrackedEnvironment(SandboxEnvironment):
    intercepted_binops = frozenset({"%"})

    def __init__(self, now: datetime) -> None:
        def strftime(date_format: str) -> TrackedStr:
            return track_str(now.strftime(date_format))

        super().__init__(_FILTERS, strftime, finalize=stringify)
        self.concat = self.concat_output

    def concat_output(self, pieces: Iterable[str]) -> TrackedStr:
        """Join output: expressions print tracked text, plain pieces are the template's text."""
        tracked: list[TrackedStr] = []
        for piece in pieces:
            tracked.append(piece if type(piece) is TrackedStr else track_str(piece))
        return concat(tracked)

    def wrap_str_format(self, value: Any) -> None:
        if getattr(value, "__name__", "") in FORMAT_METHODS:
            raise UntrackedTextError(f"str.{value.__name__}")

    def call_binop(self, *args: Any, **_: Any) -> Any:
        """Apply `%`, the only intercepted operator."""
        first, second = args[2:]
        if isinstance(first, str):
            return _format_percent(stringify(first), second)
        return first % second


class TrackingTransformer(NodeTransformer):
    """Replace string literals by tracked text, unless they are only looked up or compared."""

    def __init__(self, environment: TrackedEnvironment) -> None:
        self.environment = environment
        self.num_literals = 0

    def visit_Const(self, node: nodes.Const) -> nodes.Expr:
        if not isinstance(node.value, str):
            return node
        self.num_literals += 1
        name = f"text_{self.num_literals}"
        setattr(self.environment, name, track_str(node.value))
        return nodes.EnvironmentAttribute(name, lineno=node.lineno)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        parts: list[nodes.Expr] = []
        for part in node.nodes:
            if isinstance(part, nodes.Const):
                parts.append(nodes.TemplateData(str(part.value), lineno=part.lineno))
            else:
                parts.append(self.visit(part))
        node.nodes = parts
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, nodes.Const):  # a literal key is only looked up
            node.arg = self.visit(node.arg)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        for operand in [node, *node.ops]:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = self.visit(operand.expr)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        terms: list[nodes.Expr] = []
        first_term: nodes.Expr = node
        while isinstance(first_term, nodes.Add):
            terms.append(first_term.right)
            first_term = first_term.left
        return self._make_chain("+", [first_term, *reversed(terms)], node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        return self._make_chain("~", node.nodes, node.lineno)

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        # what it prints would pass for the template's own text
        raise TemplateSyntaxError("autoescape is not supported in chat templates", node.lineno)

    def _make_chain(self, name: str, terms: list[nodes.Expr], line: int) -> nodes.Expr:
        chain = nodes.List([self.visit(term) for term in terms], lineno=line)
        return nodes.Filter(chain, name, [], [], None, None, lineno=line)


# ---------------------------------------------------------------- operators


def _format_percent(pattern: TrackedStr, values: Any) -> TrackedStr:
    """Format %s and %%; other directives are refused, since they have widths."""
    arguments = iter(values if isinstance(values, tuple) else (values,))
    pieces: list[str] = []
    position = 0
    for match in DIRECTIVE.finditer(pattern):
        pieces.append(pattern[position : match.start()])
        position = match.end()
        if match[1] not in ("s", "%"):
            raise UntrackedTextError(f"{match[0]} in a % format")
        if match[1] == "%":
            pieces.append(pattern[position - 1])
            continue
        argument = next(arguments, _MISSING)
        if argument is _MISSING:
            raise TypeError("not enough arguments for format string")
        pieces.append(stringify(argument))
    if next(arguments, _MISSING) is not _MISSING and not isinstance(values, dict):
        raise TypeError("not all arguments converted during string formatting")
    return concat([*pieces, pattern[position:]])


def _add_tracked(values: list[Any]) -> Any:
    if all(type(value) is TrackedStr for value in values):
        return concat(values)
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


# ---------------------------------------------------------------- filters


def _join_tracked(values: Any, d: str = "", attribute: str | int | None = None) -> TrackedStr:
    if attribute is not None:
        raise UntrackedTextError("join with an attribute")
    return stringify(d).join([stringify(value) for value in values])


def _replace_tracked(text: Any, old: str, new: str, count: int | None = None) -> TrackedStr:
    return stringify(text).replace(old, new, -1 if count is None else count)


def _indent_tracked(
    text: Any, width: int = 4, first: bool = False, blank: bool = False
) -> TrackedStr:
    if not isinstance(width, int) or width > MAX_INDENT:
        raise UntrackedTextError(f"indent by a text or by more than {MAX_INDENT}")
    margin = track_str(" " * width)
    newline = track_str("\n")
    lines: list[TrackedStr] = []
    for i, line in enumerate((stringify(text) + newline).splitlines()):
        should_indent = first if i == 0 else bool(line) or blank
        lines.append(margin + line if should_indent else line)
    return newline.join(lines)


def _dump_tracked_json(value: Any, *args: Any, **settings: Any) -> TrackedStr:
    """Dump JSON; all of it has the one origin of the strings inside."""
    return track_str(dump_plain_json(value, *args, **settings), find_shared_origin(value))


# The usual filters that make text. What another one makes has no origin, and is refused where it is
# printed.
_FILTERS: dict[str, Callable[..., Any]] = {
    "+": _add_tracked,
    "~": lambda values: concat([stringify(value) for value in values]),
    "list": list,
    "string": stringify,
    "safe": stringify,
    "trim": lambda text, chars=None: stringify(text).strip(chars),
    "upper": lambda text: stringify(text).upper(),
    "lower": lambda text: stringify(text).lower(),
    "capitalize": lambda text: stringify(text).capitalize(),
    "title": lambda text: remap(stringify(text), do_title(text), "title"),
    "replace": _replace_tracked,
    "join": _join_tracked,
    "indent": _indent_tracked,
    "format": lambda pattern, *values: _format_percent(stringify(pattern), values),
    "tojson": _dump_tracked_json,
}
