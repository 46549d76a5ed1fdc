"""A chat template, compiled once: messages go in, tracked text comes out.

The syntax tree is rewritten so that string literals are tracked text and all work is paid for (budget.py). `stock`
renders the same template with plain strings and Jinja's own filters, as inference engines do: the two texts must be
equal. Nothing here is rendered without a budget.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError

from tunesmith.core.errors import InputError
from tunesmith.data.chat_template.bounding import Bounding
from tunesmith.data.chat_template.jinja_env import StockEnvironment
from tunesmith.data.chat_template.sandbox_limits import Budgeted
from tunesmith.data.chat_template.tracked_env import TrackedEnvironment
from tunesmith.data.chat_template.tracked_str import LostOrigin, TooLarge, Tracked, literal
from tunesmith.data.tokenizer.chat_tokenizer import read_json

MAX_SOURCE = 200_000  # characters; the largest known have 20,000

# What a template may raise by itself when it meets a row that it was not written for.
FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class ChatTemplate:
    """`literals`: every text that stands in the template; `asks`: every name that it looks up. Dates are `now`."""

    def __init__(self, source: str, *, now: datetime, name: str = "chat template") -> None:
        if len(source) > MAX_SOURCE:
            raise InputError(f"the chat template has more than {MAX_SOURCE} characters", where=name)
        self.source, self.name = source, name
        self._lock = threading.Lock()  # the budget of a render lives in the environment
        self._environment, self._plain = TrackedEnvironment(now), StockEnvironment(now)
        try:
            tree = self._plain.parse(source)
            texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
            self.literals = frozenset(texts | {node.data for node in tree.find_all(nodes.TemplateData)})
            self.asks = frozenset(meta.find_undeclared_variables(tree))
            self._tracked = _compiled(self._environment, source, _Tracking(self._environment))
            self._stock = _compiled(self._plain, source, Bounding())
        except TemplateSyntaxError as error:
            what = f"the chat template is not valid Jinja: {error.message}"
            raise InputError(what, where=f"{name}:{error.lineno}") from error
        except (TemplateError, RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
            raise InputError(f"the chat template cannot be compiled: {error}", where=name) from error

    def render(self, variables: Mapping[str, Any]) -> Tracked:
        """Raises InputError with the template's line; the caller adds the row."""
        with self._lock, self._faults(self._tracked):
            self._environment.start_budget()
            context = self._tracked.new_context(dict(variables))
            return self._environment.output(self._tracked.root_render_func(context))

    def stock(self, variables: Mapping[str, Any]) -> str:
        """The same by plain Jinja, under a budget of the same size."""
        with self._lock, self._faults(self._stock):
            self._plain.start_budget()
            context = self._stock.new_context(dict(variables))
            return "".join(self._plain.bounded(self._stock.root_render_func(context)))

    @contextmanager
    def _faults(self, template: Template) -> Iterator[None]:
        try:
            yield
        except FAULTS as error:
            line = _template_line(error.__traceback__, template)
            place = f"{self.name}, line {line}: " if line else f"{self.name}: "
            raise InputError(f"{place}{_reason(error)}", fix=_remedy(error)) from error


def _compiled(environment: Budgeted, source: str, rewrite: Bounding) -> Template:
    tree = rewrite.visit(environment.parse(source))
    tree.set_environment(environment)
    return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


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


class _Tracking(Bounding):
    """String literals become tracked text, where they are not only looked up or compared."""

    def __init__(self, environment: TrackedEnvironment) -> None:
        self.environment, self.made = environment, 0

    def visit_Const(self, node: nodes.Const) -> nodes.Expr:
        if not isinstance(node.value, str):
            return node
        self.made += 1
        name = f"text_{self.made}"
        setattr(self.environment, name, literal(node.value))
        return nodes.EnvironmentAttribute(name, lineno=node.lineno)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [
            nodes.TemplateData(str(part.value), lineno=part.lineno)
            if isinstance(part, nodes.Const)
            else self.visit(part)
            for part in node.nodes
        ]
        return node
