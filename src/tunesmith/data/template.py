"""A chat template, compiled once: messages go in, tracked text comes out.

The syntax tree is rewritten so that string literals are tracked text and every loop turn ticks against the budget of
`sandbox.py`. `stock` renders the same template with plain strings and plain Jinja, as inference engines
do: the two texts must be equal.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from tunesmith.data.jinja import stock_environment
from tunesmith.data.sandbox import TrackedEnvironment
from tunesmith.data.tokenizer import read_json
from tunesmith.data.tracked import LostOrigin, TooLarge, Tracked, literal
from tunesmith.errors import InputError

MAX_SOURCE = 200_000  # characters; the largest known have 20,000

# What a template may raise by itself when it meets a row that it was not written for.
FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class ChatTemplate:
    """`literals`: every text that stands in the template. Dates are `now`."""

    def __init__(self, source: str, *, now: datetime, name: str = "chat template") -> None:
        if len(source) > MAX_SOURCE:
            raise InputError(f"the chat template has more than {MAX_SOURCE} characters", where=name)
        self.source, self.name = source, name
        self.literals: frozenset[str] = frozenset()
        self._lock = threading.Lock()  # the budget of a render lives in the environment
        self._environment = TrackedEnvironment(now)
        try:
            self._tracked = self._compile(source)
            self._stock = stock_environment(now).from_string(source)
        except TemplateSyntaxError as error:
            what = f"the chat template is not valid Jinja: {error.message}"
            raise InputError(what, where=f"{name}:{error.lineno}") from error
        except (TemplateError, RecursionError) as error:
            raise InputError(f"the chat template cannot be compiled: {error}", where=name) from error

    def _compile(self, source: str) -> Template:
        tree = self._environment.parse(source)
        texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self.literals = frozenset(texts | {node.data for node in tree.find_all(nodes.TemplateData)})
        tree = _Rewrite(self._environment).visit(tree)
        tree.set_environment(self._environment)
        code = self._environment.compile(tree)
        return Template.from_code(self._environment, code, self._environment.make_globals(None))

    def render(self, variables: Mapping[str, Any]) -> Tracked:
        """Raises InputError with the template's line; the caller adds the row."""
        with self._lock:
            self._environment.start_budget()
            try:
                context = self._tracked.new_context(dict(variables))
                return self._environment.output(self._tracked.root_render_func(context))
            except FAULTS as error:
                line = _template_line(error.__traceback__, self._tracked)
                place = f"{self.name}, line {line}: " if line else f"{self.name}: "
                raise InputError(f"{place}{_reason(error)}", fix=_remedy(error)) from error

    def stock(self, variables: Mapping[str, Any]) -> str:
        """To be called only after `render` went through with the same values, which bounds its work."""
        try:
            return "".join(self._stock.root_render_func(self._stock.new_context(dict(variables))))
        except FAULTS as error:
            raise InputError(f"{self.name}: plain Jinja cannot render this: {error}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"


def _remedy(error: BaseException) -> str:
    if isinstance(error, (LostOrigin, SecurityError)):
        return "write this part of the template with +, ~, trim, replace, join, split or tojson"
    if isinstance(error, TooLarge):
        return "look at the template: no chat needs that much work"
    return "change the row to what the template expects, or give another `template`"


def _template_line(trace: TracebackType | None, template: Template) -> int:
    """Line of the template where an error arose: the innermost frame that is compiled template code."""
    line = 0
    while trace is not None:
        if trace.tb_frame.f_globals.get("__jinja_template__") is template:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


def find_templates(folder: Path, given: Path | None, now: datetime) -> dict[str, ChatTemplate]:
    """The given file, or what the folder has, chat_template.jinja before tokenizer_config.json; perhaps nothing."""
    own, more = folder / "chat_template.jinja", folder / "additional_chat_templates"
    files = {"default": given or own}
    if not given and own.is_file():
        files |= {path.stem: path for path in sorted(more.glob("*.jinja"))}
    if given or own.is_file():
        sources = {name: (_read(path), path.name) for name, path in files.items()}
    else:
        entry: Any = read_json(folder / "tokenizer_config.json").get("chat_template") or []
        entries = entry if isinstance(entry, list) else [{"name": "default", "template": entry}]
        sources = {e["name"]: (e["template"], "chat_template of tokenizer_config.json") for e in entries}
    used = [name for name in ("default", "tool_use") if name in sources]
    return {name: ChatTemplate(sources[name][0], now=now, name=sources[name][1]) for name in used}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the chat template cannot be read: {error}", where=str(path)) from error


class _Rewrite(NodeTransformer):
    """String literals become tracked text; `+` and `~` become one call; loop turns tick (calls do it themselves)."""

    def __init__(self, environment: TrackedEnvironment) -> None:
        self.environment, self.made = environment, 0

    def visit_Const(self, node: nodes.Const) -> nodes.Expr:
        if not isinstance(node.value, str):
            return node
        self.made += 1
        name = f"text_{self.made}"
        setattr(self.environment, name, literal(node.value))
        return nodes.EnvironmentAttribute(name, lineno=node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, nodes.Const):  # a literal key is only looked up
            node.arg = self.visit(node.arg)
        return self._call("tick", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        if not isinstance(node.expr, nodes.Const):
            node.expr = self.visit(node.expr)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = self.visit(operand.expr)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [
            nodes.TemplateData(str(part.value), lineno=part.lineno)
            if isinstance(part, nodes.Const)
            else self.visit(part)
            for part in node.nodes
        ]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        terms: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            terms.append(left.right)
            left = left.left
        return self._chain("+", [left, *reversed(terms)], node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        return self._chain("~", node.nodes, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(self._tick(node.lineno), node.test, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(self._tick(node.lineno), lineno=node.lineno))
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise TemplateSyntaxError("autoescape is not supported in chat templates", node.lineno)

    def _tick(self, line: int) -> nodes.Expr:
        return self._call("tick", nodes.Const(True, lineno=line))

    def _chain(self, name: str, terms: list[nodes.Expr], line: int) -> nodes.Expr:
        return self._call(name, nodes.List([self.visit(term) for term in terms], lineno=line))

    def _call(self, name: str, value: nodes.Expr) -> nodes.Expr:
        return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
