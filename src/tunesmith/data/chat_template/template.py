"""A chat template, compiled once: messages go in, tracked text comes out.

The syntax tree is rewritten so that string literals are tracked text and all work is paid for
(budget.py). `stock` renders the same template with plain strings and Jinja's own filters, as
inference engines do: the two texts must be equal. Nothing here is rendered without a budget."""

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
from tunesmith.data.chat_template.bounding import CostTransformer
from tunesmith.data.chat_template.jinja_env import PlainEnvironment
from tunesmith.data.chat_template.sandbox_limits import LimitedEnvironment
from tunesmith.data.chat_template.tracked_env import TrackedEnvironment
from tunesmith.data.chat_template.tracked_str import (
    RenderLimitError,
    TrackedStr,
    UntrackedTextError,
    track_str,
)
from tunesmith.data.tokenizer.chat_tokenizer import read_json

MAX_SOURCE = 200_000  # characters; the largest known have 20,000

# What a template may raise by itself when it meets a row that it was not written for.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class ChatTemplate:
    """`literals`: every text that stands in the template; `asks`: every name that it looks up.
    Dates are `now`."""

    def __init__(self, source: str, *, now: datetime, name: str = "chat template") -> None:
        if len(source) > MAX_SOURCE:
            raise InputError(f"the chat template has more than {MAX_SOURCE} characters", where=name)
        self.source, self.name = source, name
        self._lock = threading.Lock()  # the budget of a render lives in the environment
        self._tracked_environment, self._plain_environment = (
            TrackedEnvironment(now),
            PlainEnvironment(now),
        )
        try:
            tree = self._plain_environment.parse(source)
            texts = {
                node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)
            }
            self.literals = frozenset(
                texts | {node.data for node in tree.find_all(nodes.TemplateData)}
            )
            self.undeclared_variables = frozenset(meta.find_undeclared_variables(tree))
            self._tracked_template = _compile_template(
                self._tracked_environment, source, _TrackingTransformer(self._tracked_environment)
            )
            self._plain_template = _compile_template(
                self._plain_environment, source, CostTransformer()
            )
        except TemplateSyntaxError as error:
            message = f"the chat template is not valid Jinja: {error.message}"
            raise InputError(message, where=f"{name}:{error.lineno}") from error
        except (
            TemplateError,
            RecursionError,
            ValueError,
        ) as error:  # ValueError: a number of thousands of digits
            raise InputError(
                f"the chat template cannot be compiled: {error}", where=name
            ) from error

    def render(self, variables: Mapping[str, Any]) -> TrackedStr:
        """Raises InputError with the template's line; the caller adds the row."""
        with self._lock, self._explained_errors(self._tracked_template):
            self._tracked_environment.start_budget()
            context = self._tracked_template.new_context(dict(variables))
            return self._tracked_environment.concat_output(
                self._tracked_template.root_render_func(context)
            )

    def render_plain(self, variables: Mapping[str, Any]) -> str:
        """The same by plain Jinja, under a budget of the same size."""
        with self._lock, self._explained_errors(self._plain_template):
            self._plain_environment.start_budget()
            context = self._plain_template.new_context(dict(variables))
            return "".join(
                self._plain_environment.limit_output(self._plain_template.root_render_func(context))
            )

    @contextmanager
    def _explained_errors(self, template: Template) -> Iterator[None]:
        try:
            yield
        except TEMPLATE_ERRORS as error:
            line = _find_template_line(error.__traceback__, template)
            location = f"{self.name}, line {line}: " if line else f"{self.name}: "
            raise InputError(
                f"{location}{_explain_error(error)}", fix=_suggest_fix(error)
            ) from error


def _compile_template(
    environment: LimitedEnvironment, source: str, transformer: CostTransformer
) -> Template:
    tree = transformer.visit(environment.parse(source))
    tree.set_environment(environment)
    return Template.from_code(
        environment, environment.compile(tree), environment.make_globals(None)
    )


def _explain_error(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"


def _suggest_fix(error: BaseException) -> str:
    if isinstance(error, (UntrackedTextError, SecurityError)):
        return "write this part of the template with +, ~, trim, replace, join, split or tojson"
    if isinstance(error, RenderLimitError):
        return "look at the template: no chat needs that much work"
    return "change the row to what the template expects, or give another `template`"


def _find_template_line(trace: TracebackType | None, template: Template) -> int:
    """Line of the template where an error arose: the innermost frame that is compiled template
    code."""
    line = 0
    while trace is not None:
        if trace.tb_frame.f_globals.get("__jinja_template__") is template:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


def find_templates(folder: Path, override: Path | None, now: datetime) -> dict[str, ChatTemplate]:
    """The given file, or what the folder has, chat_template.jinja before tokenizer_config.json;
    perhaps nothing."""
    default_file, extra_dir = folder / "chat_template.jinja", folder / "additional_chat_templates"
    files = {"default": override or default_file}
    if not override and default_file.is_file():
        files |= {path.stem: path for path in sorted(extra_dir.glob("*.jinja"))}
    if override or default_file.is_file():
        sources = {name: (_read_source(path), path.name) for name, path in files.items()}
    else:
        entry: Any = read_json(folder / "tokenizer_config.json").get("chat_template") or []
        entries = entry if isinstance(entry, list) else [{"name": "default", "template": entry}]
        sources = {
            e["name"]: (e["template"], "chat_template of tokenizer_config.json") for e in entries
        }
    names = [name for name in ("default", "tool_use") if name in sources]
    return {name: ChatTemplate(sources[name][0], now=now, name=sources[name][1]) for name in names}


def _read_source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the chat template cannot be read: {error}", where=str(path)) from error


class _TrackingTransformer(CostTransformer):
    """String literals become tracked text, where they are not only looked up or compared."""

    def __init__(self, environment: TrackedEnvironment) -> None:
        self.environment, self.num_literals = environment, 0

    def visit_Const(self, node: nodes.Const) -> nodes.Expr:
        if not isinstance(node.value, str):
            return node
        self.num_literals += 1
        name = f"text_{self.num_literals}"
        setattr(self.environment, name, track_str(node.value))
        return nodes.EnvironmentAttribute(name, lineno=node.lineno)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [
            nodes.TemplateData(str(part.value), lineno=part.lineno)
            if isinstance(part, nodes.Const)
            else self.visit(part)
            for part in node.nodes
        ]
        return node
