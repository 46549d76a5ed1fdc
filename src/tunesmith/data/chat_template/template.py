"""A compiled chat template: messages in, tracked text out.

    ChatTemplate(source).render(variables)       -> TrackedStr
    ChatTemplate(source).render_plain(variables) -> str, by plain Jinja as inference engines render

The syntax tree is rewritten so that string literals are tracked and all work is charged to a budget
(`sandbox_limits.py`). Both renders must give the same text, and neither runs without a budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_file, read_json_object
from tunesmith.data.chat_template.jinja_env import PlainEnvironment
from tunesmith.data.chat_template.sandbox_limits import CostTransformer, LimitedEnvironment
from tunesmith.data.chat_template.tracked_env import TrackedEnvironment
from tunesmith.data.chat_template.tracked_str import (
    RenderLimitError,
    TrackedStr,
    UntrackedTextError,
    track_str,
)

# What a template of a stranger can raise while it is compiled or rendered. Signals (Interrupted)
# and MemoryError are none of it, and pass.
TEMPLATE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    SyntaxError,
    TemplateError,
    TypeError,
    ValueError,
)
MAX_SOURCE = 100_000  # characters; the largest real templates have 20,000
MAX_SOURCE_BYTES = 4 * MAX_SOURCE
MAX_NODES = 30_000  # of the syntax tree
MAX_PARTS = 300  # macros and blocks; branches of one condition; terms of one comparison


@dataclass
class RowSteps:
    """The steps of all renders of a row, as `LimitedEnvironment` counts them."""

    plain: int = 0
    tracked: int = 0


class ChatTemplate:
    """`literals` are all strings in the template, `undeclared_variables` the names it looks up, and
    `compared_values` the strings that it compares each name with."""

    def __init__(self, source: str, *, now: datetime, name: str = "chat template") -> None:
        """Compile a template. `now` is the date that it sees. Raises InputError if it is not valid
        Jinja."""
        if len(source) > MAX_SOURCE:
            raise InputError(f"the chat template has more than {MAX_SOURCE} characters", where=name)
        self.source = source
        self.name = name
        self._lock = threading.Lock()  # the budget of a render is state of the environment
        self._tracked_environment = TrackedEnvironment(now)
        self._plain_environment = PlainEnvironment(now)
        try:
            self._compile()
        except TemplateSyntaxError as error:
            message = f"the chat template is not valid Jinja: {error.message}"
            raise InputError(message, where=f"{name}:{error.lineno}") from error
        except TEMPLATE_ERRORS as error:
            message = f"the chat template cannot be compiled: {_explain_error(error)}"
            fix = "check the template for `break` outside loops, names used twice, deep nesting"
            raise InputError(message, where=name, fix=fix) from error

    def _compile(self) -> None:
        tree = self._plain_environment.parse(self.source)
        _check_size(tree)
        constants = [node.value for node in tree.find_all(nodes.Const)]
        literals = {value for value in constants if isinstance(value, str)}
        literals |= {node.data for node in tree.find_all(nodes.TemplateData)}
        self.literals = frozenset(literals)
        self.compared_values = _find_compared_values(tree)  # first: `meta` folds constants
        names = meta.find_undeclared_variables(tree) - set(self._plain_environment.globals)
        self.undeclared_variables = frozenset(names)
        tracking = _TrackingTransformer(self._tracked_environment)
        self._tracked_template = _compile_template(self._tracked_environment, self.source, tracking)
        self._plain_template = _compile_template(
            self._plain_environment, self.source, CostTransformer()
        )

    def render(self, variables: Mapping[str, Any], row_steps: RowSteps | None = None) -> TrackedStr:
        """Render tracked text and count its steps in those of the row. Raises InputError with the
        template's line; the caller adds the row."""
        environment = self._tracked_environment
        with self._lock, self._explained_errors(self._tracked_template):
            environment.start_budget()
            context = self._tracked_template.new_context(dict(variables))
            text = environment.concat_output(self._tracked_template.root_render_func(context))
            if row_steps is not None:
                row_steps.tracked += environment.num_steps
            return text

    def render_plain(self, variables: Mapping[str, Any], row_steps: RowSteps | None = None) -> str:
        """Render the same with plain Jinja, under a budget of the same size."""
        environment = self._plain_environment
        with self._lock, self._explained_errors(self._plain_template):
            environment.start_budget()
            context = self._plain_template.new_context(dict(variables))
            pieces = self._plain_template.root_render_func(context)
            text = "".join(environment.limit_output(pieces))
            if row_steps is not None:
                row_steps.plain += environment.num_steps
            return text

    @contextmanager
    def _explained_errors(self, template: Template) -> Iterator[None]:
        try:
            yield
        except TEMPLATE_ERRORS as error:
            line = _find_template_line(error.__traceback__, template)
            location = f"{self.name}, line {line}: " if line else f"{self.name}: "
            # an f-string, since `+` refuses to mix plain text with the template's tracked message
            message = f"{location}{_explain_error(error)}"
            raise InputError(message, fix=_suggest_fix(error)) from error


def _check_size(tree: nodes.Template) -> None:
    """Raise RenderLimitError for a syntax tree that would take long to compile."""
    num_nodes = num_functions = 0
    todo: list[nodes.Node] = [tree]
    while todo:
        node = todo.pop()
        num_nodes += 1
        num_functions += isinstance(node, (nodes.Macro, nodes.Block))
        num_branches = len(node.elif_) if isinstance(node, nodes.If) else 0
        num_terms = len(node.ops) if isinstance(node, nodes.Compare) else 0
        if max(num_functions, num_branches, num_terms) > MAX_PARTS:
            parts = "macros and blocks, branches of a condition or terms of a comparison"
            raise RenderLimitError(f"more than {MAX_PARTS} {parts}")
        if num_nodes > MAX_NODES:
            raise RenderLimitError(f"more than {MAX_NODES} expressions")
        todo += node.iter_child_nodes()


def _find_compared_values(tree: nodes.Template) -> dict[str, frozenset[str]]:
    values: dict[str, frozenset[str]] = {}
    for node in tree.find_all(nodes.Compare):
        names = {name.name for name in node.find_all(nodes.Name)}
        constants = [constant.value for constant in node.find_all(nodes.Const)]
        texts = frozenset(value for value in constants if isinstance(value, str))
        for name in names:
            values[name] = values.get(name, frozenset()) | texts
    return values


def _compile_template(
    environment: LimitedEnvironment, source: str, transformer: CostTransformer
) -> Template:
    tree = transformer.visit(environment.parse(source))
    tree.set_environment(environment)
    code = environment.compile(tree)
    return Template.from_code(environment, code, environment.make_globals(None))


def _explain_error(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "infinite recursion"
    if isinstance(error, SyntaxError):  # Python's own; its location is that of compiled code
        return error.msg
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"


def _suggest_fix(error: BaseException) -> str:
    if isinstance(error, (UntrackedTextError, SecurityError)):
        return "write this part of the template with +, ~, trim, replace, join, split or tojson"
    if isinstance(error, RenderLimitError):
        return "check the template: no chat needs that much work"
    return "change the row to what the template expects, or set another `chat_template`"


def _find_template_line(trace: TracebackType | None, template: Template) -> int:
    """Return the template line of an error, from the innermost frame of compiled template code, or
    0."""
    line = 0
    while trace is not None:
        is_compiled_code = trace.tb_frame.f_globals.get("__jinja_template__") is template
        if is_compiled_code and trace.tb_lineno is not None:  # None at a few instructions
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


def find_templates(folder: Path, override: Path | None, now: datetime) -> dict[str, ChatTemplate]:
    """Load the templates of a model folder, "default" and perhaps "tool_use": from `override`, else
    chat_template.jinja, else tokenizer_config.json. A folder may have none."""
    default_file = folder / "chat_template.jinja"
    sources: dict[str, tuple[str, str]] = {}  # name -> (source, where it is from)
    if override or default_file.is_file():
        files = {"default": override or default_file}
        if not override:
            extra_files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
            files |= {path.stem: path for path in extra_files}
        for name, path in files.items():
            sources[name] = (_read_source(path), path.name)
    else:
        config = read_json_object(folder / "tokenizer_config.json", is_optional=True)
        where = "chat_template of tokenizer_config.json"
        for name, source in _read_config_templates(config.get("chat_template"), folder):
            sources[name] = (source, where)
    templates: dict[str, ChatTemplate] = {}
    for name in ("default", "tool_use"):
        if name in sources:
            source, where = sources[name]
            templates[name] = ChatTemplate(source, now=now, name=where)
    return templates


def _read_config_templates(entry: Any, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, source) of each template in tokenizer_config.json: one text, or a list of
    objects with both."""
    if isinstance(entry, str):
        entry = [{"name": "default", "template": entry}] if entry else None
    for item in entry if isinstance(entry, list) else [] if entry is None else [entry]:
        name = item.get("name") if isinstance(item, dict) else None
        source = item.get("template") if isinstance(item, dict) else None
        if not isinstance(name, str) or not isinstance(source, str):
            raise InputError(
                f"chat_template is not a text or a list of name and template: {str(item)[:80]!r}",
                where=str(folder / "tokenizer_config.json"),
                fix="correct it, or set `chat_template` to a template file",
            )
        yield name, source


def _read_source(path: Path) -> str:
    content = read_file(path, max_bytes=MAX_SOURCE_BYTES)
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the chat template cannot be read: {error}", where=str(path)) from error


class _TrackingTransformer(CostTransformer):
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
