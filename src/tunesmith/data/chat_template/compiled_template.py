"""A compiled chat template, and what it sees of a conversation.

    CompiledTemplate(source, now).render(context)       -> TrackedStr
    CompiledTemplate(source, now).render_plain(context) -> str, by plain Jinja as engines render
    start_templates(None)   the job of the guarded process in which unknown templates run

Both renders must give the same text; the caller compares them. The sandbox bounds what a template
reaches, not how long it takes: that is up to the process it runs in (`template.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property, lru_cache
from types import TracebackType
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.sandbox import (
    PlainEnvironment,
    SandboxEnvironment,
    TrackedEnvironment,
    TrackingTransformer,
)
from tunesmith.data.chat_template.tracked_str import (
    TEMPLATE,
    TOOLS,
    TrackedStr,
    UntrackedTextError,
    get_plain_text,
    get_runs,
    make_origin,
    track_str,
)

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
MAX_COMPILED = 16  # templates that the process keeps
MAX_OUTPUT_CHARS = 10_000_000
_FIELD_BY_KEY = {"content": "content", "tool_calls": "tool_calls"} | dict.fromkeys(
    REASONING_KEYS, "reasoning"
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


def track_value(value: Any, origin: int) -> Any:
    """Return a JSON value with all its strings, keys included, tracked to one origin."""
    if isinstance(value, str):
        return track_str(value, origin)
    if isinstance(value, dict):
        return {track_str(key, origin): track_value(inner, origin) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [track_value(inner, origin) for inner in value]
    return value


class TemplateVariables:
    """Variables of a template besides the conversation: special tokens and the user's settings.
    Their text counts as the template's."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.plain = dict(values)
        self.tracked = track_value(self.plain, TEMPLATE)


class TemplateInput:
    """What a template sees: normalized messages, tools and variables, plain and tracked."""

    def __init__(
        self, messages: Sequence[Json], tools: Sequence[Json] | None, variables: TemplateVariables
    ) -> None:
        self.messages = list(messages)
        self.tools = None if tools is None else list(tools)
        self.variables = variables
        self.seconds = 0.0  # of a processor, that its renders have taken

    def build_context(self, count: int, *, has_prompt: bool) -> Json:
        """Return the variables of a plain render of the first `count` messages."""
        conversation = build_context(self.messages[:count], self.tools, has_prompt)
        return self.variables.plain | conversation

    def build_tracked_context(self, count: int, *, has_prompt: bool) -> Json:
        messages = self._tracked_messages[:count]
        return self.variables.tracked | build_context(messages, self._tracked_tools, has_prompt)

    @cached_property
    def _tracked_tools(self) -> list[Any] | None:
        return None if self.tools is None else track_value(self.tools, TOOLS)

    @cached_property
    def _tracked_messages(self) -> list[dict[TrackedStr, Any]]:
        return [_track_message(i, message) for i, message in enumerate(self.messages)]


def _track_message(index: int, message: Json) -> dict[TrackedStr, Any]:
    tracked: dict[TrackedStr, Any] = {}
    for key, value in message.items():
        origin = make_origin(index, _FIELD_BY_KEY.get(key, "other"))
        tracked[track_str(key, origin)] = track_value(value, origin)
    tracked[track_str("role")] = track_str(message["role"])  # from a list, not from the row
    return tracked


def build_context(messages: list[Any], tools: list[Any] | None, has_prompt: bool) -> Json:
    return {
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": has_prompt,
    }


class CompiledTemplate:
    """`facts` are all strings in the template ("literals") and the names it looks up ("names")."""

    def __init__(self, source: str, *, now: datetime, name: str = "chat template") -> None:
        """Compile a template. `now` is the date that it sees. Raises InputError if it is not valid
        Jinja."""
        self.name = name
        self._tracked_environment = TrackedEnvironment(now)
        self._plain_environment = PlainEnvironment(now)
        try:
            self._compile(source)
        except TemplateSyntaxError as error:
            message = f"the chat template is not valid Jinja: {error.message}"
            raise InputError(message, where=f"{name}:{error.lineno}") from error
        except TEMPLATE_ERRORS as error:
            message = f"the chat template cannot be compiled: {_explain_error(error)}"
            fix = "check the template for `break` outside loops, names used twice, deep nesting"
            raise InputError(message, where=name, fix=fix) from error

    def _compile(self, source: str) -> None:
        tree = self._plain_environment.parse(source)
        constants = [node.value for node in tree.find_all(nodes.Const)]
        literals = {value for value in constants if isinstance(value, str)}
        literals |= {node.data for node in tree.find_all(nodes.TemplateData)}
        names = meta.find_undeclared_variables(tree) - set(self._plain_environment.globals)
        self.facts: Json = {"literals": sorted(literals), "names": sorted(names)}
        tree = self._plain_environment.parse(source)
        self._plain_template = _compile_tree(self._plain_environment, tree)
        tracking = TrackingTransformer(self._tracked_environment)
        tree = tracking.visit(self._tracked_environment.parse(source))
        self._tracked_template = _compile_tree(self._tracked_environment, tree)

    def render(self, context: Mapping[str, Any]) -> TrackedStr:
        """Render tracked text. Raises InputError with the template's line; the caller adds the
        row."""
        template = self._tracked_template
        with self._explained_errors(template):
            pieces = template.root_render_func(template.new_context(dict(context)))
            return self._tracked_environment.concat_output(pieces)

    def render_plain(self, context: Mapping[str, Any]) -> str:
        """Render the same with plain Jinja."""
        template = self._plain_template
        with self._explained_errors(template):
            return "".join(template.root_render_func(template.new_context(dict(context))))

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


def _compile_tree(environment: SandboxEnvironment, tree: nodes.Template) -> Template:
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


# ---------------------------------------------------------------- the guarded process


@lru_cache(maxsize=MAX_COMPILED)
def _compile_cached(source: str, now: str, name: str) -> CompiledTemplate:
    return CompiledTemplate(source, now=datetime.fromisoformat(now), name=name)


def start_templates(_: None) -> Callable[[Json], Json]:
    """Return the job of the process that renders unknown templates."""
    return _answer


def _answer(request: Json) -> Json:
    """Compile a template and return its facts or, for a `count` of messages, render it."""
    template = _compile_cached(request["source"], request["now"], request["name"])
    if "count" not in request:
        return template.facts
    variables = TemplateVariables(request["variables"])
    chat = TemplateInput(request["messages"], request["tools"], variables)
    has_prompt = request["has_prompt"]
    started = time.process_time()
    if request["is_plain"]:
        text = template.render_plain(chat.build_context(request["count"], has_prompt=has_prompt))
        runs: Sequence[int] = ()
    else:
        context = chat.build_tracked_context(request["count"], has_prompt=has_prompt)
        tracked = template.render(context)
        text = get_plain_text(tracked)
        runs = get_runs(tracked)
    if len(text) > MAX_OUTPUT_CHARS:
        message = f"{template.name}: an output of more than {MAX_OUTPUT_CHARS:,} characters"
        raise InputError(message, fix="check the template: no chat needs that much text")
    return {"text": text, "runs": runs, "seconds": time.process_time() - started}
