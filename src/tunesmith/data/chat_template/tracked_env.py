"""The Jinja environment of tracked renders: tracked versions of all that makes or prints text.

    TrackedEnvironment(now)       renders tracked strings
    TrackingTransformer(env)      rewrites a syntax tree: literals are tracked, `+` and `~` chains
                                  become one filter call each

What has no tracked version makes text of unknown origin, which is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.filters import do_title
from jinja2.visitor import NodeTransformer

from tunesmith.data.chat_template.sandbox import (
    FORMAT_METHODS,
    SandboxEnvironment,
    dump_plain_json,
)
from tunesmith.data.chat_template.tracked_str import (
    TrackedStr,
    UntrackedTextError,
    concat,
    find_shared_origin,
    remap,
    stringify,
    track_str,
)

MAX_INDENT = 64
DIRECTIVE = re.compile(r"%(.)?", re.DOTALL)
_MISSING = object()


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
